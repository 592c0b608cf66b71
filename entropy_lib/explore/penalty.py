"""Explorer of the entropy penalty: which heads of a recorded run, or of real rows, it would push, where, how hard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from plotly.colors import sample_colorscale
from torch import Tensor
from traitlets import Bool, Dict, Enum, Float, Int, List, TraitError, Unicode, observe, validate

from entropy_lib.entropy import entropy_from_logits, head_entropies, max_entropy
from entropy_lib.explore.attention_logits import AttentionLogits, read_logits
from entropy_lib.explore.figures import COLLAPSE, HEALTHY, OVERLOAD, penalty_curve
from entropy_lib.explore.module import ModuleExplorer, in_planes, module_source, zipped
from entropy_lib.explore.recorded_runs import folder_of, recorded, run_name
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.training.records import RunRecord

POINTS = 161  # of the curves
ROOM = 262_000  # of the page without a kernel: characters of its runs, each zipped by itself
REAL = "real rows"  # a group of the list
STATES = {"below": COLLAPSE, "inside": HEALTHY, "above": OVERLOAD}


def penalty_explorer(
    record: RunRecord | AttentionLogits | Sequence[RunRecord | AttentionLogits] | None = None,
) -> PenaltyExplorer:
    """The penalty of `EntropyRegularization` on the heads of recorded runs, by θ, γ, λ, T, ceiling, per, reduction.

    Args:
        record: a run record, causal attention logits, or several of either to choose from; None for the records in
            data/runs and the logits of `read_logits`.

    Every dot is a head at its mean entropy E in nats, under one threshold θ for all or each under its own learned one.
    A record does not hold the rows of a head: they are taken at one share of what each can reach,
    E_i = E · log(i+1) / mean_i log(i+1). Logits have real rows, so that no assumption is made, and no curve goes
    through the dots with per="query": heads of one E pay differently. With per="head" rows make no difference. T is
    the `context_size` in E_max = log T. The gradient is d(loss)/dE of one head whose rows all grow in proportion,
    dE_i/dE = E_i/E (what each can reach where E = 0), the loss being the mean over all heads for one sequence: where
    layers differ in softmax heads that panel weighs heads alike, the loss in words weighs layers alike, as the library
    does. Static heads have no entropy and no share in it. Click a head, or move through the map by the arrow keys, to
    read its numbers; a click and Enter show it in the page's run explorer too. Raises ValueError where there is no
    record of a model with a softmax, and for logits that are not causal.
    """
    given = recorded([record] if isinstance(record, AttentionLogits) else record)
    records = [r for r in given if isinstance(r, AttentionLogits) or not head_entropies(r.entropy).isnan().all()]
    if not records:
        raise ValueError("no head of these records has a softmax, so there is no entropy to penalise")
    if record is None:
        records.append(read_logits())
    explorer = PenaltyExplorer(records)
    if isinstance(first := records[0], RunRecord):  # the controls start as the first run was trained
        explorer.gamma = first.recipe.get("tolerance_margin_factor", 0.2)
        explorer.weight = first.recipe.get("loss_coeff") or 1e-5  # of a run without a penalty too
    explorer.context = explorer.length
    return explorer


class PenaltyExplorer(ModuleExplorer):
    """See `penalty_explorer`. Traits: run (index), theta, gamma, weight (λ), context (T), ceiling, per, reduction, own.

    With `own` each head has the threshold that it learned, if the run learned any. `selected` is [layer, head] of one
    with a softmax, or empty; a run without that head empties it. What the module shows is here by torch: `heads`,
    `loss`, `words`.
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
    selected = List(Int()).tag(sync=True, state=True)
    colors = List(Unicode(), sample_colorscale("Cividis", 64)).tag(sync=True, state=True)

    def __init__(self, records: Sequence[RunRecord | AttentionLogits]):
        self.records, self._rows = list(records), [_rows(record) for record in records]
        super().__init__(runs=[_for_page(*pair) for pair in zip(self.records, self._rows, strict=True)])

    @validate("run")
    def _one_of_them(self, proposal):
        if proposal["value"] >= len(self.runs):
            raise TraitError(f"run is an index of {len(self.runs)} records")
        return proposal["value"]

    @validate("selected")
    def _a_head(self, proposal):
        if proposal["value"] and not self._has(proposal["value"]):
            raise TraitError(f"selected is [layer, head] of a head with a softmax, or empty; got {proposal['value']}")
        return proposal["value"]

    @observe("run")
    def _unselect(self, change):
        if self.selected and not self._has(self.selected):
            self.selected = []

    def _has(self, place: list[int]) -> bool:
        return place in (~self.entropy.isnan()).nonzero().tolist()

    def state(self) -> dict:
        """Without a kernel, up to `ROOM`: the run that is shown, real rows, each model's first seed, and others."""
        kept, room, pairs = [], ROOM, zip(self.runs, self.records, strict=True)
        models = [(run["group"], getattr(record, "variant", run["name"])) for run, record in pairs]
        firsts = {model: n for n, model in reversed([*enumerate(models)])}
        real = [n for n, rows in enumerate(self._rows) if rows is not None]
        for n in dict.fromkeys([self.run, *real, *sorted(firsts.values()), *range(len(self.runs))]):
            room -= len(zipped(self.runs[n]))
            if room < 0 and n != self.run:
                break
            kept.append(n)
        kept.sort()
        return super().state() | {"runs": [self.runs[n] for n in kept], "run": kept.index(self.run)}

    @property
    def record(self) -> RunRecord | AttentionLogits:
        return self.records[self.run]

    @property
    def rows(self) -> Tensor | None:
        """Entropies of real rows, [layers, heads, T] in nats, None for a recorded run."""
        return self._rows[self.run]

    @property
    def length(self) -> int:
        """T of the run's rows."""
        return self.runs[self.run]["context_length"]

    @property
    def entropy(self) -> Tensor:
        """Mean entropies of the run's heads, [layers, heads] in nats, NaN for static ones."""
        return head_entropies(self.record.entropy) if self.rows is None else self.rows.mean(-1)

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
        rows = [layer[~layer.isnan().any(-1)] for layer in self.entropy[..., None] * self._shares]  # static come last
        thresholds = self.thresholds()[:, : max(map(len, rows))]
        return self.regularization()([layer[None] for layer in rows], thresholds).item()

    def heads(self) -> dict[str, Tensor]:
        """Of the softmax heads: entropy, penalty (each head's own), gradient of the loss for its entropy, and state.

        All [n], in the order of layers and heads; state is 0 below the band, 1 inside, 2 above.
        """
        real = ~self.entropy.isnan()
        entropy, theta = self.entropy[real], self.thresholds()[real]
        penalty, gradient = self._alone(entropy, theta, self._shares.expand(*real.shape, -1)[real])
        deviation, margin = entropy - theta * self._top, self.gamma * self._top
        state = 1 + (deviation > margin).int() - (deviation < -margin).int()
        return {"entropy": entropy, "penalty": penalty, "gradient": gradient / len(entropy), "state": state}

    def words(self) -> str:
        """What the explorer says of the run."""
        counts = torch.bincount(self.heads()["state"], minlength=3).tolist()
        words = " · ".join(f"{count} {name}" for count, name in zip(counts, STATES, strict=True))
        words += f" · penalty {self.loss():.3g}"
        if loss := self.runs[self.run]["eval_loss"]:
            words += f", {100 * self.loss() / loss:.2g}% of this run’s loss of {loss:.3g}"
        return "\n".join([words + " nats", *self._told()])

    def _told(self) -> list[str]:
        """A line on the head that is selected, if one is."""
        if not self.selected:
            return []
        heads, place = self.heads(), (~self.entropy.isnan()).nonzero().tolist().index(self.selected)
        nats, penalty, slope = (heads[name][place].item() + 0.0 for name in ("entropy", "penalty", "gradient"))  # no -0
        return [
            f"layer {self.selected[0]}, head {self.selected[1]}: {nats:.3g} nats, penalty {penalty:.3g} nats, "
            f"slope {slope:.3g} nats per nat"
        ]

    def still(self):
        """Penalty and gradient of every head under one θ, as a figure."""
        reach, one_curve = self._reach, self.rows is None or self.per == "head"
        grid = torch.linspace(0, reach.mean(), POINTS if one_curve else 1, dtype=torch.float64)
        curves = self._alone(grid, torch.full_like(grid, self.theta), (reach / reach.mean()).expand(len(grid), -1))
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

    def _alone(self, entropy: Tensor, theta: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """What one head adds and d(that)/dE, for each of [n] heads on its own, with shares [n, T]: [n], [n]."""
        regularization = self.regularization()

        def one(mean: Tensor, theta: Tensor, shares: Tensor) -> Tensor:
            return regularization([(mean * shares)[None, None]], theta[None])

        gradient, penalty = torch.func.vmap(torch.func.grad_and_value(one))(entropy, theta, shares)
        return penalty, gradient

    @property
    def _top(self) -> float:
        return self._reach.mean().item() if self.ceiling == "causal" else math.log(self.context)

    @property
    def _reach(self) -> Tensor:
        return max_entropy(self.length, causal=True, dtype=torch.float64)

    @property
    def _shares(self) -> Tensor:
        """What rows have of their head's mean entropy: [T], assumed alike for all, or real, [layers, heads, T]."""
        assumed = self._reach / self._reach.mean()
        if self.rows is None:
            return assumed
        mean = self.rows.mean(-1, keepdim=True)
        return torch.where(mean > 0, self.rows / mean, assumed)


def learned_thresholds(record: RunRecord | AttentionLogits) -> Tensor | None:
    """θ [layers, heads] at the end of a run, None where none were learned."""
    if isinstance(record, AttentionLogits) or not record.variant.startswith("EReg") or record.history is None:
        return None
    return head_entropies(np.stack(record.history["thresholds"].iloc[-1]))


def _rows(record: RunRecord | AttentionLogits) -> Tensor | None:
    """Entropies of the rows of logits, [layers, heads, T] in nats, as the page has them; None of a record."""
    if isinstance(record, RunRecord):
        return None
    if not record.causal or len(record.tokens) < 2:
        raise ValueError(
            "real rows are those of causal attention to two tokens or more, logits [layers, heads, T, T]; "
            f"got {list(record.logits.shape)}" + ", not causal" * (not record.causal)
        )
    return entropy_from_logits(record.logits.double()).float().double()


def _for_page(record: RunRecord | AttentionLogits, rows: Tensor | None) -> dict:
    """What the module needs of a run or of real rows; numbers of heads as float32 in planes."""

    def packed(numbers: Tensor | None) -> str | None:
        return None if numbers is None else in_planes(numbers.numpy().astype("<f4"))

    real = rows is not None
    entropy = rows.mean(-1) if real else head_entropies(record.entropy)
    return {
        "name": f"{record.origin}: {len(record.tokens)} tokens" if real else run_name(record),
        "group": REAL if real else folder_of(record),
        "layers": entropy.shape[0],
        "heads": entropy.shape[1],
        "context_length": len(record.tokens) if real else record.context_length,
        "eval_loss": None if real else record.eval_loss,
        "entropy": None if real else packed(entropy),
        "rows": packed(rows),
        "thresholds": packed(learned_thresholds(record)),
    }
