"""Entropy regularisation (Algorithm 1): hold each head's attention entropy inside a band around a threshold."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entropy_lib.entropy import at_least_float32, attention_entropy, entropy_with_eps, max_entropy, row_sum_error

PUBLISHED_EPS = 1e-9  # inside the logarithm of the published code


class EntropyRegularization(nn.Module):
    """λ · penalty on head entropies that leave their tolerance band (Algorithm 1, Eq. 8 ff.).

    With threshold θ (one per head, or per layer and head), ceiling E_max and margin γ:
    δ = E - θ·E_max; penalty δ² where |δ| > γ·E_max, else 0; mean over heads, then over layers; times λ.
    At the edge of the band the penalty jumps from 0 to (γ·E_max)²: it is not continuous there.

    Args:
        loss_coeff: λ >= 0.
        tolerance_margin_factor: γ >= 0, the half-width of the band as a fraction of E_max.
        context_size: T in E_max = log T. None takes the number of keys (`compute_loss`) or of queries (`forward`; of
            each sequence's real ones, if told which).
        reduction: over batch and queries, "sum" (published code; λ then scales with batch × T) or "mean".
        per: "query" penalises every query position (published code), "head" the mean entropy of each head
            over batch and queries (Algorithm 1: one number a head, so `reduction` makes no difference).
        ceiling: E_max of a row, "context" (log T, the paper) or "causal" (log of the keys that row i sees,
            log(i+1) when queries and keys are the same positions; `context_size` is not used).

    Algorithm 1 and the published code differ in `per` and `reduction`; the defaults follow the code, so
    `EntropyRegularization` replaces the authors' class with only the import changed.
    """

    def __init__(
        self,
        loss_coeff: float = 1e-5,
        tolerance_margin_factor: float = 0.20,
        context_size: int | None = None,
        reduction: str = "sum",
        per: str = "query",
        ceiling: str = "context",
    ):
        super().__init__()
        for name, value in (("loss_coeff", loss_coeff), ("tolerance_margin_factor", tolerance_margin_factor)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if context_size is not None and context_size < 1:
            raise ValueError(f"context_size must be at least 1 (or None to infer it), got {context_size}")
        choices = {"reduction": ("sum", "mean"), "per": ("query", "head"), "ceiling": ("context", "causal")}
        for name, value in (("reduction", reduction), ("per", per), ("ceiling", ceiling)):
            if value not in choices[name]:
                raise ValueError(f"{name} must be one of {choices[name]}, got {value!r}")
        self.loss_coeff = loss_coeff
        self.tolerance_margin_factor = tolerance_margin_factor
        self.context_size = context_size
        self.reduction, self.per, self.ceiling = reduction, per, ceiling

    def extra_repr(self) -> str:
        return (
            f"loss_coeff={self.loss_coeff}, tolerance_margin_factor={self.tolerance_margin_factor}, "
            f"context_size={self.context_size}, reduction={self.reduction!r}, per={self.per!r}, "
            f"ceiling={self.ceiling!r}"
        )

    def forward(
        self,
        entropies: Sequence[Tensor],
        thresholds: Tensor,
        query_mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Regularisation loss from per-row entropies, a scalar.

        Args:
            entropies: one [batch, heads, queries] tensor a layer, nats. Layers may have fewer heads than θ's rows, or
                none (static heads have no entropy): the first values of a row are theirs, and the mean is over layers
                that have heads.
            thresholds: θ, [layers, heads], or [heads] for all layers.
            query_mask: True at real queries, boolean [batch, queries], or one a layer (`EntropyRecorder.query_masks`);
                None where all are real. Padding pays nothing: sums and means are over real queries, and a sequence
                has the ceiling that it has alone (log of its real keys where that depends on the length).
        """
        heads = thresholds.shape[1] if isinstance(thresholds, Tensor) and thresholds.dim() == 2 else None
        _check_layers(entropies, "entropies", 3, "[batch, heads, queries]", heads)
        key_lens = [entropy.shape[-1] for entropy in entropies]
        log_context = [math.log(self.context_size or key_len) for key_len in key_lens]
        return self._loss(entropies, thresholds, key_lens, log_context, _query_masks(query_mask, entropies))

    def compute_loss(
        self, attentions: Sequence[Tensor], reg_threshold_weights: Tensor | Sequence, num_heads: int, num_layers: int
    ) -> Tensor:
        """Regularisation loss from attention matrices, as published: a scalar.

        Args:
            attentions: one [batch, heads, queries, keys] tensor a layer, rows summing to one.
            reg_threshold_weights: θ as a tensor or list, [heads] for all layers, or [layers, heads].
            num_heads, num_layers: must be those of `attentions`.

        Raises ValueError for wrong shapes, an empty list, and rows that do not sum to one. Attention that has
        been through dropout, as GPT-2 returns it in training mode by default, is let through with a warning.
        """
        _check_layers(attentions, "attentions", 4, "[batch, heads, queries, keys]")
        if len(attentions) != num_layers or attentions[0].shape[1] != num_heads:
            raise ValueError(
                f"num_layers={num_layers} and num_heads={num_heads} do not fit {len(attentions)} attention "
                f"matrices of {attentions[0].shape[1]} heads"
            )
        entropies = [self.compute_entropy(attention) for attention in attentions]
        key_lens = [attention.shape[-1] for attention in attentions]
        # The published code takes this logarithm in float32. Sums of deviations cancel, so its rounding shows.
        log_context = [torch.tensor(float(self.context_size or key_len)).log().item() for key_len in key_lens]
        return self._loss(entropies, reg_threshold_weights, key_lens, log_context)

    @staticmethod
    def compute_entropy(attention_matrix: Tensor) -> Tensor:
        """Row entropies as published, -Σ a log(a + 1e-9) with NaN as 0: [..., queries, keys] -> [..., queries]."""
        if _went_through_dropout(attention_matrix):
            warnings.warn(
                "attention rows do not sum to one and have exact zeros: this is attention after dropout, whose "
                "-sum(a log a) is not an entropy. Set attn_pdrop=0 for the model.",
                stacklevel=2,
            )
            return entropy_with_eps(at_least_float32(attention_matrix), PUBLISHED_EPS)
        return attention_entropy(attention_matrix, eps=PUBLISHED_EPS)

    @staticmethod
    @torch.no_grad()
    def log_entropy_metrics(attentions: Sequence[Tensor], step: int, logger=None) -> dict[str, float]:
        """Mean entropy of every head, {"attn.{layer}.head.{head}.entropy": nats}, also sent to `logger`.

        Args:
            attentions: one [batch, heads, queries, keys] tensor a layer.
            step: the training step the values belong to.
            logger: anything with wandb's `.log(dict, step=)`, a TensorBoard `SummaryWriter`, or None; ValueError for
                others, such as Python's own loggers.
        """
        check_logger(logger)
        _check_layers(attentions, "attentions", 4, "[batch, heads, queries, keys]")
        heads = [EntropyRegularization.compute_entropy(a).mean(dim=(0, 2)) for a in attentions]
        metrics = {
            f"attn.{layer}.head.{head}.entropy": entropy
            for layer, row in enumerate(torch.stack(heads).tolist())
            for head, entropy in enumerate(row)
        }
        send_metrics(metrics, step, logger)
        return metrics

    def _loss(
        self,
        entropies: Sequence[Tensor],
        thresholds: Tensor | Sequence,
        key_lens: list[int],
        log_context: list[float],
        query_masks: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        most = max([layer.shape[1] for layer in entropies])
        thresholds = _as_thresholds(thresholds, len(entropies), most, entropies[0].device)
        query_masks = query_masks or [None] * len(entropies)
        layers = zip(entropies, thresholds, key_lens, log_context, query_masks, strict=True)
        penalties = [self._layer_penalty(*layer) for layer in layers if layer[0].shape[1]]
        return self.loss_coeff * torch.stack(penalties).mean()

    def _layer_penalty(
        self, entropy: Tensor, threshold: Tensor, key_len: int, log_context: float, real: Tensor | None
    ) -> Tensor:
        """Mean over heads of the penalty: entropy [B, H, T_q], threshold [H], real queries [B, T_q] -> scalar."""
        entropy = at_least_float32(entropy)
        ceiling = self._ceiling(entropy, key_len, log_context, real)
        real = None if real is None else real[:, None]
        if self.per == "head":
            entropy, ceiling, real = _mean(entropy, real, keepdim=True), _mean(ceiling, real, keepdim=True), None
        deviation = entropy - threshold[: entropy.shape[1], None] * ceiling  # [B, H, T_q]
        outside = deviation.abs() > self.tolerance_margin_factor * ceiling
        if real is not None:
            outside = outside & real
        penalty = torch.where(outside, deviation, torch.zeros_like(deviation)).square()
        per_head = penalty.sum(dim=(0, 2)) if self.reduction == "sum" else _mean(penalty, real)
        return per_head.mean()

    def _ceiling(self, entropy: Tensor, key_len: int, log_context: float, real: Tensor | None) -> Tensor:
        """E_max of every row, [T_q], or [B, 1, T_q] where padding makes it differ by sequence."""
        query_len = entropy.shape[-1]
        if real is not None and (self.ceiling == "causal" or self.context_size is None):
            seen = real.cumsum(-1) if self.ceiling == "causal" else real.sum(-1, keepdim=True).expand_as(real)
            return seen.clamp(min=1).to(entropy.dtype).log()[:, None]
        if self.ceiling == "causal":
            ceiling = max_entropy(query_len, key_len, causal=True, dtype=entropy.dtype)  # [T_q]
            return ceiling.to(entropy.device, non_blocking=True)  # a wait for the GPU, in every layer, otherwise
        return entropy.new_full((query_len,), log_context)


def _check_layers(layers: Sequence[Tensor], name: str, dim: int, shape: str, heads: int | None = None) -> None:
    """ValueError unless all layers have the same number of heads or, where `heads` is given, at most so many."""
    if len(layers) == 0:
        raise ValueError(f"{name} is empty: expected one tensor {shape} a layer")
    for index, layer in enumerate(layers):
        if (
            not isinstance(layer, Tensor)
            or layer.dim() != dim
            or (layer.numel() == 0 and not (heads and layer.shape[1] == 0))
        ):
            seen = tuple(layer.shape) if isinstance(layer, Tensor) else type(layer).__name__
            raise ValueError(f"{name}[{index}] must be a tensor {shape}, got {seen}")
        if layer.shape[1] != layers[0].shape[1] and (heads is None or layer.shape[1] > heads):
            raise ValueError(f"{name}[{index}] has {layer.shape[1]} heads, {name}[0] has {layers[0].shape[1]}")
    if not any(layer.shape[1] for layer in layers):
        raise ValueError(f"no layer of {name} has heads: static and ReLU² heads have no entropy to regularise")


def _mean(x: Tensor, real: Tensor | None, keepdim: bool = False) -> Tensor:
    """Mean of [B, H, T], or of something that broadcasts to it, over batch and real queries [B, 1, T]."""
    if real is None:
        return x.mean(dim=(0, 2), keepdim=keepdim) if x.dim() == 3 else x.mean(dim=-1, keepdim=keepdim)
    return torch.where(real, x, 0).sum(dim=(0, 2), keepdim=keepdim) / real.sum().clamp(min=1)


def _query_masks(
    query_mask: Tensor | Sequence[Tensor | None] | None, entropies: Sequence[Tensor]
) -> list[Tensor | None]:
    """One boolean [batch, queries] mask a layer, on the device of its entropies, or None."""
    masks = [query_mask] * len(entropies) if query_mask is None or isinstance(query_mask, Tensor) else list(query_mask)
    if len(masks) != len(entropies):
        raise ValueError(f"query_mask has {len(masks)} masks for {len(entropies)} layers: pass one, or one a layer")
    for index, (mask, entropy) in enumerate(zip(masks, entropies, strict=True)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise ValueError(
                f"query_mask must be boolean, True at real queries, got {mask.dtype}: attention_mask.bool()"
            )
        batch, _, queries = entropy.shape
        if tuple(mask.shape) not in ((batch, queries), (1, queries)):
            raise ValueError(
                f"query_mask must have shape [{batch}, {queries}] (batch and queries) in layer {index}, "
                f"got {list(mask.shape)}"
            )
        masks[index] = mask.to(entropy.device).expand(batch, queries)
    return masks


def _as_thresholds(thresholds: Tensor | Sequence, num_layers: int, num_heads: int, device: torch.device) -> Tensor:
    """θ as [layers, heads] on `device`, gradients kept; `num_heads` is the most that a layer has."""
    if not isinstance(thresholds, Tensor):
        if len(thresholds) == 0:
            raise ValueError("thresholds are empty: expected one weight a head, [heads] or [layers, heads]")
        thresholds = torch.stack([torch.as_tensor(t, dtype=torch.get_default_dtype()) for t in thresholds])
    if tuple(thresholds.shape) not in ((num_heads,), (num_layers, num_heads)):
        raise ValueError(
            f"thresholds must have shape [{num_heads}] or [{num_layers}, {num_heads}] (heads, or layers and heads), "
            f"got {list(thresholds.shape)}"
        )
    return thresholds.to(device).expand(num_layers, num_heads)


def _went_through_dropout(attention: Tensor) -> bool:
    """Rows that do not sum to one and have exact zeros among the keys up to the diagonal, which causal masks leave."""
    if torch.compiler.is_compiling() or attention.shape[-1] != attention.shape[-2]:
        return False
    off = (row_sum_error(attention) > 0.05)[..., None]
    return bool((off & (attention == 0)).tril().any())


def check_logger(logger) -> None:
    """ValueError unless `send_metrics` can use it."""
    if logger is None or hasattr(logger, "add_scalar"):
        return
    try:
        inspect.signature(logger.log).bind({}, step=0)
    except (AttributeError, TypeError):
        raise ValueError(
            "logger needs wandb's .log(dict, step=) or TensorBoard's .add_scalar(tag, value, step), or be None; got "
            f"{type(logger).__name__}"
        ) from None
    except ValueError:  # a method without a signature, of an extension
        return


def send_metrics(metrics: dict[str, float], step: int, logger) -> None:
    """Log numbers of a training step to a logger that `check_logger` lets through."""
    if hasattr(logger, "add_scalar"):
        for key, value in metrics.items():
            logger.add_scalar(key, value, step)
    elif logger is not None:
        logger.log(metrics, step=step)
