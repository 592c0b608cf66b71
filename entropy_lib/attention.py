"""Attention that returns the entropy of every row beside its output."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from entropy_lib.entropy import log_softmax_and_softmax

try:
    from entropy_lib import operators
except ImportError:  # no Triton: everything else works, on the eager path
    operators = None

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_DIMS = (16, 128)
WHOLE_QUERIES = 512  # up to so many queries the eager path makes all weights at once,
CHUNK_BYTES = 2**26  # beyond, those of so many queries that they take about this much


def entropy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    temperature: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
    return_max_logits: bool = False,
) -> tuple[Tensor, ...]:
    """Attention output and per-row entropy: A = softmax(QKᵀ·scale/t + M), O = AV, E_i = -Σ_j a_ij log a_ij.

    (Eq. 5-7, and Appendix A for the temperature.) Both results carry gradients to every input.

    Args:
        query: [B, H, T_q, D].
        key, value: [B, H_kv, T_k, D], H a multiple of H_kv (grouped-query attention).
        temperature: t > 0, [H, T_q] (row i of head h uses t[h, i]) or [H]; None for 1.
        scale: factor on the logits, 1/sqrt(D) if None.
        causal: query i sees the keys up to position i + T_k - T_q.
        mask: boolean, True where a key takes part: [B, T_k], or broadcastable to [B, H, T_q, T_k].
        backend: "triton" never holds the T_q×T_k weights: a fused kernel, for CUDA GPUs from compute capability
            8.0 on, float16, bfloat16 or float32, D from 16 to 128, masks of shape [B, T_k]; no second derivative.
            "eager" makes the weights in float32 (float64 for float64 inputs) and takes everything; those of more than
            512 queries in chunks, which the backward pass makes again, so that memory is linear in the length.
            "auto" is "triton" where that works, else "eager".
        return_max_logits: also return the largest logit of every row among the keys it sees, after scale and
            temperature.

    Returns:
        output [B, H, T_q, D] in the dtype of `query`, entropy [B, H, T_q] in nats, float32 or better, and, if asked
        for, the largest logits [B, H, T_q], without gradients. A row whose keys are all masked gives output 0, entropy
        0 and a largest logit of -inf.

    Raises:
        ValueError: shapes that do not fit together, a mask that is not boolean, an unknown backend, or "triton" for
            something it does not support (the message says what).
    """
    _check_shapes(query, key, value, temperature, mask)
    compute = _fused if _use_triton(backend, query, key, value, mask) else _eager
    return compute(query, key, value, temperature, scale, causal, mask, return_max_logits)


def entropy_of_attention(
    query: Tensor,
    key: Tensor,
    temperature: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
    return_max_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Only the entropy of `entropy_attention`, [B, H, T_q] in nats, with its gradients: no values are read.

    For statistics of a frozen model, call it under `torch.no_grad()`. Arguments and errors as there.
    """
    _check_shapes(query, key, None, temperature, mask)
    compute = _fused if _use_triton(backend, query, key, None, mask) else _eager
    _, *rows = compute(query, key, None, temperature, scale, causal, mask, return_max_logits)
    return tuple(rows) if return_max_logits else rows[0]


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    temperature: Tensor | None,
    scale: float | None,
    causal: bool,
    mask: Tensor | None,
    max_logits: bool,
) -> tuple[Tensor | None, ...]:
    """Output (None without `value`), entropy and, if asked for, largest logits; long sequences in chunks of queries."""
    (batch, heads, query_len, _), key_len = query.shape, key.shape[2]
    if query_len <= WHOLE_QUERIES:
        return _eager_rows(query, key, value, temperature, scale, causal, mask, max_logits)
    rows = max(1, CHUNK_BYTES // (batch * heads * key_len * (8 if query.dtype == torch.float64 else 4)))
    inputs = (query, key, value, temperature)
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    parts = []
    for start in range(0, query_len, rows):
        end, keys = min(start + rows, query_len), slice(None)
        if causal:  # no key after the last that a query of this chunk sees
            keys = slice(min(max(end + key_len - query_len, 1), key_len))
        part = (
            query[:, :, start:end], key[:, :, keys], None if value is None else value[:, :, keys],
            temperature if temperature is None or temperature.dim() == 1 else temperature[:, start:end], scale,
            causal, _part_of_mask(mask, slice(start, end), keys), max_logits, start + key_len - query_len,
        )  # fmt: skip
        if graph:
            parts.append(checkpoint(_eager_rows, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_eager_rows(*part))
    return tuple(None if pieces[0] is None else torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))


def _eager_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    temperature: Tensor | None,
    scale: float | None,
    causal: bool,
    mask: Tensor | None,
    max_logits: bool,
    shift: int | None = None,
) -> tuple[Tensor | None, ...]:
    """`_eager` by the definition: the weights [B, H, T_q, T_k] are float32 or float64, 0 where masked."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    visible = visible_mask(mask, causal, query.shape[2], key.shape[2], query.device, shift)
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(dtype) @ _repeat_heads(key, query.shape[1]).to(dtype).transpose(-1, -2)
        logits = logits * _scale(scale, query)
        if temperature is not None:
            logits = logits / (temperature[:, None, None] if temperature.dim() == 1 else temperature[..., None])
        log_weights, weights = log_softmax_and_softmax(logits, visible)
        entropy = -(weights * log_weights).sum(-1)
        output = None
        if value is not None:
            output = (weights @ _repeat_heads(value, query.shape[1]).to(weights.dtype)).to(query.dtype)
    if not max_logits:
        return output, entropy
    logits = logits.detach()
    return output, entropy, (logits if visible is None else logits.masked_fill(~visible, -math.inf)).amax(-1)


def _part_of_mask(mask: Tensor | None, rows: slice, keys: slice) -> Tensor | None:
    if mask is None:
        return None
    if mask.dim() > 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., keys] if mask.shape[-1] > 1 else mask


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    temperature: Tensor | None,
    scale: float | None,
    causal: bool,
    mask: Tensor | None,
    max_logits: bool,
) -> tuple[Tensor, ...]:
    """`_eager` by the kernel; an empty output without `value`."""
    if temperature is not None:
        temperature = temperature.float()
        temperature = (temperature[:, None] if temperature.dim() == 1 else temperature).expand(query.shape[1:3])
    if mask is not None:
        mask = mask.expand(query.shape[0], key.shape[2])
    scale = _scale(scale, query)
    results = torch.ops.entropy_lib.attention(query, key, value, temperature, mask, scale, causal, max_logits)
    output, entropy, _, peak = results
    return (output, entropy, peak) if max_logits else (output, entropy)


def _scale(scale: float | None, query: Tensor) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _use_triton(backend: str, query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None) -> bool:
    if backend not in ("auto", "eager", "triton"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'eager', got {backend!r}")
    if backend == "eager" or (backend == "auto" and query.device.type != "cuda"):
        return False
    obstacle = _triton_obstacle(query, key, value, mask)
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend 'triton' {obstacle}; use 'eager' or 'auto'")
    return obstacle is None


def _triton_obstacle(query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None) -> str | None:
    dtypes = {x.dtype for x in (query, key, value) if x is not None}
    smallest, largest = TRITON_HEAD_DIMS
    if operators is None:
        return "needs the package triton (3.4 or newer), which is not installed"
    if query.device.type != "cuda" and not operators.INTERPRET:
        return f"needs CUDA tensors (or TRITON_INTERPRET=1, set before the import), got {query.device}"
    if query.device.type == "cuda" and torch.cuda.get_device_properties(query.device).major < 8:
        return "needs a GPU of compute capability 8.0 or more"
    if len(dtypes) > 1 or query.dtype not in TRITON_DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"needs query, key and value of one dtype, float16, bfloat16 or float32; got {names}"
    if not smallest <= query.shape[-1] <= largest:
        return f"needs a head size from {smallest} to {largest}, got {query.shape[-1]}"
    if mask is not None and mask.dim() != 2:
        return f"needs a mask of shape [B, T_k], got {list(mask.shape)}"
    return None


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor | None, temperature: Tensor | None, mask: Tensor | None
) -> None:
    if query.dim() != 4 or key.dim() != 4 or (value is not None and key.shape != value.shape):
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value) if x is not None)
        raise ValueError(f"expected query [B, H, T_q, D] and key, value [B, H_kv, T_k, D]; got {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch and head size, and the query "
            "heads must be a multiple of the key-value heads"
        )
    shapes = ([query.shape[1]], [query.shape[1], query.shape[2]])
    if temperature is not None and list(temperature.shape) not in shapes:
        raise ValueError(f"temperature must have shape {shapes[0]} or {shapes[1]}, got {list(temperature.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where a key takes part; got {mask.dtype}")
    wanted = [query.shape[0], key.shape[2]]
    if mask is not None and mask.dim() == 2 and list(mask.shape) not in (wanted, [1, wanted[1]]):
        raise ValueError(f"a mask of keys must have shape {wanted}, got {list(mask.shape)}")


def visible_mask(
    mask: Tensor | None,
    causal: bool,
    query_len: int,
    key_len: int,
    device: torch.device,
    shift: int | None = None,
) -> Tensor | None:
    """Boolean, broadcastable to [B, H, T_q, T_k]; None where every key is visible.

    Causal is: query i sees the keys up to i + shift, by default up to i + T_k - T_q.
    """
    visible = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    shift = key_len - query_len if shift is None else shift
    if causal and shift < key_len - 1:
        triangle = torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril(shift)
        visible = triangle if visible is None else visible & triangle
    return visible
