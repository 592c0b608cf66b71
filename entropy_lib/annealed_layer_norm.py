"""LayerNorm that turns into a constant during training, so that inference has nothing but a linear map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RATE = 0.02  # of the running mean that becomes the constant, a training step


class AnnealedLayerNorm(nn.Module):
    """w ⊙ (x − mean(x))·((1−A)/std(x) + A·k) + b: LayerNorm at A = 0, linear in x at A = 1.

    k is the running geometric mean of 1/std over real training rows, which stands still once A is 1. The penalty
    mean(log²(k·std)), added to the training loss, keeps the rows' scale where k suits them. (By fine-tuning: arXiv
    2507.02559, "Transformers Don't Need LayerNorm at Inference Time"; by a gate: TaperNorm, arXiv 2602.10408.)

    Buffers, saved with the model: `blend` A, `log_scale` log k, `seen` whether a step has set it.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self._make_buffers()

    def _make_buffers(self) -> None:
        for name in ("blend", "log_scale", "seen"):  # [1]: compiled code loses what is added to a float64 scalar
            self.register_buffer(name, torch.zeros(1))
        # of the passes since `anneal`: sum of their means of log(1/std), and how many (checkpointing counts all twice)
        self.register_buffer("_log_sum", torch.zeros(1), persistent=False)
        self.register_buffer("_passes", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] -> the same, and the penalty, a scalar."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            scaled, penalty = self._scaled(wide - wide.mean(-1, keepdim=True))
            return (scaled * self.weight + self.bias).to(x.dtype), penalty

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x·((1−A)/rms(x) + A·k), and the penalty."""
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        log_inverse = inverse.log()
        of_batch = log_inverse.detach().mean()
        if self.training:
            self._log_sum.add_(of_batch)
            self._passes.add_(1)
        log_scale = torch.where(self.seen > 0, self.log_scale, of_batch)
        penalty = (log_inverse - log_scale).square().mean()
        return x * ((1 - self.blend) * inverse + self.blend * log_scale.exp()), penalty

    @torch.no_grad()
    def anneal(self, blend: float) -> None:
        """After a training step: move k towards what its passes had, the less the larger A is, and set A.

        A step whose passes were not finite, which the trainer skips, moves nothing.
        """
        mean = self._log_sum / self._passes.clamp(min=1)
        counts = (self._passes > 0) & mean.isfinite()
        step = torch.where(self.seen > 0, RATE * (1 - self.blend), 1.0)
        self.log_scale.add_(torch.where(counts, step * (mean - self.log_scale), 0.0))
        self.seen.copy_(torch.maximum(self.seen, counts.to(self.seen.dtype)))
        self.blend.fill_(blend)
        self._log_sum.zero_()
        self._passes.zero_()

    def folded_into(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [d, out] and bias of the next x·W + b that do this norm's work as well.

        Centring, k·w and b go into them. Raises ValueError if A is not 1.
        """
        if self.blend != 1:
            raise ValueError(f"a LayerNorm at blend {float(self.blend):g} is not linear yet: train it to the end")
        scaled = (self.log_scale.exp() * self.weight)[:, None] * weight
        return scaled - scaled.mean(0, keepdim=True), bias + self.bias @ weight


def anneal(model: nn.Module, blend: float, summed: Callable[[Tensor], Tensor] | None = None) -> None:
    """After a training step: the constants of a model's annealed norms move on, and `blend` of each is constant.

    `summed` adds a tensor up over the processes of a step, so that all move their constants alike.
    """
    norms = [module for module in model.modules() if isinstance(module, AnnealedLayerNorm)]
    if summed is not None and norms:
        totals = summed(torch.stack([torch.cat([norm._log_sum, norm._passes]) for norm in norms]))
        for norm, (log_sum, passes) in zip(norms, totals, strict=True):
            norm._log_sum.fill_(log_sum)
            norm._passes.fill_(passes)
    for norm in norms:
        norm.anneal(blend)


class AnnealedRMSNorm(AnnealedLayerNorm):
    """The same of Llama's RMSNorm: w ⊙ x·((1−A)/rms(x) + A·k), or with `one_plus`, as in Gemma, 1 + w for w.

    A stock layer has no place for a second output: `take_penalty` gives it after the pass.
    """

    def __init__(self, width: int, eps: float, one_plus: bool = False):
        nn.Module.__init__(self)
        self.eps, self.one_plus, self.penalty = eps, one_plus, None
        self.weight = nn.Parameter(torch.zeros(width) if one_plus else torch.ones(width))
        self._make_buffers()

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> the same."""
        with torch.autocast(x.device.type, enabled=False):
            scaled, penalty = self._scaled(x if x.dtype == torch.float64 else x.float())
            self.penalty = penalty if self.training else None
            return (scaled * self.gain).to(x.dtype)

    def take_penalty(self) -> Tensor:
        """The last training pass's penalty, which is not kept: a module with a graph in it cannot be copied."""
        penalty, self.penalty = self.penalty, None
        return penalty

    @property
    def gain(self) -> Tensor:
        return 1 + self.weight if self.one_plus else self.weight

    def constant(self) -> Tensor:
        """k·w [d], what is left of the norm. Raises ValueError if A is not 1."""
        if self.blend != 1:
            raise ValueError(f"an RMSNorm at blend {float(self.blend):g} is not linear yet: train it to the end")
        return self.log_scale.exp() * self.gain
