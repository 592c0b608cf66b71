"""A text as a model reads it: every head's attention, what comes next, and that with one head at a temperature."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.explore.attention_logits import left_as_it_was
from entropy_lib.interface import entropy_attention_forward, entropy_mask
from entropy_lib.recording import record_entropy

EXACT, COARSE = 65_534, 254  # highest level of a weight in two bytes, and in one
POWER = 4  # of a level that is its weight: half of one byte's levels are for weights below 0.06
_BELOW = 0.25  # the level that a weight counts as which rounds to 0: it is small, but its key is seen

_tempered: dict[nn.Module, tuple[int, float]] = {}  # by layer: the head whose logits are divided, and by what


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it, cut to T of its `total` tokens.

    `tokens`, T strings; `attention` [L, H, T, T]; `entropy` [L, H, T] in nats; `ids` [1, T]; `layers`, L names of
    attention layers in the model.
    """

    tokens: list[str]
    attention: Tensor
    entropy: Tensor
    ids: Tensor
    total: int
    layers: list[str]

    @property
    def causal(self) -> bool:
        return not self.attention.triu(1).any()


@torch.no_grad()
def read_attention(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int = 64
) -> Reading:
    """Attention of every head on the first `max_tokens` tokens of a text, at most as many as the model has positions.

    Rows are the weights of transformers' eager attention, entropies those of `record_entropy`: two ways to the same
    numbers. The model must be a decoder, or an encoder with one attention a layer. Raises ValueError for a text
    without tokens and for models that `record_entropy` cannot read.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    total = ids.shape[1]
    if not total:
        raise ValueError("the text has no tokens: type a word or two")
    ids = ids[:, : min(max_tokens, positions)].to(model.device)
    with left_as_it_was(model):
        model.eval()  # dropout would take weights out of the rows
        with record_entropy(model) as recorder:
            model(ids)
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True).attentions
    entropy = torch.stack([layer[0] for layer in recorder.entropies])
    return Reading(
        [tokenizer.decode([token]) for token in ids[0].tolist()],
        torch.stack([layer[0] for layer in weights]).float().cpu(),
        entropy.float().cpu(),
        ids,
        total,
        list(recorder.layers),
    )


# -- what comes next --------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_tokens(model: PreTrainedModel, reading: Reading, layer: int = 0, head: int = 0, t: float = 1.0) -> Tensor:
    """Probabilities of the token after each of a reading's, [T, V], with the logits of one head divided by t.

    A forward pass of its own, so that all later layers see the change. Raises ValueError for models that predict no
    next token.
    """
    if not reading.causal or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} predicts no next token")
    with left_as_it_was(model), head_temperature(model, reading.layers[layer], head, t):
        logits = model.eval()(reading.ids).logits
    return logits[0].float().softmax(-1).cpu()


@contextmanager
def head_temperature(model: PreTrainedModel, layer: str, head: int, t: float) -> Iterator[None]:
    """Inside, attention of the layer so named is softmax(z/t) in one head; the attention implementation stays set."""
    module = model.get_submodule(layer)
    model.set_attn_implementation("entropy_tempered")
    _tempered[module] = head, t
    try:
        yield
    finally:
        del _tempered[module]


def _tempered_attention_forward(module: nn.Module, query: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
    """Dividing a head's queries is dividing its logits, whatever computes the attention."""
    if module in _tempered:
        head, t = _tempered[module]
        query = query.clone()
        query[:, head] /= t
    return entropy_attention_forward(module, query, *args, **kwargs)


AttentionInterface.register("entropy_tempered", _tempered_attention_forward)
AttentionMaskInterface.register("entropy_tempered", entropy_mask)


# -- for the page -----------------------------------------------------------------------------------------------------


def packed(reading: Reading, levels: int) -> dict:
    """A reading for the page: of causal attention what each query sees, a weight as a level, whole and deflated.

    A level q of at most `levels` (EXACT or COARSE) is the weight (q / levels)⁴ of a row that is then made to sum to
    one: with COARSE, weights are within 0.006, and nine in ten entropies within 0.01 nats for t from 1/4 to 4. Deflated
    before they become base64 they take 6% less than where the page's zip finds them in it.
    """
    layers, heads, size, _ = reading.attention.shape
    seen = torch.ones(size, size, dtype=torch.bool)
    weights = reading.attention[..., seen.tril() if reading.causal else seen].double().clamp(0, 1).numpy()
    whole = np.rint(weights ** (1 / POWER) * levels).astype("<u2" if levels > COARSE else "u1")
    return {
        "tokens": reading.tokens,
        "total": reading.total,
        "layers": layers,
        "heads": heads,
        "causal": reading.causal,
        "levels": levels,
        "data": base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode(),
    }


def unpacked(reading: dict) -> Tensor:
    """Attention [L, H, T, T] of a packed reading, float64, as the page has it: 0 only where a key is not seen."""
    levels, size = reading["levels"], len(reading["tokens"])
    raw = zlib.decompress(base64.b64decode(reading["data"]))
    whole = np.frombuffer(raw, "<u2" if levels > COARSE else "u1").astype(float)
    weights = torch.from_numpy((np.maximum(whole, _BELOW) / levels) ** POWER)
    attention = torch.zeros(reading["layers"], reading["heads"], size, size, dtype=torch.float64)
    seen = torch.ones(size, size, dtype=torch.bool)
    seen = seen.tril() if reading["causal"] else seen
    attention[..., seen] = weights.view(reading["layers"], reading["heads"], -1)
    return attention / attention.sum(-1, keepdim=True)
