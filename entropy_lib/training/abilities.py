"""What a trained model can do beside its perplexity: recall, loss by position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

SEQUENCES = 256


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    positions: int | None = None,
    sequences: int = SEQUENCES,
    seed: int = 1,
    batch: int = SEQUENCES,
) -> float:
    """Share of right next tokens in the second half of random tokens that are written twice.

    No model of the language learns them: only looking back at what followed the first time answers. A guess is right
    once in a vocabulary. Sequences have so many positions (None: all the model's), or one less if these are odd.
    """
    positions = positions or model.config.n_positions
    half = positions // 2
    if half < 2:
        raise ValueError(f"recall needs at least 4 positions, got {positions}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (sequences, half), generator=generator).repeat(1, 2)
    right = 0
    for part in ids.to(model.device).split(batch):
        guesses = model(part, logits_to_keep=half).logits[:, :-1].argmax(-1)
        right += int((guesses == part[:, half + 1 :]).sum())
    return right / (sequences * (half - 1))


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, blocks: Tensor, batch: int = SEQUENCES) -> list[float]:
    """Mean cross-entropy in nats of the tokens at positions 1 to T-1 of blocks [N, T]; their mean is the loss."""
    total = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64)
    for part in blocks.split(batch):
        part = part.to(model.device)
        logits = model(part).logits[:, :-1].transpose(1, 2).float()
        total += cross_entropy(logits, part[:, 1:], reduction="none").sum(0).double().cpu()
    return (total / len(blocks)).tolist()
