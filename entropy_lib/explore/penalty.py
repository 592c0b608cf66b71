"""Explorer of the entropy penalty: which heads of a recorded run it would push, which way, and how hard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from entropy_lib.entropy import head_entropies, max_entropy
from entropy_lib.explore.controls import Explorer, below_inside_above, dropdown, slider
from entropy_lib.explore.figures import COLLAPSE, HEALTHY, IN_NATS, INK, OVERLOAD, go, make_subplots, mark_place
from entropy_lib.explore.recorded_runs import label, recorded
from entropy_lib.regularization import EntropyRegularization
from entropy_lib.training.records import RunRecord

POINTS = 161  # of the curves
CURVES, OUTSIDE = (3, 7), ((1, 0), (2, 2))  # traces: each curve is followed by its heads; marks on the map, their state
SYMBOLS, COLORS = ["triangle-down", "circle", "triangle-up"], [COLLAPSE, HEALTHY, OVERLOAD]  # below, inside, above


def penalty_explorer(record: RunRecord | Sequence[RunRecord] | None = None) -> PenaltyExplorer:
    """The penalty of `EntropyRegularization` on the heads of recorded runs, by θ, γ, λ, T, ceiling, per, reduction.

    Args:
        record: one run record or several to choose from; None for those in data/runs.

    Every dot is a head at its mean entropy E in nats. A record does not hold the rows of a head: they are taken at one
    share of what each can reach, E_i = E · log(i+1) / mean_i log(i+1). With per="head" that makes no difference.
    T is the `context_size` in E_max = log T. The gradient is d(loss)/dE of one head by autograd, the loss being the
    mean over all heads for one sequence: where layers differ in softmax heads that panel weighs heads alike, the loss
    in words weighs layers alike, as the library does. Static heads have no entropy and no share in it. Raises
    ValueError where there is no record of a model with a softmax.
    """
    records = [record for record in recorded(record) if not head_entropies(record.entropy).isnan().all()]
    if not records:
        raise ValueError("no head of these records has a softmax, so there is no entropy to penalise")
    return PenaltyExplorer(records)


class PenaltyExplorer(Explorer):
    """See `penalty_explorer`. Controls: run (if several), theta, gamma, lambda, T, ceiling, per, reduction."""

    def __init__(self, records: Sequence[RunRecord]):
        self._records = list(records)
        first = self._records[0]
        context, recipe = first.context_length, first.recipe  # the controls start as the first run was trained
        gamma, weight = recipe.get("tolerance_margin_factor", 0.2), recipe.get("loss_coeff", 1e-5)
        controls = {
            "theta": slider("theta", "threshold θ", 0.5, 0.0, 1.0, 0.01, tip="middle of the band, a share of E_max"),
            "gamma": slider("gamma", "margin γ", gamma, 0.0, 0.5, 0.01, tip="half the width of the band, of E_max"),
            "lambda": slider("lambda", "weight λ", weight, 1e-7, 1.0, 0.1, log=True, form=".1e", tip="of the loss"),
            "T": slider("T", "context length T", context, 8, max(1024, context), 8, tip="E_max is log T"),
            "ceiling": dropdown("ceiling", "ceiling", [("log T (paper)", "context"), ("log of seen keys", "causal")]),
            "per": dropdown("per", "per", [("head (Algorithm 1)", "head"), ("query (published code)", "query")]),
            "reduction": dropdown("reduction", "reduction", ["mean", "sum"], tip="over the rows of a head"),
        }
        rows = [["theta", "gamma"], ["lambda", "T"], ["ceiling", "per", "reduction"]]
        if len(self._records) > 1:
            runs = [(label(record), index) for index, record in enumerate(self._records)]
            controls["run"] = dropdown("run", "recorded run", runs)
            rows.insert(0, ["run"])
        self._load(0)
        self._states = np.empty(0, int)
        super().__init__(_figure(), controls, rows)

    def _load(self, index: int) -> None:
        self.record = self._records[index]
        self.entropy = head_entropies(self.record.entropy)  # [L, H], NaN for static heads
        reach = max_entropy(self.record.context_length, causal=True, dtype=torch.float64)  # [T]
        self._shape_of_rows, self._reach = reach / reach.mean(), reach.mean().item()

    def regularization(self) -> EntropyRegularization:
        """The library's regulariser as the controls stand."""
        value = {name: control.value for name, control in self.controls.items()}
        options = {name: value[name] for name in ("reduction", "per", "ceiling")}
        return EntropyRegularization(value["lambda"], value["gamma"], context_size=value["T"], **options)

    def loss(self, entropy: Tensor) -> Tensor:
        """The regularisation loss of heads with mean entropies [L, H] in nats, NaN for static ones, a scalar."""
        rows = [layer[~layer.isnan(), None] * self._shape_of_rows for layer in entropy]  # [h, T] each
        return self.regularization()([layer[None] for layer in rows], self._thresholds(len(rows), max(map(len, rows))))

    def _thresholds(self, *shape: int) -> Tensor:
        return torch.full(shape, self.controls["theta"].value, dtype=torch.float64)

    def _alone(self, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """What one head adds and d(that)/dE, for each of [n] heads on its own: [n], [n]."""
        regularization, theta = self.regularization(), self._thresholds(1)

        def one(mean: Tensor) -> Tensor:
            return regularization([(mean * self._shape_of_rows)[None, None]], theta)

        gradient, penalty = torch.func.vmap(torch.func.grad_and_value(one))(entropy)
        return penalty, gradient

    def draw(self, changed: str | None) -> None:
        if changed == "run":
            self._load(self.controls["run"].value)
        value = {name: control.value for name, control in self.controls.items()}
        causal = value["ceiling"] == "causal"
        self.controls["T"].disabled = causal  # not used then
        self.controls["reduction"].disabled = value["per"] == "head"
        ceiling = self._reach if causal else math.log(value["T"])
        low, high = (value["theta"] - value["gamma"]) * ceiling, (value["theta"] + value["gamma"]) * ceiling
        heads = self.entropy[~self.entropy.isnan()]
        edges = [edge + nudge for edge in (low, high) for nudge in (-1e-9, 1e-9) if 0 < edge < self._reach]
        grid = torch.linspace(0, self._reach, POINTS, dtype=torch.float64)
        grid = torch.cat([grid, torch.tensor(edges, dtype=torch.float64)]).sort().values
        penalty, gradient = self._alone(torch.cat([heads, grid]))
        gradient = gradient / heads.numel()  # the loss is the mean over all heads
        deviation, margin = heads - value["theta"] * ceiling, value["gamma"] * ceiling
        states = (1 + (deviation > margin).int() - (deviation < -margin).int()).numpy()  # 0 below, 1 inside, 2 above
        if changed in (None, "run"):
            self._draw_run()
        if changed in (None, "run") or (states != self._states).any():
            self._draw_states(states)
        self._draw_band(low, high, ceiling)
        n, data, layout = heads.numel(), self.figure.data, self.figure.layout
        for curve, y in ((CURVES[0], penalty.numpy()), (CURVES[1], gradient.numpy())):
            data[curve].x, data[curve].y = grid.numpy(), y[n:]
            for state in range(3):
                data[curve + 1 + state].y = y[:n][states == state]
        top = max(penalty.max().item(), 1e-12)
        layout.yaxis2.range = [-0.06 * top, 1.12 * top]
        top = max(gradient.abs().max().item(), 1e-12)
        layout.yaxis3.range = [-1.12 * top, 1.12 * top]
        counts = np.bincount(states, minlength=3)
        total = self.loss(self.entropy).item()
        words = f"{below_inside_above(*counts)} · penalty <b>{total:.3g}</b>"
        if self.record.eval_loss:
            words += f", {100 * total / self.record.eval_loss:.2g}% of this run’s loss of {self.record.eval_loss:.3g}"
        self.say(words + " nats")

    def _draw_run(self) -> None:
        layers, heads = self.entropy.shape
        top, data, layout = math.log(self.record.context_length), self.figure.data, self.figure.layout
        data[0].z, data[0].zmax = self.entropy.numpy(), top
        ticks = [*range(math.ceil(top - 0.35)), top]
        data[0].colorbar.update(tickvals=ticks, ticktext=[*map(str, ticks[:-1]), f"{top:.2f}"])
        layout.xaxis.dtick, layout.yaxis.dtick = (1 if n <= 8 else 2 for n in (heads, layers))
        layout.xaxis.range, layout.yaxis.range = [-0.5, heads - 0.5], [layers - 0.5, -0.5]
        layout.shapes[3].update(x0=self._reach, x1=self._reach)
        layout.annotations[3].x = self._reach

    def _draw_states(self, states: np.ndarray) -> None:
        places = (~self.entropy.isnan()).nonzero().int().numpy()
        self._states, data, entropy = states, self.figure.data, self.entropy[tuple(places.T)].numpy()
        for state in range(3):
            those = states == state
            for curve in CURVES:
                data[curve + 1 + state].x, data[curve + 1 + state].customdata = entropy[those], places[those]
        for trace, state in OUTSIDE:
            data[trace].y, data[trace].x = places[states == state].T

    def _draw_band(self, low: float, high: float, ceiling: float) -> None:
        layout = self.figure.layout
        end = max(ceiling, self._reach) * 1.02
        low, high = (min(max(edge, 0), end) for edge in (low, high))
        below, above, middle, _ = layout.shapes
        below.x1, above.x0, above.x1 = low, high, end
        middle.x0 = middle.x1 = self.controls["theta"].value * ceiling
        collapse, overload, theta, *_ = layout.annotations
        collapse.x, collapse.text = low / 2, "<b>collapse</b>" if low > 0.13 * end else ""
        overload.x, overload.text = (high + end) / 2, "<b>overload</b>" if end - high > 0.13 * end else ""
        theta.x = self.controls["theta"].value * ceiling
        layout.xaxis2.range = layout.xaxis3.range = [0, end]


def _figure() -> go.Figure:
    """Traces: 0 heatmap, 1 and 2 its heads below and above, 3 penalty curve, 4 to 6 heads by state, 7 gradient curve,
    8 to 10 heads by state. (One trace with a list of symbols would take plotly 30 ms more to check at every change.)

    Shapes: collapse band, overload band, θ and the reach of a head, through both right panels: each moves as one.
    """
    specs = [[{"rowspan": 2}, {}], [None, {}]]
    gaps = {"column_widths": [0.4, 0.6], "horizontal_spacing": 0.15, "vertical_spacing": 0.1}
    figure = make_subplots(2, 2, specs=specs, **gaps)
    bar = {"title": IN_NATS, "thickness": 10, "outlinewidth": 0, "x": 0.344, "len": 1.04}
    hover = "layer %{y}, head %{x}<br>%{z:.3g} nats<extra></extra>"
    figure.add_heatmap(z=[[0]], zmin=0, zmax=1, colorscale="Cividis", colorbar=bar, xgap=2, ygap=2, hovertemplate=hover)
    rim = {"size": 8, "line": {"color": "#000001", "width": 1}}  # white with this rim is seen on every cell
    for _, state in OUTSIDE:
        marker = {**rim, "color": "#FFFFFF", "symbol": SYMBOLS[state]}
        figure.add_scatter(mode="markers", marker=marker, hoverinfo="skip", row=1, col=1)
    hovers = ["%{x:.3g} nats<br>penalty %{y:.3g}", "%{x:.3g} nats<br>gradient %{y:.3g} a nat"]
    for cell, words in enumerate(hovers, start=1):
        line = {"color": INK, "width": 1.5}
        figure.add_scatter(mode="lines", line=line, hoverinfo="skip", row=cell, col=2)
        hover = f"layer %{{customdata[0]}}, head %{{customdata[1]}}<br>{words}<extra></extra>"
        for symbol, color in zip(SYMBOLS, COLORS, strict=True):
            # opaque: a page composes see-through elements one by one
            dots = {"size": 8, "line": {"width": 0}, "symbol": symbol, "color": color}
            figure.add_scatter(mode="markers", marker=dots, hovertemplate=hover, row=cell, col=2)
    where = {"row": 1, "col": 2}
    for name, color in (("collapse", COLLAPSE), ("overload", OVERLOAD)):
        mark_place(figure, "x", 0, name, 1, color, **where)
    mark_place(figure, "x", 0, "θ", **where)
    mark_place(figure, "x", 0, "uniform", **where)
    figure.update_shapes(yref="paper", y0=0, y1=1)
    figure.layout.annotations[3].update(yref="y3 domain", y=0, yanchor="bottom")
    bare = {"showline": False, "showgrid": False, "ticks": "", "row": 1, "col": 1}
    figure.update_xaxes(title_text="head", **bare).update_yaxes(title_text="layer", **bare)
    figure.update_yaxes(exponentformat="power", nticks=5, zeroline=False, col=2)
    for axis, words in ((2, "penalty λδ² (nats)"), (3, "d loss / dE (nats per nat)")):
        heading = {"x": 0, "y": 1, "xref": f"x{axis} domain", "yref": f"y{axis} domain", "showarrow": False}
        figure.add_annotation(text=words, xanchor="left", yanchor="bottom", **heading)
    figure.update_xaxes(showticklabels=False, row=1, col=2)
    figure.update_xaxes(title_text="mean entropy of the head (nats)", row=2, col=2)
    title = "<b>The penalty pushes a head only once it has left the band</b>"
    margin = {"l": 48, "r": 12, "t": 56, "b": 48}
    return figure.update_layout(title_text=title, height=470, margin=margin, showlegend=False)
