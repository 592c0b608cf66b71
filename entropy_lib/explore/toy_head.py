"""The tug of war: gradient descent on one toy head's entropy and on its threshold, pulling at each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from traitlets import Enum, Float, List, TraitError, validate

from entropy_lib.entropy import entropy_from_logits
from entropy_lib.explore.module import ModuleExplorer, module_source
from entropy_lib.regularization import EntropyRegularization

SHARP = [[4.0, 0.5, 0.0, -0.5, -1.0, -1.0, -0.5, 0.0], [0.0, 3.0, -1.0, 0.5, -0.5, -1.5, 0.0, 1.0],
         [0.4, 0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.0]]  # fmt: skip


def tug_of_war(logits: Sequence[Sequence[float]] = SHARP, theta: float = 0.8, gamma: float = 0.1) -> TugOfWar:
    """One head under the entropy penalty alone: who moves, its entropy or its threshold?

    Args:
        logits: [queries][keys], one to four queries, two keys or more; every query sees all keys.
        theta, gamma: the threshold θ at the start and the margin γ, shares of log(keys).

    "Let go" does gradient descent on the penalty of `EntropyRegularization` (λ = 1, mean over queries), on the logits
    and on θ with the same step size. Raises ValueError for logits of another shape and shares out of range.
    """
    rows = torch.as_tensor(logits, dtype=torch.float64)
    if rows.ndim != 2 or not 1 <= rows.shape[0] <= 4 or rows.shape[1] < 2 or not rows.isfinite().all():
        raise ValueError(f"logits must be finite, [1 to 4 queries][2 or more keys], got shape {list(rows.shape)}")
    try:
        return TugOfWar(logits=rows.tolist(), theta=theta, gamma=gamma)
    except TraitError as error:
        raise ValueError(f"expected θ of 0 to 1 and γ of 0 to 0.5, got {theta!r} and {gamma!r}") from error


class TugOfWar(ModuleExplorer):
    """See `tug_of_war`. Traits: logits, theta, gamma, rate (step size), per; `step` is the module's step, by torch."""

    _esm = module_source("toy_head")
    logits = List(List(Float())).tag(sync=True, state=True)
    theta = Float(0.8, min=0.0, max=1.0).tag(sync=True, state=True)
    gamma = Float(0.1, min=0.0, max=0.5).tag(sync=True, state=True)
    rate = Float(0.004, min=0.0).tag(sync=True, state=True)
    per = Enum(["head", "query"], "head").tag(sync=True, state=True)

    @validate("logits")
    def _finite(self, proposal):
        if not all(math.isfinite(z) for row in proposal["value"] for z in row):
            raise TraitError("logits must be finite")
        return proposal["value"]

    def penalty(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The penalty as the traits stand, and by autograd its gradients for the logits [queries, keys] and for θ."""
        logits = torch.tensor(self.logits, dtype=torch.float64, requires_grad=True)
        theta = torch.tensor([self.theta], dtype=torch.float64, requires_grad=True)
        regularization = EntropyRegularization(1.0, self.gamma, logits.shape[1], reduction="mean", per=self.per)
        loss = regularization([entropy_from_logits(logits)[None, None]], theta)
        return loss.detach(), *torch.autograd.grad(loss, [logits, theta])

    def step(self, count: int = 1) -> None:
        """`count` steps of gradient descent on the logits and on θ, which stays within 0 to 1."""
        for _ in range(count):
            _, for_logits, for_theta = self.penalty()
            self.logits = (torch.tensor(self.logits, dtype=torch.float64) - self.rate * for_logits).tolist()
            self.theta = min(1.0, max(0.0, self.theta - self.rate * for_theta.item()))
