"""Attention logits to look at: of any transformers model, and a small sample (see data/make/attention_logits.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from entropy_lib.recording import configs_of

SAMPLE = Path(__file__).with_name("attention_logits.npz")
_FLOOR = math.log(torch.finfo(torch.float32).tiny)  # -87.3 nats


@dataclass(frozen=True)
class AttentionLogits:
    """Logits [L, H, T_q, T_k] of one text, -inf at masked keys, and a label for each of the T_k tokens.

    A row is known up to a constant, which no softmax sees: here the row's largest logit is 0.
    """

    logits: Tensor
    tokens: tuple[str, ...]
    origin: str

    def __post_init__(self):
        logits = self.logits
        if logits.dim() != 4 or not torch.is_floating_point(logits) or logits.isnan().any() or (logits > 1e30).any():
            raise ValueError(f"expected logits [layers, heads, queries, keys], -inf where masked; got {logits.shape}")
        if not (logits > -math.inf).any(-1).all():
            raise ValueError("a row of logits sees no key at all: leave padded positions out")
        if len(self.tokens) != logits.shape[-1]:
            raise ValueError(f"{logits.shape[-1]} keys need as many tokens, got {len(self.tokens)}")
        object.__setattr__(self, "logits", logits.float() - logits.float().amax(-1, keepdim=True))

    @property
    def causal(self) -> bool:
        """Whether query i sees the first i + 1 keys, there being as many keys as queries."""
        seen = self.logits > -math.inf
        return seen.shape[-2] == seen.shape[-1] and torch.equal(seen, torch.ones_like(seen).tril())


def as_logits(logits) -> AttentionLogits:
    """Logits as an array [L, H, T_q, T_k] (or [H, T_q, T_k]: one layer), with positions for tokens."""
    if isinstance(logits, AttentionLogits):
        return logits
    logits = torch.as_tensor(logits).detach().cpu()
    logits = logits[None] if logits.dim() == 3 else logits
    return AttentionLogits(logits, tuple(str(n) for n in range(logits.shape[-1])), "logits that you gave")


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Puts back which modules are in training mode, and the attention of the model and of its parts."""
    training = [(module, module.training) for module in model.modules()]
    attention = [(config, config._attn_implementation) for config in configs_of(model)]
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
        for config, implementation in attention:
            config._attn_implementation_internal = implementation


@torch.no_grad()
def logits_of(model, tokenizer, text: str) -> AttentionLogits:
    """The logits of a transformers decoder for one text, divided by its own learned temperatures if it has any.

    They are the logarithm of its eager attention weights; what rounds to 0 (a weight below e^-87) counts as e^-87.
    """
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] < 2:
        raise ValueError(f"a text of at least two tokens has attention to look at, got {text!r}")
    with left_as_it_was(model):
        model.eval().set_attn_implementation("eager")
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    weights = torch.cat(list(attentions)).float().cpu()  # [L, H, T, T]
    future = ~torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
    causal = not weights[..., future].any()
    logits = weights.log().clamp(min=_FLOOR)
    logits = logits.masked_fill(future, -math.inf) if causal else logits
    tokens = tuple(tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist())
    return AttentionLogits(logits, tokens, model.config.model_type)


def read_logits(path: str | Path = SAMPLE) -> AttentionLogits:
    """Logits as data/make/attention_logits.py writes them."""
    with np.load(path, allow_pickle=False) as file:
        size = len(file["tokens"])
        lower = torch.from_numpy(file["lower"].astype(np.float32))  # [L, H, T(T+1)/2]
        logits = torch.full((*lower.shape[:2], size, size), -math.inf)
        rows, columns = torch.tril_indices(size, size)
        logits[:, :, rows, columns] = lower
        return AttentionLogits(logits, tuple(file["tokens"].tolist()), str(file["origin"]))
