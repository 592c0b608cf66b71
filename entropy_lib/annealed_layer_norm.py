"""LayerNorm that turns into a constant during training, so that inference has nothing but a linear map."""

from __future__ import annotations

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
        for name in ("blend", "log_scale", "seen"):  # [1]: compiled code loses what is added to a float64 scalar
            self.register_buffer(name, torch.zeros(1))
        # of the passes since `anneal`: sum of their means of log(1/std), and how many (checkpointing counts all twice)
        self.register_buffer("_log_sum", torch.zeros(1), persistent=False)
        self.register_buffer("_passes", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] -> the same, and the penalty, a scalar."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            centred = wide - wide.mean(-1, keepdim=True)
            inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
            log_inverse = inverse_std.log()
            of_batch = log_inverse.detach().mean()
            if self.training:
                self._log_sum.add_(of_batch)
                self._passes.add_(1)
            log_scale = torch.where(self.seen > 0, self.log_scale, of_batch)
            penalty = (log_inverse - log_scale).square().mean()
            scale = (1 - self.blend) * inverse_std + self.blend * log_scale.exp()
            return (centred * scale * self.weight + self.bias).to(x.dtype), penalty

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
