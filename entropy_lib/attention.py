"""Attention that returns the entropy of every row beside its output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_lib.entropy import log_softmax_and_softmax


def entropy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention output and per-row entropy: A = softmax(QKᵀ·scale/t + M), O = AV, E_i = -Σ_j a_ij log a_ij.

    (Eq. 5-7, and Appendix A for the temperature.) Both results carry gradients to every input.

    Args:
        query: [B, H, T_q, D].
        key, value: [B, H_kv, T_k, D], H a multiple of H_kv (grouped-query attention).
        temperature: t > 0, [H, T_q] (row i of head h uses t[h, i]) or [H]; None for 1.
        scale: factor on the logits, 1/sqrt(D) if None.
        causal: query i sees the keys up to position i + T_k - T_q.
        mask: boolean, True where a key takes part: [B, T_k], or broadcastable to [B, H, T_q, T_k].
        backend: "eager" materialises the T_q×T_k weights in float32 (float64 for float64 inputs); "auto" picks
            the best backend available, here "eager".

    Returns:
        output [B, H, T_q, D] in the dtype of `query`, entropy [B, H, T_q] in nats, float32 or better.
        A row whose keys are all masked gives output 0 and entropy 0.
    """
    if backend not in ("auto", "eager"):
        raise ValueError(f"backend must be 'auto' or 'eager', got {backend!r}")
    _check_shapes(query, key, value, temperature)
    _, heads, query_len, head_dim = query.shape
    key_len = key.shape[2]
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2)  # [B, H, T_q, T_k]
        logits = logits * (1 / math.sqrt(head_dim) if scale is None else scale)
        if temperature is not None:
            logits = logits / (temperature[:, None, None] if temperature.dim() == 1 else temperature[..., None])
        visible = _visible_keys(mask, causal, query_len, key_len, query.device)
        log_weights, weights = log_softmax_and_softmax(logits, visible)
        entropy = -(weights * log_weights).sum(-1)
        output = weights @ value.to(dtype)
    return output.to(query.dtype), entropy


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, temperature: Tensor | None) -> None:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            "expected query [B, H, T_q, D] and key, value [B, H_kv, T_k, D]; got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch and head size, and the query "
            "heads must be a multiple of the key-value heads"
        )
    shapes = ([query.shape[1]], [query.shape[1], query.shape[2]])
    if temperature is not None and list(temperature.shape) not in shapes:
        raise ValueError(f"temperature must have shape {shapes[0]} or {shapes[1]}, got {list(temperature.shape)}")


def _visible_keys(
    mask: Tensor | None, causal: bool, query_len: int, key_len: int, device: torch.device
) -> Tensor | None:
    """Boolean, broadcastable to [B, H, T_q, T_k]; None where every key is visible."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where a key takes part; got {mask.dtype}")
    visible = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    if causal and query_len > 1:
        triangle = torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril(key_len - query_len)
        visible = triangle if visible is None else visible & triangle
    return visible
