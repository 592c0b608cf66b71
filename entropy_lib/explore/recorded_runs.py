"""Explorer of recorded runs: two of them side by side at any training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from entropy_lib.clone import CLONE
from entropy_lib.entropy import diagnose, entropy_bands
from entropy_lib.explore.controls import Explorer, coloured, dropdown, legible, row, slider, widgets
from entropy_lib.explore.figures import (
    BANDS,
    COLLAPSE,
    HEALTHY,
    IN_NATS,
    INK,
    OVERLOAD,
    VARIANT_COLORS,
    go,
    make_subplots,
    sample_colorscale,
)
from entropy_lib.training.records import RunRecord, load_runs

RUNS = CLONE / "data" / "runs" if CLONE else Path(__file__).with_name("example_runs")
SIDES = ("left", "right")
SYMBOLS = {"thresholds": "θ", "temperatures": "t", "alpha": "α", "beta": "β"}  # of a history's columns
HEADS, BARS, LEARNED, LOSS, LAYERS = 0, 2, 6, 8, 10  # first trace of each kind; the left run's, then the right one's
DASHES = ["solid", "4px,2px"]  # of the left run and the right one: told apart without their colours


def recorded(records: RunRecord | Sequence[RunRecord] | None) -> list[RunRecord]:
    """Records as a list; None for those in data/runs, Table 3 first and in every folder collapsed runs last."""
    if records is None:
        records = load_runs(RUNS)
        records.sort(key=lambda r: (r.path.parent != RUNS / "table3", r.path.parent, _rank(r)))
    records = [records] if isinstance(records, RunRecord) else list(records)
    if not records:
        raise ValueError("no run records to explore")
    return records


def _rank(record: RunRecord) -> tuple:
    return record.status == "collapsed", record.seed, record.variant


def label(record: RunRecord) -> str:
    """A run's name in a list: `run_name`, and its folder in data/runs or size and corpus."""
    return f"{run_name(record)} ({folder_of(record)})"


def run_name(record: RunRecord) -> str:
    """Variant, seed, tokens, and how it ended if badly."""
    words = f"{record.variant}, seed {record.seed}, {record.tokens / 1e6:.3g}M tokens"
    return words + ", collapsed" * (record.status == "collapsed")


def folder_of(record: RunRecord) -> str:
    """Where a record is, in data/runs, or its size and corpus."""
    inside = record.path is not None and RUNS in record.path.parents
    return record.path.parent.relative_to(RUNS).as_posix() if inside else f"{record.size}, {record.corpus}"


def _story(records: list[RunRecord]) -> tuple[int, int]:
    """Indices of two runs that part ways: the model whose heads overload and the same with temperature and penalty.

    The first that were trained alike; where there are none, the first two records.
    """
    for left, record in enumerate(records):
        for right, other in enumerate(records):
            alike = (record.corpus, record.seed, record.tokens) == (other.corpus, other.seed, other.tokens)
            if alike and (record.variant, other.variant) == ("SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)"):
                return left, right
    return 0, min(1, len(records) - 1)


def run_explorer(records: RunRecord | Sequence[RunRecord] | None = None) -> RunExplorer:
    """Two recorded runs at one training step: head entropies, layer curves, bands, loss, and what they learned.

    Args:
        records: run records (None for those in data/runs). Two runs are compared at the same step; where a run has no
            record of it, at its last one before.

    Entropies are those of the training batch, in nats; θ and t are means over the heads of a layer. Raises ValueError
    where there is no record.
    """
    return RunExplorer(recorded(records))


class RunExplorer(Explorer):
    """See `run_explorer`. Controls: left and right (indices of runs), learned (which parameter), step, play, and
    experiment, which shortens the lists, where there are several.
    """

    def __init__(self, records: Sequence[RunRecord]):
        self._records, self._shown = list(records), {}
        names = [(label(record), index) for index, record in enumerate(self._records)]
        folders = list(dict.fromkeys(folder_of(record) for record in self._records))
        left, right = _story(self._records)
        play = widgets.Play(value=0, min=0, max=1, interval=400)
        play.add_class("entropy-play")
        controls = {
            "left": dropdown("left", "left", names, left),
            "right": dropdown("right", "right", names, right),
            "step": slider("step", "training step", 0, 0, 0, 1, width="420px"),
            "learned": dropdown("learned", "learned", [(symbol, column) for column, symbol in SYMBOLS.items()]),
        }
        self.play = play
        rows = [["left", "right"], ["step", row(play), "learned"]]
        if len(folders) > 1:
            choices = [("all", None), *((folder, folder) for folder in folders)]
            controls["experiment"] = dropdown(
                "experiment", "experiment", choices, tip="only runs of this folder of data/runs"
            )
            rows.insert(0, ["experiment"])
        super().__init__(_figure(max(len(record.entropy) for record in records)), controls, rows)
        self._link = widgets.jslink((play, "value"), (controls["step"], "value"))

    def shown(self, side: str) -> tuple[RunRecord, int]:
        """(record, row of its history) on a side, "left" or "right"."""
        record = self._records[self.controls[side].value]
        steps = record.history["step"].to_numpy()
        return record, max(int(np.searchsorted(steps, self.controls["step"].value, side="right")) - 1, 0)

    def draw(self, changed: str | None) -> None:
        if changed == "experiment":
            self._choose_from(self.controls["experiment"].value)
            changed = "left"
        if changed in (None, *SIDES):
            self._set_steps([self._records[self.controls[side].value] for side in SIDES], opening=changed is None)
        shown = {side: self.shown(side) for side in SIDES}
        if changed in (None, *SIDES):
            self._draw_curves([record for record, _ in shown.values()])
        if changed in (None, *SIDES, "learned"):
            self._draw_learned([record for record, _ in shown.values()])
        words, bands, data = [], [], self.figure.data
        for n, (side, (record, index)) in enumerate(shown.items()):
            now = record.history.iloc[index]
            entropy = np.array(now["entropy"])
            bands.append([100 * share for share in entropy_bands(entropy).tolist()])
            if self._shown.get(side) != (self.controls[side].value, index):
                self._shown[side] = (self.controls[side].value, index)
                data[HEADS + n].z = entropy
            states = {state: int(heads.sum()) for state, heads in diagnose(entropy, record.context_length).items()}
            collapsed = coloured(f"{states['collapsed']} collapsed", COLLAPSE)
            overloaded = coloured(f"{states['overloaded']} overloaded", OVERLOAD)
            text = f"<b>{record.variant}</b> at step {now['step']}: loss {now['loss']:.3f} · {collapsed} · "
            words.append(text + f"{states['healthy']} healthy · {overloaded}")
        for bar, shares in zip(data[BARS:LEARNED], zip(*bands, strict=True), strict=True):
            bar.x = shares
        for cursor in self.figure.layout.shapes:
            cursor.update(x0=self.controls["step"].value, x1=self.controls["step"].value)
        self.say("<br>".join(words))

    def _choose_from(self, folder: str | None) -> None:
        chosen = [i for i, record in enumerate(self._records) if folder in (None, folder_of(record))]
        for side, place in zip(SIDES, _story([self._records[i] for i in chosen]), strict=True):
            self.controls[side].options = [(label(self._records[i]), i) for i in chosen]
            self.controls[side].value = chosen[place]

    def _set_steps(self, records: list[RunRecord], opening: bool) -> None:
        """The slider ends with the longer run and moves as often as the runs recorded: every key shows something."""
        steps = [record.history["step"].to_numpy() for record in records]
        last = max(int(column[-1]) for column in steps)
        stride = max(min((int(np.median(np.diff(column))) for column in steps if len(column) > 1), default=1), 1)
        step = self.controls["step"]
        value = last if step.value == step.max else min(step.value, last)  # who looks at the end stays there
        value = 0 if opening else value
        for control in (step, self.play):
            control.max, control.step, control.value = last, stride, value

    def _draw_curves(self, records: list[RunRecord]) -> None:
        """What depends on the runs, not on the step: names, axes, curves of layers and losses."""
        data, layout = self.figure.data, self.figure.layout
        top = max(math.log(record.context_length) for record in records)
        ticks = [*range(math.ceil(top - 0.35)), top]
        layout.coloraxis.cmax = top
        layout.coloraxis.colorbar.update(tickvals=ticks, ticktext=[*map(str, ticks[:-1]), f"{top:.2f}"])
        last = max(int(record.history["step"].iloc[-1]) for record in records)
        deepest = max(len(record.entropy) for record in records)
        shades = sample_colorscale("Plasma", [0.1 + 0.7 * layer / max(deepest - 1, 1) for layer in range(deepest)])
        for n, record in enumerate(records):
            layers, heads = np.array(record.entropy).shape
            color = legible(VARIANT_COLORS.get(record.variant, INK))
            layout.annotations[n].update(text=f"<b>{record.variant}</b>", font_color=color)
            layout[f"xaxis{n + 1}"].update(range=[-0.5, heads - 0.5], dtick=1 + (heads > 8))
            layout[f"yaxis{n + 1}"].update(range=[layers - 0.5, -0.5], dtick=1 + (layers > 8))
            layout[f"yaxis{n + 3}"].range = [0, top]
            steps, entropy = record.entropy_history()
            for layer, curve in enumerate(data[LAYERS + n :: 2]):  # a shallower run leaves some empty
                inside = layer < layers
                curve.update(x=steps if inside else [], y=entropy[:, layer].mean(-1) if inside else [])
                curve.line.color = shades[min(layer, deepest - 1)]
            data[LOSS + n].update(x=steps, y=record.history["loss"].to_numpy(), name=record.variant)
            data[LOSS + n].line.color = color
        for axis in ("axis3", "axis4", "axis5", "axis6"):
            layout[f"x{axis}"].range = [0, last]
        layout.annotations[3].text = f"dark: layer 0 · bright: layer {deepest - 1}"
        layout.yaxis7.ticktext = [record.variant for record in records]

    def _draw_learned(self, records: list[RunRecord]) -> None:
        """The learned parameter by layer and step, mean over heads; nothing for a run that has none."""
        column, found = self.controls["learned"].value, False
        for n, record in enumerate(records):
            rows = [(step, value) for step, value in zip(record.history["step"], record.history[column], strict=True)]
            rows = [(step, np.array(value, dtype=float)) for step, value in rows if isinstance(value, list)]
            values = np.array([value.reshape(len(value), -1).mean(-1) for _, value in rows]).reshape(
                len(rows), -1 if rows else 0
            )
            found |= bool(rows)
            layers = values.shape[1]  # one line a layer in one trace, parted by gaps
            x = [*(step for step, _ in rows), None] * layers
            y = [value for layer in values.T.tolist() for value in (*layer, None)]
            self.figure.data[LEARNED + n].update(x=x, y=y, customdata=np.repeat(range(layers), len(rows) + 1))
            self.figure.data[LEARNED + n].line.color = legible(VARIANT_COLORS.get(record.variant, INK))
        self.figure.layout.annotations[2].text = "" if found else "neither run learned it"
        self.figure.layout.yaxis5.title.text = f"learned {SYMBOLS[column]} by layer"


def _figure(layers: int) -> go.Figure:
    """Traces: two HEADS, four BARS, two LEARNED, two LOSS; LAYERS, left and right in turn, one pair a layer."""
    specs = [[{}, {}], [{}, {}], [{}, {}], [{"colspan": 2}, None]]
    gaps = {"horizontal_spacing": 0.1, "vertical_spacing": 0.085, "row_heights": [0.38, 0.24, 0.24, 0.14]}
    figure = make_subplots(4, 2, specs=specs, **gaps)
    hover = "layer %{y}, head %{x}<br>%{z:.3g} nats<extra></extra>"
    for col in (1, 2):
        look = {"coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "hovertemplate": hover}
        figure.add_heatmap(z=[[0]], **look, row=1, col=col)
        figure.add_annotation(text="", x=0, y=1, xref=f"x{col if col > 1 else ''} domain", xanchor="left",
                              yref=f"y{col if col > 1 else ''} domain", yanchor="bottom", showarrow=False)  # fmt: skip
    for name, color in BANDS.items():
        hover = "%{x:.0f}% of heads " + name + "<extra></extra>"
        look = {"marker": {"color": color, "line": {"width": 0}}, "orientation": "h", "hovertemplate": hover}
        figure.add_bar(x=[0, 0], y=[0, 1], name=name, **look, row=4, col=1)
    line = {"mode": "lines", "line": {"width": 1.3, "color": HEALTHY}, "showlegend": False}
    for n in (0, 1):
        dash = {"line": {"width": 1.3, "dash": DASHES[n]}}
        hover = "layer %{customdata}, step %{x}: %{y:.4g}<extra></extra>"
        figure.add_scatter(**{**line, **dash}, hovertemplate=hover, row=3, col=1)
    for n in (0, 1):
        dash = {"line": {"width": 2, "dash": DASHES[n]}}
        figure.add_scatter(**{**line, **dash}, hovertemplate="step %{x}: %{y:.3f}<extra></extra>", row=3, col=2)
    for layer in range(layers):
        look = {"mode": "lines", "line": {"width": 1.6}, "showlegend": False}
        hover = f"layer {layer}, step %{{x}}: %{{y:.3g}} nats<extra></extra>"
        for col in (1, 2):
            figure.add_scatter(**look, hovertemplate=hover, row=2, col=col)
    words = {"text": "", "x": 0.5, "y": 0.5, "xref": "x5 domain", "yref": "y5 domain", "showarrow": False}
    figure.add_annotation(**words)
    notes = {"x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    for axis, text in ((4, ""), (6, "solid: left run · dashed: right run")):
        figure.add_annotation(text=text, xref=f"x{axis} domain", yref=f"y{axis} domain", **notes)
    for axis in ("x3", "x4"):  # through the second and the third row
        ends = {"x0": 0, "x1": 0, "y0": figure.layout.yaxis5.domain[0], "y1": figure.layout.yaxis3.domain[1]}
        figure.add_shape(type="line", line={"color": OVERLOAD, "width": 2}, xref=axis, yref="paper", **ends)
    bare = {"showline": False, "showgrid": False, "ticks": ""}
    figure.update_xaxes(title_text="head", title_standoff=2, **bare, row=1).update_yaxes(**bare, row=1)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_yaxes(title_text="layer entropy (nats)", row=2, col=1)
    figure.update_yaxes(title_text="loss (nats)", title_standoff=4, row=3, col=2)
    figure.update_yaxes(title_standoff=4, nticks=5, row=3)
    figure.update_xaxes(showticklabels=False, row=2)  # those below it are the same
    figure.update_xaxes(title_text="training step", title_standoff=2, row=3)
    figure.update_xaxes(title_text="share of heads by quarter of the largest head entropy (%)", range=[0, 100], row=4)
    figure.update_yaxes(tickvals=[0, 1], range=[1.5, -0.5], ticks="", showgrid=False, row=4)
    bar = {"title": IN_NATS, "thickness": 10, "outlinewidth": 0, "len": 0.36, "y": 0.83}
    figure.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "colorbar": bar}, barmode="stack", bargap=0.3)
    legend = {"orientation": "h", "x": 0, "y": -0.09, "yanchor": "top", "traceorder": "normal"}
    title = "<b>What a run’s final loss hides, its heads show on the way</b>"
    margin = {"l": 156, "r": 12, "t": 64, "b": 76}  # names of variants are left of the bars
    return figure.update_layout(title_text=title, height=900, margin=margin, legend=legend)
