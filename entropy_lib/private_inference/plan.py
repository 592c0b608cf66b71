"""Which heads of a decoder keep their softmax within a budget of bytes: those whose attention depends on the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.input_dependence import HeadStatistics, head_statistics
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.costs import InferenceCost, inference_cost


@dataclass(frozen=True)
class HeadPlan:
    """What `suggest_plan` proposes, and what it has measured.

    Attributes:
        keep: True for heads that keep their softmax, [L][H]; the others become static, a filter over distances each.
        statistics: of every head: entropy, input dependence and mean attention by distance.
        constant_norms, relu: whether norms but the last become constants, and the activation ReLU.
        cost: of the model by this plan.   original: of the model as it is, at the same prices.

    `dataclasses.replace(plan, keep=..., relu=...)` gives another plan for `convert_for_private_inference`; its `cost`
    is then still the first one's: `inference_cost` of the converted model says it anew.
    """

    keep: tuple[tuple[bool, ...], ...] = field(repr=False)
    statistics: HeadStatistics = field(repr=False, compare=False)
    constant_norms: bool
    relu: bool
    cost: InferenceCost
    original: InferenceCost

    @property
    def softmax_heads(self) -> int:
        return sum(map(sum, self.keep))

    def to_frame(self):
        """A DataFrame with one row a layer: softmax heads, and of them and of the others the mean dependence, nats."""
        import pandas as pd

        rows = []
        for kept, dependence in zip(self.keep, self.statistics.dependence, strict=True):
            found = pd.Series(dependence).groupby(list(kept)).mean()
            rows.append({"softmax heads": sum(kept), "theirs": found.get(True), "the others'": found.get(False)})
        return pd.DataFrame(rows)


def suggest_plan(
    model: PreTrainedModel, texts: Tensor | Sequence[str], budget: float, *,
    tokenizer: PreTrainedTokenizerBase | None = None, context_length: int = 128, prices: str = "optimized",
    constant_norms: bool = False, relu: bool = True,
) -> HeadPlan:  # fmt: skip
    """As many softmax heads as `budget` pays for, the most input-dependent ones of all layers; the others are static.

    Args:
        model: a decoder that `inference_cost` can price.
        texts: blocks of token ids [N, T], or texts, which are joined and cut into such blocks.
        budget: 10^9 bytes of a pass over `context_length` tokens, both ways, embedding and vocabulary included.
        relu: whether the plan also turns the activation into ReLU, the largest saving at today's prices. Without it
            method "optimized" computes SiLU and GELU by segments, which costs SmolLM2-135M 0.1% of its perplexity.
        constant_norms: whether it turns norms into constants (the last stays). Fine in models trained for it; in
            SmolLM2-135M rare rows are 18 to 189 times the median, and once their norms are constant they overflow.

    Keeping the most input-dependent heads is the best of the rules that were tried from scratch (notebook 11, GPT-2
    small: 0.35 points better than random heads with 4 and 12 of 144, level with 36), and so it is in SmolLM2-135M at
    once (notebook 12). What a plan costs a pretrained model in perplexity is not known before it is trained. Raises
    ValueError for a budget that no softmax fits in, texts without a tokenizer or too short for one block, and what
    `inference_cost` refuses.
    """
    architecture = Architecture.of(model.config)
    blocks = _blocks(texts, tokenizer, context_length)
    was_training = [module for module in model.modules() if module.training]
    try:
        statistics = head_statistics(model.eval(), blocks)
    finally:
        for module in was_training:
            module.training = True
    reduced = replace(
        architecture,
        layer_norm=architecture.layer_norm and not constant_norms,
        query_key_norm=architecture.query_key_norm and not constant_norms,
        activation="relu" if relu and architecture.activation != "linear" else architecture.activation,
    )
    ranked = torch.tensor(statistics.dependence).flatten().argsort(descending=True, stable=True)

    def plan(count: int) -> tuple[Tensor, InferenceCost]:
        keep = torch.zeros(len(ranked), dtype=torch.bool)
        keep[ranked[:count]] = True
        keep = keep.view(architecture.layers, -1)
        heads = replace(reduced, dynamic_heads=tuple(keep.sum(-1).tolist()))
        return keep, inference_cost(heads, context_length, prices)

    fits, too_many = -1, len(ranked) + 1  # the cost grows with every head
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if plan(middle)[1].communication_gb <= budget:
            fits = middle
        else:
            too_many = middle
    if fits < 1:
        least = plan(1)[1].communication_gb
        raise ValueError(f"a budget of {budget:.4g} GB pays for no softmax head: one takes {least:.4g} GB in all")
    keep, cost = plan(fits)
    original = inference_cost(architecture, context_length, prices)
    heads = tuple(tuple(layer) for layer in keep.tolist())
    return HeadPlan(heads, statistics, constant_norms, relu, cost, original)


def _blocks(texts: Tensor | Sequence[str], tokenizer: PreTrainedTokenizerBase | None, length: int) -> Tensor:
    if isinstance(texts, Tensor):
        if texts.dim() != 2 or texts.is_floating_point() or not texts.numel():
            raise ValueError(f"expected blocks of token ids [N, T], got {texts.dtype} {list(texts.shape)}")
        return texts
    if tokenizer is None:
        raise ValueError("texts need the model's tokenizer: suggest_plan(model, texts, budget, tokenizer=tokenizer)")
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    if len(ids) < length:
        raise ValueError(f"these texts have {len(ids)} tokens, less than a block of {length}: pass more")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
