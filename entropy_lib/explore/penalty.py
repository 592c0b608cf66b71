"""Explorer of the entropy penalty: which heads of a recorded run it would push, which way, and how hard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from plotly.colors import sample_colorscale
from torch import Tensor
from traitlets import Bool, Dict, Enum, Float, Int, List, TraitError, Unicode, validate

from entropy_lib.entropy import head_entropies, max_entropy
from entropy_lib.explore.figures import COLLAPSE, HEALTHY, OVERLOAD, penalty_curve
from entropy_lib.explore.module import ModuleExplorer, in_planes, module_source, zipped
from entropy_lib.explore.recorded_runs import folder_of, recorded, run_name
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.training.records import RunRecord

POINTS = 161  # of the curves
ROOM = 200_000  # of the page without a kernel: characters of its runs, each zipped by itself
STATES = {"below": COLLAPSE, "inside": HEALTHY, "above": OVERLOAD}


def penalty_explorer(record: RunRecord | Sequence[RunRecord] | None = None) -> PenaltyExplorer:
    """The penalty of `EntropyRegularization` on the heads of recorded runs, by θ, γ, λ, T, ceiling, per, reduction.

    Args:
        record: one run record or several to choose from; None for those in data/runs.

    Every dot is a head at its mean entropy E in nats, under one threshold θ for all or each under its own learned one.
    A record does not hold the rows of a head: they are taken at one share of what each can reach,
    E_i = E · log(i+1) / mean_i log(i+1). With per="head" that makes no difference. T is the `context_size` in
    E_max = log T. The gradient is d(loss)/dE of one head, the loss being the mean over all heads for one sequence:
    where layers differ in softmax heads that panel weighs heads alike, the loss in words weighs layers alike, as the
    library does. Static heads have no entropy and no share in it. Raises ValueError where there is no record of a
    model with a softmax.
    """
    records = [record for record in recorded(record) if not head_entropies(record.entropy).isnan().all()]
    if not records:
        raise ValueError("no head of these records has a softmax, so there is no entropy to penalise")
    explorer = PenaltyExplorer(runs=[_of_run(record) for record in records])
    explorer.records = records
    first = records[0]  # the controls start as the first run was trained
    explorer.context = first.context_length
    explorer.gamma = first.recipe.get("tolerance_margin_factor", 0.2)
    explorer.weight = first.recipe.get("loss_coeff") or 1e-5  # of a run without a penalty too
    return explorer


class PenaltyExplorer(ModuleExplorer):
    """See `penalty_explorer`. Traits: run (index), theta, gamma, weight (λ), context (T), ceiling, per, reduction, own.

    With `own` each head has the threshold that it learned, if the run learned any. What the module shows is here by
    torch: `heads`, `loss`, `words`.
    """

    _esm = module_source("penalty")
    runs = List(Dict()).tag(sync=True, state=True)
    run = Int(0, min=0).tag(sync=True, state=True)
    theta = Float(0.5, min=0.0, max=1.0).tag(sync=True, state=True)
    gamma = Float(0.2, min=0.0).tag(sync=True, state=True)
    weight = Float(1e-5, min=0.0).tag(sync=True, state=True)
    context = Int(128, min=1).tag(sync=True, state=True)
    ceiling = Enum(["context", "causal"], "context").tag(sync=True, state=True)
    per = Enum(["head", "query"], "head").tag(sync=True, state=True)
    reduction = Enum(["mean", "sum"], "mean").tag(sync=True, state=True)
    own = Bool(False).tag(sync=True, state=True)
    colors = List(Unicode(), sample_colorscale("Cividis", 64)).tag(sync=True, state=True)

    @validate("run")
    def _one_of_them(self, proposal):
        if proposal["value"] >= len(self.runs):
            raise TraitError(f"run is an index of {len(self.runs)} records")
        return proposal["value"]

    def state(self) -> dict:
        """What the page has without a kernel: the run shown, the first seed of each model, and others, up to `ROOM`."""
        kept, room, pairs = [], ROOM, zip(self.runs, self.records, strict=True)
        firsts = {(run["group"], record.variant): n for n, (run, record) in reversed([*enumerate(pairs)])}
        for n in dict.fromkeys([self.run, *sorted(firsts.values()), *range(len(self.runs))]):
            room -= len(zipped(self.runs[n]))
            if room < 0 and n != self.run:
                break
            kept.append(n)
        kept.sort()
        return super().state() | {"runs": [self.runs[n] for n in kept], "run": kept.index(self.run)}

    @property
    def record(self) -> RunRecord:
        return self.records[self.run]

    @property
    def entropy(self) -> Tensor:
        """Mean entropies of the run's heads, [layers, heads] in nats, NaN for static ones."""
        return head_entropies(self.record.entropy)

    def regularization(self) -> EntropyRegularization:
        """The library's regulariser as the traits stand."""
        options = {name: getattr(self, name) for name in ("reduction", "per", "ceiling")}
        return EntropyRegularization(self.weight, self.gamma, context_size=self.context, **options)

    def thresholds(self) -> Tensor:
        """θ of every head, [layers, heads]."""
        learned = learned_thresholds(self.record) if self.own else None
        return torch.full(self.entropy.shape, self.theta, dtype=torch.float64) if learned is None else learned

    def loss(self) -> float:
        """The regularisation loss of all heads, λ included."""
        rows = [layer[~layer.isnan(), None] * self._shares for layer in self.entropy]  # [h, T] each; static come last
        thresholds = self.thresholds()[:, : max(map(len, rows))]
        return self.regularization()([layer[None] for layer in rows], thresholds).item()

    def heads(self) -> dict[str, Tensor]:
        """Of the softmax heads: entropy, penalty (each head's own), gradient of the loss for its entropy, and state.

        All [n], in the order of layers and heads; state is 0 below the band, 1 inside, 2 above.
        """
        real = ~self.entropy.isnan()
        entropy, theta = self.entropy[real], self.thresholds()[real]
        penalty, gradient = self._alone(entropy, theta)
        deviation, margin = entropy - theta * self._top, self.gamma * self._top
        state = 1 + (deviation > margin).int() - (deviation < -margin).int()
        return {"entropy": entropy, "penalty": penalty, "gradient": gradient / len(entropy), "state": state}

    def words(self) -> str:
        """What the explorer says of the run."""
        counts = torch.bincount(self.heads()["state"], minlength=3).tolist()
        words = " · ".join(f"{count} {name}" for count, name in zip(counts, STATES, strict=True))
        words += f" · penalty {self.loss():.3g}"
        if self.record.eval_loss:
            share = 100 * self.loss() / self.record.eval_loss
            words += f", {share:.2g}% of this run’s loss of {self.record.eval_loss:.3g}"
        return words + " nats"

    def still(self):
        """Penalty and gradient of every head under one θ, as a figure."""
        grid = torch.linspace(0, max_entropy(self.record.context_length, causal=True).mean(), POINTS).double()
        curves = self._alone(grid, torch.full_like(grid, self.theta))
        curves = [curves[0], curves[1] / (~self.entropy.isnan()).sum()]
        title = "The penalty pushes a head only once it has left the band"
        options = {"threshold": self.theta, "margin": self.gamma, "ceiling": self._top, "title": title}
        figure, heads = penalty_curve(grid, *curves, **options), self.heads()
        dots = {"size": 8, "color": [list(STATES.values())[state] for state in heads["state"]]}
        for column, name in ((1, "penalty"), (2, "gradient")):
            x, y = heads["entropy"].tolist(), heads[name].tolist()
            figure.add_scatter(x=x, y=y, mode="markers", marker=dots, showlegend=False, row=1, col=column)
        return figure.update_yaxes(title_text="penalty λδ² (nats)", col=1).update_yaxes(
            title_text="d loss / dE (nats per nat)", col=2
        )

    def _alone(self, entropy: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """What one head adds and d(that)/dE, for each of [n] heads on its own: [n], [n]."""
        regularization = self.regularization()

        def one(mean: Tensor, theta: Tensor) -> Tensor:
            return regularization([(mean * self._shares)[None, None]], theta[None])

        gradient, penalty = torch.func.vmap(torch.func.grad_and_value(one))(entropy, theta)
        return penalty, gradient

    @property
    def _top(self) -> float:
        causal = max_entropy(self.record.context_length, causal=True, dtype=torch.float64).mean().item()
        return causal if self.ceiling == "causal" else math.log(self.context)

    @property
    def _shares(self) -> Tensor:
        reach = max_entropy(self.record.context_length, causal=True, dtype=torch.float64)
        return reach / reach.mean()


def learned_thresholds(record: RunRecord) -> Tensor | None:
    """θ [layers, heads] at the end of a run, None where none were learned."""
    if not record.variant.startswith("EReg") or record.history is None:
        return None
    return head_entropies(np.stack(record.history["thresholds"].iloc[-1]))


def _of_run(record: RunRecord) -> dict:
    """What the module needs of a run; numbers of heads as float32 in planes."""
    entropy, thresholds = head_entropies(record.entropy), learned_thresholds(record)
    return {
        "name": run_name(record),
        "group": folder_of(record),
        "layers": entropy.shape[0],
        "heads": entropy.shape[1],
        "context_length": record.context_length,
        "eval_loss": record.eval_loss,
        "entropy": in_planes(entropy.numpy().astype("<f4")),
        "thresholds": None if thresholds is None else in_planes(thresholds.numpy().astype("<f4")),
    }
