"""Where each head looks in a text of your own, and how sharply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_lib.recording import record_entropy


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it: `tokens`, T strings; `attention` [L, H, T, T]; `entropy` [L, H, T] in nats."""

    tokens: list[str]
    attention: Tensor
    entropy: Tensor


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
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : min(max_tokens, positions)]
    if ids.shape[1] == 0:
        raise ValueError("the text has no tokens: type a word or two")
    ids, training, before = ids.to(model.device), model.training, model.config._attn_implementation
    try:
        model.eval()  # dropout would take weights out of the rows
        with record_entropy(model) as recorder:
            model(ids)
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    entropy = torch.stack([layer[0] for layer in recorder.entropies])
    return Reading(
        [tokenizer.decode([token]) for token in ids[0].tolist()],
        torch.stack([layer[0] for layer in weights]).float().cpu(),
        entropy.float().cpu(),
    )
