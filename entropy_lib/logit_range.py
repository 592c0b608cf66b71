"""How far the logits of attention reach from the mean of their row."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@torch.no_grad()
def logit_range(model: PreTrainedModel, blocks: Tensor, batch: int = 64) -> list[list[list[float]]]:
    """How far attention logits reach from the mean of their row: [lowest, highest] by layer and softmax head.

    `model`: one of this library, or a stock GPT-2 or Llama. Over the keys that a query sees, after scale and
    temperature, in all rows of blocks [N, T]. The mean of a row is linear, so free for two parties, and rows that stay
    near it need no maximum (see `private_inference.methods`).
    """
    ranges: dict[int, Tensor] = {}  # [2, H]

    def listen(layer: int, seen: Tensor) -> None:
        ranges[layer] = torch.maximum(ranges[layer], seen) if layer in ranges else seen

    attentions = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    before = model.config._attn_implementation
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
        key_of_head = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query.float() @ key_of_head.float().transpose(-1, -2) * (scaling or 1 / math.sqrt(query.shape[-1]))
        mean = logits.masked_fill(~visible, 0).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
        away = logits - mean
        below, above = (x.masked_fill(~visible, 0).amax((0, 2, 3)) for x in (-away, away))  # a row's mean is at 0
    module.logit_range_listener(module.layer_idx, torch.stack([below, above]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register("logit_range", _logit_range_forward)
AttentionMaskInterface.register("logit_range", sdpa_mask)
