"""Shannon entropy of attention rows, its maximum, and what it says about a head.

Entropies are in nats. `T_q` is the number of queries, `T_k` the number of keys, `L` layers, `H` heads.
Half-precision inputs are computed in float32, float64 stays float64.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    if not torch.is_floating_point(x):
        raise ValueError(f"expected a floating-point tensor, got {x.dtype}")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Operations inside keep the precision of their inputs on the device of x."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def row_sum_error(attention: Tensor) -> Tensor:
    """How far each attention row is from a probability distribution: [..., T_k] -> [...].

    |sum - 1| of the row, or 1 where a weight is clearly negative. A fully masked row (all zeros, or NaN from
    a softmax over nothing) counts as valid, error 0.
    """
    attention = at_least_float32(attention).detach()
    total = attention.nansum(-1)
    empty = ~(attention.nan_to_num() != 0).any(-1)
    error = (total - 1).abs().masked_fill(empty, 0.0)
    return error.masked_fill((attention < -1e-3).any(-1), 1.0)


# The rounding of T_k weights to bfloat16 moves a row's sum by up to 2^-9; float32 by far less.
ROW_SUM_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-3}


def check_attention_rows(attention: Tensor) -> None:
    """Raise ValueError unless every row of attention [..., T_q, T_k] sums to one (or is fully masked).

    Skipped while torch.compile traces, since it reads a value back from the device.
    """
    if attention.dim() < 1 or attention.shape[-1] == 0:
        raise ValueError(f"expected attention of shape [..., queries, keys], got {tuple(attention.shape)}")
    if torch.compiler.is_compiling() or attention.numel() == 0:
        return
    worst = row_sum_error(attention).max()
    if worst > ROW_SUM_TOLERANCE[attention.dtype]:
        raise ValueError(
            f"attention rows must be probabilities that sum to 1 (or all 0 where every key is masked); a row is "
            f"off by {worst.item():.3g}. Pass the softmax output, not logits (for those: entropy_from_logits), "
            "and leave attention dropout off."
        )


def attention_entropy(attention: Tensor, eps: float = 0.0) -> Tensor:
    """Entropy of each attention row, E_i = -sum_j a_ij log a_ij (Eq. 5-7): [..., T_q, T_k] -> [..., T_q], nats.

    0·log 0 counts as 0, and its gradient as 0, so that a one-hot row has entropy 0 and a finite gradient.
    NaN weights (a softmax over nothing) count as 0, as in the published code. With `eps` > 0 the logarithm
    is log(a + eps), as in the published code, where eps = 1e-9.

    Raises ValueError if a row neither sums to one nor is fully masked.
    """
    check_attention_rows(attention)
    attention = at_least_float32(attention)
    if eps:
        return entropy_with_eps(attention, eps)
    # log 1 = 0 stands in where a = 0, outside the graph of that element: autograd sees no 1/0.
    positive = attention > 0
    weights = attention.masked_fill(~positive, 0.0)
    return -(weights * weights.masked_fill(~positive, 1.0).log()).sum(-1)


def entropy_with_eps(attention: Tensor, eps: float) -> Tensor:
    """-sum_j a_j log(a_j + eps), terms that are NaN as 0: the published code's formula, on any weights."""
    # before the product, so that gradients are finite too
    weights = attention.masked_fill(~(attention + eps > 0), 0.0)
    return -(weights * torch.log(weights + eps)).sum(-1)


def entropy_from_logits(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits) without forming probabilities twice: [..., T_q, T_k] -> [..., T_q], nats.

    With z the logits (already scaled and divided by the temperature), H = logsumexp(z) - sum_j softmax(z)_j z_j
    and dH/dz_j = -a_j (log a_j + H). `mask` is boolean, True where a key takes part, and broadcasts to the
    logits; logits of -inf are masked too. A fully masked row has entropy 0 and gradient 0.
    """
    log_weights, weights = log_softmax_and_softmax(logits, mask)
    return -(weights * log_weights).sum(-1)


def log_softmax_and_softmax(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(log a, a) of a = softmax(logits) over visible keys; both are 0 at a masked key. Shapes of `logits`."""
    logits = at_least_float32(logits)
    masked = logits == -math.inf
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean, True where a key takes part; got {mask.dtype}")
        masked = masked | ~mask
    # The finite floor keeps a fully masked row free of inf - inf; the fills below take it out again.
    log_weights = torch.log_softmax(logits.masked_fill(masked, torch.finfo(logits.dtype).min / 2), dim=-1)
    return log_weights.masked_fill(masked, 0.0), log_weights.exp().masked_fill(masked, 0.0)


def max_entropy(
    query_len: int, key_len: int | None = None, causal: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Largest entropy each query can reach: [T_q], nats, in `dtype` (torch's default if None).

    log T_k for every row (the paper's E_max), or, under a causal mask, log of the keys the row sees: query i
    sees i + 1 + T_k - T_q of them (the queries are the last T_q positions of the keys). A row that sees no
    key has 0.
    """
    key_len = query_len if key_len is None else key_len
    if query_len < 1 or key_len < 1:
        raise ValueError(f"query_len and key_len must be at least 1, got {query_len} and {key_len}")
    visible = torch.full((query_len,), key_len, dtype=torch.float64)
    if causal:
        visible = torch.arange(query_len, dtype=torch.float64) + (1 + key_len - query_len)
    return visible.clamp(min=1).log().to(dtype or torch.get_default_dtype())


def head_means(entropy: Tensor, query_mask: Tensor | None = None) -> Tensor:
    """Mean over batch and real queries, without gradients: [B, H, T], boolean [B or 1, T] or None -> [H]."""
    entropy = entropy.detach()
    if query_mask is None:
        return entropy.mean(dim=(0, 2))
    real = query_mask.expand(entropy.shape[0], -1)[:, None]
    return entropy.masked_fill(~real, 0).sum(dim=(0, 2)) / real.sum().clamp(min=1)


def pad_heads(per_head: Tensor, heads: int) -> Tensor:
    """[n, ...] of a layer's softmax heads, which come first, -> [heads, ...]: NaN for the static ones."""
    if per_head.shape[0] == heads:
        return per_head
    return torch.cat([per_head, per_head.new_full((heads - per_head.shape[0], *per_head.shape[1:]), math.nan)])


# An entropy may be off by as much, relative to its ceiling, as the rows that `check_attention_rows` lets through.
_ENTROPY_TOLERANCE = max(ROW_SUM_TOLERANCE.values())


def head_entropies(entropy: Tensor) -> Tensor:
    """Mean entropies in nats, [L, H] or any shape that ends in heads, as float64: None, for static heads, becomes NaN.

    ValueError for none at all, for what is negative or infinite, and where a static head stands before another.
    """
    entropy = torch.as_tensor(_without_none(entropy), dtype=torch.float64)
    static = entropy.isnan()
    of_softmax, after = entropy[~static], ~static[..., 1:] & static[..., :-1]  # static heads come last
    if entropy.numel() == 0 or after.any() or of_softmax.isinf().any() or (of_softmax < -_ENTROPY_TOLERANCE).any():
        raise ValueError(
            f"expected finite, non-negative head entropies [layers, heads] in nats, got shape "
            f"{tuple(entropy.shape)} with values {entropy.flatten()[:4].tolist()}..."
        )
    return entropy


def _without_none(values):
    if isinstance(values, (list, tuple)):
        return [_without_none(value) for value in values]
    return math.nan if values is None else values


def entropy_bands(entropy: Tensor) -> Tensor:
    """Fractions of heads in the four bands of Figure 2a: [L, H] -> [4], summing to 1.

    With max the largest head entropy present: [0, max/4), [max/4, max/2), [max/2, 3max/4), [3max/4, max].
    Well-behaved models have about 90% in the middle two; the first band growing is entropy collapse, the last
    growing is entropic overload. If every entropy is 0, all heads are in the first band. Static heads, NaN, do not
    count; NaN where there is no other.
    """
    entropy = head_entropies(entropy)
    entropy = entropy[~entropy.isnan()]
    if not entropy.numel():
        return torch.full((4,), math.nan)
    largest = entropy.max()
    band = (4 * entropy / largest).long().clamp(0, 3) if largest > 0 else torch.zeros_like(entropy, dtype=torch.long)
    counts = torch.bincount(band.flatten(), minlength=4)
    return (counts / entropy.numel()).to(torch.get_default_dtype())


def diagnose(entropy: Tensor, context_length: int) -> dict[str, Tensor]:
    """Count collapsed, healthy and overloaded heads per layer: [L, H] -> {"collapsed", "healthy", "overloaded"}, [L].

    The quarter bands of Figure 2a measured against the fixed maximum log(context_length), so that two models
    can be compared: collapsed below a quarter of it, overloaded from three quarters on. (Under a causal mask
    uniform attention averages mean_i log(i+1), about 0.8 log T at T = 128.) Static heads, NaN, are in none.
    """
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 for entropy to vary, got {context_length}")
    fraction = head_entropies(entropy) / math.log(context_length)
    if fraction.dim() != 2:
        raise ValueError(f"expected head entropies of shape [layers, heads], got {tuple(fraction.shape)}")
    if fraction.nan_to_num().max() > 1 + _ENTROPY_TOLERANCE:
        raise ValueError(f"an entropy exceeds log({context_length}) = {math.log(context_length):.4g} nats")
    collapsed, overloaded = fraction < 0.25, fraction >= 0.75
    states = {"collapsed": collapsed, "healthy": (fraction >= 0.25) & ~overloaded, "overloaded": overloaded}
    return {state: heads.sum(-1) for state, heads in states.items()}
