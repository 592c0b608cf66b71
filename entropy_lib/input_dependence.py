"""How wide attention is, how much it depends on the input, and how far back it looks: of each head, over texts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entropy_lib.entropy import attention_entropy


class HeadStatistics(NamedTuple):
    """Of the softmax heads by layer: `entropy` and `dependence` [L][h] in nats, `by_distance` [L] of [h, T].

    See `input_dependence`. `by_distance` at d is the mean weight of the key d tokens back, over the queries that have
    one, leaving out the first token where it is another's key: trained heads park there, at no distance in particular.
    """

    entropy: list[list[float]]
    dependence: list[list[float]]
    by_distance: list[Tensor]


def input_dependence(model: PreTrainedModel, blocks: Tensor, batch: int | None = None) -> list[list[float]]:
    """How much each softmax head's attention depends on the input, in nats: [L][heads], 0 for a static pattern.

    The mean over blocks [N, T] and positions of KL(row ‖ the head's mean row at its position), which is
    H(mean row) - mean H(row): what the input tells about where the head looks.
    """
    return head_statistics(model, blocks, batch).dependence


@torch.no_grad()
def head_statistics(model: PreTrainedModel, blocks: Tensor, batch: int | None = None) -> HeadStatistics:
    """`HeadStatistics` of a decoder on blocks [N, T], `batch` at a time: by default 32 of 128 tokens, 2 of 512.

    The model stays in its mode, training or evaluation, and keeps its attention implementation.
    """
    batch = batch or max(1, 32 * 128**2 // blocks.shape[1] ** 2)  # every layer's weights are in memory at once
    before, sums = model.config._attn_implementation, None
    try:
        model.set_attn_implementation("eager")
        for part in blocks.split(batch):
            outputs = model(part.to(model.device), output_attentions=True, use_cache=False, logits_to_keep=1)
            found = [_sums(weights) for weights in outputs.attentions]
            sums = found if sums is None else [(s + t, e + f) for (s, e), (t, f) in zip(sums, found, strict=True)]
    finally:
        model.set_attn_implementation(before)
    found = [_of_means(total / len(blocks), entropy / len(blocks)) for total, entropy in sums or []]
    heads = model.config.entropy_heads() if hasattr(model.config, "entropy_heads") else [1] * len(found)
    of_layers = iter(found)
    none = torch.zeros(0), torch.zeros(0), torch.zeros(0, blocks.shape[1])
    entropy, dependence, by_distance = zip(*(next(of_layers) if count else none for count in heads), strict=True)
    return HeadStatistics([e.tolist() for e in entropy], [d.tolist() for d in dependence], list(by_distance))


def _sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, h, T, T] -> over blocks the sum of rows [h, T, T] and of their entropies [h, T], in float64."""
    rows = weights.double()
    rows = rows / rows.sum(-1, keepdim=True)  # in half precision they sum to 1 ± 0.4%
    return rows.sum(0), attention_entropy(rows).sum(0)


def _of_means(rows: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean rows [h, T, T] and mean entropies of rows [h, T] -> entropy [h], dependence [h], by distance [h, T]."""
    back = [rows.diagonal(-distance, -2, -1) for distance in range(rows.shape[-1])]  # [h, T - d], from key 0 on
    by_distance = [back[0].mean(-1), *(weights[:, 1:].sum(-1) / max(1, weights.shape[1] - 1) for weights in back[1:])]
    dependence = (attention_entropy(rows) - entropy).mean(-1)
    return entropy.mean(-1), dependence, torch.stack(by_distance, -1).float().cpu()
