"""How fast a run was: tokens a second between compilation and evaluation, and the share of the GPU that it used."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from transformers import PreTrainedModel


def steady_tokens_per_second(history: pd.DataFrame) -> float:
    """Median tokens a second over the intervals between recorded steps (`RunRecord.history`), over all processes.

    Compilation is before the first recorded step, and an interval that starts with an evaluation is left out, unless
    there is no other. NaN for fewer than two recorded steps.
    """
    if len(history) < 2:
        return math.nan
    rates = np.diff(history["tokens"]) / np.diff(history["seconds"])
    steady = history["eval_loss"].isna().to_numpy()[:-1]
    return float(np.median(rates[steady] if steady.any() else rates))


def training_flops_per_token(parameters: int, layers: int, width: int, context_length: int) -> int:
    """6·N + 12·L·d·T: floating-point operations of a training step (forward and backward) per token.

    N counts the weights that multiply activations: two operations each in the forward pass, four in the backward
    pass. QKᵀ and AV take 2·2·d·T a layer and token forward, and twice that backward, counted in full as usual though
    a causal kernel may skip half (Chowdhery et al. 2022, appendix B). Recomputation is not counted.
    """
    return 6 * parameters + 12 * layers * width * context_length


def model_flops_per_token(model: PreTrainedModel, context_length: int | None = None) -> int:
    """`training_flops_per_token` of a model: N is all parameters but the position embeddings, which are looked up.

    Token embeddings are counted once: they are also the projection to the vocabulary.
    """
    config = model.config
    parameters = model.num_parameters()
    if hasattr(model, "transformer"):
        parameters -= model.transformer.wpe.weight.numel()
    return training_flops_per_token(parameters, config.n_layer, config.n_embd, context_length or config.n_positions)
