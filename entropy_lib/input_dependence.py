"""How much attention depends on the input, beside how wide it is: two numbers a head from one pass over texts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entropy_lib.entropy import attention_entropy


def input_dependence(model: PreTrainedModel, blocks: Tensor, batch: int = 32) -> list[list[float]]:
    """How much each softmax head's attention depends on the input, in nats: [L][heads], 0 for a static pattern.

    The mean over blocks [N, T] and positions of KL(row ‖ the head's mean row at its position), which is
    H(mean row) - mean H(row): what the input tells about where the head looks.
    """
    return entropy_and_dependence(model, blocks, batch)[1]


@torch.no_grad()
def entropy_and_dependence(
    model: PreTrainedModel, blocks: Tensor, batch: int = 32
) -> tuple[list[list[float]], list[list[float]]]:
    """(mean entropy, `input_dependence`) of each softmax head of a decoder on blocks [N, T], [L][heads] in nats.

    The model stays in its mode, training or evaluation, and keeps its attention implementation.
    """
    before, sums = model.config._attn_implementation, None
    try:
        model.set_attn_implementation("eager")
        for part in blocks.split(batch):
            outputs = model(part.to(model.device), output_attentions=True, use_cache=False, logits_to_keep=1)
            weights = [a.double() for a in outputs.attentions]
            rows = [a / a.sum(-1, keepdim=True) for a in weights]  # in half precision they sum to 1 ± 0.4%
            found = [(a.sum(0), attention_entropy(a).sum(0)) for a in rows]  # [h, T, T], [h, T]
            sums = found if sums is None else [(s + t, e + f) for (s, e), (t, f) in zip(sums, found, strict=True)]
    finally:
        model.set_attn_implementation(before)
    means = [(total / len(blocks), entropy / len(blocks)) for total, entropy in sums or []]
    numbers = [(entropy.mean(-1), (attention_entropy(rows) - entropy).mean(-1)) for rows, entropy in means]
    heads = model.config.entropy_heads() if hasattr(model.config, "entropy_heads") else [1] * len(numbers)
    of_layers = iter(numbers)
    both = [next(of_layers) if count else (torch.zeros(0),) * 2 for count in heads]
    return [entropy.tolist() for entropy, _ in both], [dependence.tolist() for _, dependence in both]
