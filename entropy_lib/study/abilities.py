"""What a trained model can do beside its perplexity: recall, loss by position, and how far its logits reach."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from entropy_lib.modeling import EntropyGPT2LMHeadModel

SEQUENCES = 256


@torch.no_grad()
def recall(model: EntropyGPT2LMHeadModel, sequences: int = SEQUENCES, seed: int = 1, batch: int = SEQUENCES) -> float:
    """Share of right next tokens in the second half of random tokens that are written twice.

    No model of the language learns them: only looking back at what followed the first time answers. A guess is right
    once in a vocabulary. Sequences have all the model's positions, or one less if these are odd.
    """
    half = model.config.n_positions // 2
    if half < 2:
        raise ValueError(f"recall needs at least 4 positions, the model has {model.config.n_positions}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (sequences, half), generator=generator).repeat(1, 2)
    right = 0
    for part in ids.to(model.device).split(batch):
        guesses = model(part, logits_to_keep=half).logits[:, :-1].argmax(-1)
        right += int((guesses == part[:, half + 1 :]).sum())
    return right / (sequences * (half - 1))


@torch.no_grad()
def loss_by_position(model: EntropyGPT2LMHeadModel, blocks: Tensor, batch: int = SEQUENCES) -> list[float]:
    """Mean cross-entropy in nats of the tokens at positions 1 to T-1 of blocks [N, T]; their mean is the loss."""
    total = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64)
    for part in blocks.split(batch):
        part = part.to(model.device)
        logits = model(part).logits[:, :-1].transpose(1, 2).float()
        total += cross_entropy(logits, part[:, 1:], reduction="none").sum(0).double().cpu()
    return (total / len(blocks)).tolist()


@torch.no_grad()
def logit_range(model: EntropyGPT2LMHeadModel, blocks: Tensor, batch: int = SEQUENCES) -> list[list[list[float]]]:
    """How far attention logits reach from the mean of their row: [lowest, highest] by layer and softmax head.

    Over the keys that a query sees, after scale and temperature, in all rows of blocks [N, T]. The mean is linear, so
    free for two parties, and a row that stays near it needs no maximum: see `private_inference.methods`.
    """
    ranges: dict[int, Tensor] = {}  # [2, H]

    def listen(layer: int, seen: Tensor) -> None:
        ranges[layer] = torch.maximum(ranges[layer], seen) if layer in ranges else seen

    attentions, before = [block.attn for block in model.transformer.h], model.config._attn_implementation
    try:
        for attention in attentions:
            attention.logit_range_listener = listen
        model.set_attn_implementation("logit_range")
        for part in blocks.split(batch):
            model(part.to(model.device), logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
        for attention in attentions:
            del attention.logit_range_listener
    return [
        torch.stack([-ranges[layer][0], ranges[layer][1]], -1).tolist() if layer in ranges else []
        for layer in range(len(attentions))
    ]


def _logit_range_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """sdpa, which tells the layer's listener how far the rows of logits reach from their mean."""
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    visible = visible.tril(key.shape[2] - query.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().transpose(-1, -2) * (scaling or 1 / math.sqrt(query.shape[-1]))
        mean = logits.masked_fill(~visible, 0).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
        away = logits - mean
        below, above = (x.masked_fill(~visible, 0).amax((0, 2, 3)) for x in (-away, away))  # a row's mean is at 0
    module.logit_range_listener(module.layer_idx, torch.stack([below, above]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("logit_range", _logit_range_forward)
AttentionMaskInterface.register("logit_range", sdpa_mask)
