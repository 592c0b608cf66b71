"""Explorer of the softmax temperature: what it does to the attention and the entropy of real heads."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from entropy_lib.entropy import entropy_from_logits, log_softmax_and_softmax
from entropy_lib.explore.attention_logits import AttentionLogits, as_logits, logits_of, read_logits
from entropy_lib.explore.controls import Explorer, dropdown, keys_worth, slider, toggle
from entropy_lib.explore.figures import HEALTHY, INK, OVERLOAD, go, make_subplots, mark_place

LOW, HIGH = 0.01, 100.0  # temperatures
# Attention weights, from nothing (a clear cell on any page) to one; steeper at small weights, as their root is.
WEIGHTS = [[w, f"rgba(0,114,178,{math.sqrt(w):.3f})"] for w in (0, 0.002, 0.01, 0.04, 0.1, 0.25, 0.5, 1)]


def temperature_explorer(logits=None, *, model=None, tokenizer=None, text: str | None = None) -> TemperatureExplorer:
    """Attention softmax(z/t) of real logits z, its entropy E(t), and dE/d(log t), for a temperature by head or layer.

    Args:
        logits: [L, H, T_q, T_k] or [H, T_q, T_k], -inf where masked; an `AttentionLogits`; None for the committed
            sample (a tiny model on a few lines of Python) or for the model.
        model, tokenizer, text: a transformers decoder instead, run once on the text.

    The slope is Var(z/t) under the attention (from dE/dβ = -β·Var(z), β = 1/t), shown as a line; its dots are autograd
    through `entropy_from_logits`. ValueError for logits of another shape, and for a model without tokenizer and text.
    """
    if model is not None:
        if logits is not None or tokenizer is None or text is None:
            raise ValueError("pass logits, or a model with its tokenizer and a text")
        return TemperatureExplorer(logits_of(model, tokenizer, text))
    return TemperatureExplorer(read_logits() if logits is None else as_logits(logits))


class TemperatureExplorer(Explorer):
    """See `temperature_explorer`. Controls: layer, head, t, scope (whose t), single (one row), row.

    `temperatures` [L, H] are the heads' own, `entropy` [L, H] their mean entropies at these, in nats.
    """

    def __init__(self, sample: AttentionLogits):
        self.sample, logits = sample, sample.logits
        layers, heads, queries, _ = logits.shape
        self.temperatures = torch.ones(layers, heads)
        self.entropy = torch.stack([entropy_from_logits(layer).mean(-1) for layer in logits])
        controls = {
            "layer": slider("layer", "layer", layers // 2, 0, layers - 1, 1, width="230px"),
            "head": slider("head", "head", 0, 0, heads - 1, 1, width="230px"),
            "t": slider("t", "temperature t", 1.0, LOW, HIGH, 0.05, log=True, form=".3g", width="330px"),
            "scope": dropdown("scope", "of", [("this head", "head"), ("this layer", "layer"), ("all heads", "all")]),
            "single": toggle("single", "one row only", tip="one query's weights in place of the matrix"),
            "row": slider("row", "query i", queries - 1, 0, queries - 1, 1, width="260px"),
        }
        super().__init__(_figure(sample), controls, [["layer", "head", "single", "row"], ["t", "scope"]])

    @property
    def place(self) -> tuple[int, int]:
        """(layer, head) that is shown."""
        return self.controls["layer"].value, self.controls["head"].value

    def rows(self) -> Tensor:
        """The logits that the curve is of, [rows, T_k]: all of the head, or the one row."""
        logits = self.sample.logits[self.place]
        row = self.controls["row"].value
        return logits[row : row + 1] if self.controls["single"].value else logits

    def draw(self, changed: str | None) -> None:
        self.controls["row"].disabled = not self.controls["single"].value
        if changed in ("layer", "head"):
            self.controls["t"].value = float(self.temperatures[self.place])
        if changed in ("t", "scope"):
            self._set_temperature()
        if changed not in ("t", "scope"):
            self._draw_curves()
        temperature, rows, data = self.controls["t"].value, self.rows(), self.figure.data
        t = torch.tensor([temperature])
        by_autograd, slope = _autograd_slope(rows, t).item(), _slope(rows, t).item()
        entropy = _entropies(rows, t)
        self._draw_weights(rows, temperature)
        for dot, y in ((4, entropy.item()), (7, slope)):
            data[dot].x, data[dot].y = [temperature], [y]
        data[2].z = self.entropy.numpy()
        ceiling = _ceiling(rows)
        words = f"E = <b>{keys_worth(entropy.item())}</b>, of {ceiling:.3g} nats at most · "
        words += f"dE/d(log t) = Var(z/t) = <b>{slope:.3g}</b>, by autograd <b>{by_autograd:.3g}</b>"
        self.say(words)

    def _set_temperature(self) -> None:
        layer, head = self.place
        scope = self.controls["scope"].value
        layers = slice(None) if scope == "all" else slice(layer, layer + 1)
        heads = slice(head, head + 1) if scope == "head" else slice(None)
        self.temperatures[layers, heads] = self.controls["t"].value
        logits, t = self.sample.logits[layers, heads], self.temperatures[layers, heads]
        self.entropy[layers, heads] = entropy_from_logits(logits / t[..., None, None]).mean(-1)

    def _draw_weights(self, rows: Tensor, temperature: float) -> None:
        single, data, layout = self.controls["single"].value, self.figure.data, self.figure.layout
        _, weights = log_softmax_and_softmax(rows / temperature)
        data[0].visible, data[1].visible = not single, single
        layout.yaxis.update(title_text="attention weight" if single else "query i", tickmode="auto")
        if not single:
            data[0].z = weights.numpy()
            layout.yaxis.range = [len(rows) - 0.5, -0.5]
            layout.xaxis.update(tickmode="auto")
            return
        data[1].y = weights[0].numpy()
        layout.yaxis.range = [0, 1.03]
        best = weights[0].topk(min(4, len(weights[0]))).indices.tolist()  # as many names as fit
        kept: list[int] = []
        for key in best:
            if all(abs(key - other) > len(weights[0]) / 9 for other in kept):
                kept.append(key)
        layout.xaxis.update(tickmode="array", tickvals=kept, ticktext=[_shown(self.sample.tokens[k]) for k in kept])

    def _draw_curves(self) -> None:
        """E(t) and its slope for the head or row; fewer points where the matrix is large."""
        rows, data, layout = self.rows(), self.figure.data, self.figure.layout
        points = min(max(250_000 // rows.numel(), 17), 61)
        t = torch.logspace(math.log10(LOW), math.log10(HIGH), points)
        some, ceiling, slope = t[:: max(points // 9, 1)], _ceiling(rows), _slope(rows, t)
        data[3].x, data[3].y = t.numpy(), _entropies(rows, t).numpy()
        data[5].x, data[5].y = t.numpy(), slope.numpy()
        data[6].x, data[6].y = some.numpy(), _autograd_slope(rows, some).numpy()
        layout.yaxis2.range = [0, 1.14 * max(ceiling, 0.1)]
        layout.yaxis4.range = [0, 1.15 * max(slope.max().item(), 0.01)]
        layout.shapes[0].update(y0=ceiling, y1=ceiling)
        layout.annotations[0].update(y=ceiling, text=f"{ceiling:.3g} nats: every key the same")
        layer, head = self.place
        layout.shapes[-1].update(x0=head - 0.5, x1=head + 0.5, y0=layer - 0.5, y1=layer + 0.5)


def _entropies(rows: Tensor, t: Tensor) -> Tensor:
    """Mean entropy of softmax(z/t) over the rows: z [rows, T_k], t [n] -> [n], nats."""
    seen = rows > -math.inf  # as a mask, since the gradient of -inf/t is not finite
    tempered = rows.masked_fill(~seen, 0.0) / t[:, None, None]
    return entropy_from_logits(tempered, seen).mean(-1)


def _autograd_slope(rows: Tensor, t: Tensor) -> Tensor:
    """dE/d(log t) by autograd through the entropy: [rows, T_k], [n] -> [n]."""
    t = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_entropies(rows, t).sum(), t)
    return gradient * t.detach()


def _slope(rows: Tensor, t: Tensor) -> Tensor:
    """dE/d(log t) = Var(z/t) under softmax(z/t), mean over the rows: [rows, T_k], [n] -> [n]."""
    tempered = rows / t[:, None, None]
    _, weights = log_softmax_and_softmax(tempered)
    tempered = tempered.masked_fill(tempered == -math.inf, 0.0)
    mean = (weights * tempered).sum(-1, keepdim=True)
    return (weights * (tempered - mean).square()).sum(-1).mean(-1)


def _ceiling(rows: Tensor) -> float:
    """The largest entropy that rows of logits can reach, mean over rows: log of the keys that each sees."""
    return (rows > -math.inf).sum(-1).double().log().mean().item()


def _shown(token: str) -> str:
    """A token as a label: blanks and line ends are seen, and nothing in it is taken for HTML."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("<", "‹").replace(">", "›")


def _figure(sample: AttentionLogits) -> go.Figure:
    """Traces: 0 matrix, 1 row, 2 heads' entropies, 3-4 E(t) and its dot, 5-7 slope, autograd and its dot."""
    layers, heads, _, keys = sample.logits.shape
    gaps = {"column_widths": [0.47, 0.53], "row_heights": [0.64, 0.36], "horizontal_spacing": 0.1}
    figure = make_subplots(2, 2, vertical_spacing=0.16, **gaps)
    hover = "query %{y} to key %{x}: %{z:.3g}<extra></extra>"
    figure.add_heatmap(z=[[0]], zmin=0, zmax=1, colorscale=WEIGHTS, showscale=False, hovertemplate=hover, row=1, col=1)
    bars = {"x": np.arange(keys), "marker": {"color": "#0072B2", "line": {"width": 0}}, "visible": False}
    names = [_shown(token) for token in sample.tokens]
    figure.add_bar(
        **bars, customdata=names, hovertemplate="key %{x} %{customdata}: %{y:.3g}<extra></extra>", row=1, col=1
    )
    look = {"zmin": 0, "zmax": math.log(keys), "colorscale": "Cividis", "showscale": False, "xgap": 2, "ygap": 2}
    look |= {"texttemplate": "%{z:.2f}"} if heads <= 8 else {}
    hover = "layer %{y}, head %{x}<br>%{z:.3g} nats<extra></extra>"
    figure.add_heatmap(z=[[0]], **look, hovertemplate=hover, row=2, col=1)
    line, here = {"color": INK, "width": 2}, {"color": OVERLOAD, "size": 11, "line": {"width": 0}}
    ring = {"symbol": "circle-open", "size": 7, "color": HEALTHY, "line": {"width": 1.5}}
    hovers = ["t = %{x:.3g}: %{y:.3g} nats<extra></extra>", "t = %{x:.3g}: %{y:.3g}<extra></extra>"]
    for cell in (1, 2):
        place = {"row": cell, "col": 2, "hovertemplate": hovers[cell - 1]}
        figure.add_scatter(mode="lines", line=line, **place)
        if cell == 2:
            figure.add_scatter(mode="markers", marker=ring, **place)
        figure.add_scatter(mode="markers", marker=here, **place)
    mark_place(figure, "y", 1, "ceiling", row=1, col=2)
    figure.layout.annotations[0].update(xref="x2 domain", yref="y2")
    figure.add_annotation(text="line: Var(z/t) · rings: autograd", x=1, y=1, showarrow=False, xanchor="right",
                          yanchor="top", xref="x4 domain", yref="y4 domain")  # fmt: skip
    words = {"text": "mean entropy of every head at its t (nats)", "x": 0, "y": 1, "xanchor": "left"}
    figure.add_annotation(**words, yanchor="bottom", xref="x3 domain", yref="y3 domain", showarrow=False)
    figure.add_shape(type="rect", fillcolor="rgba(0,0,0,0)", line={"color": OVERLOAD, "width": 2.5}, row=2, col=1)
    bare = {"showline": False, "showgrid": False, "zeroline": False, "col": 1}
    figure.update_xaxes(title_text="key j", range=[-0.5, keys - 0.5], row=1, **bare)
    figure.update_yaxes(**bare)
    figure.update_xaxes(title_text="head", dtick=1 if heads <= 8 else 2, ticks="", row=2, **bare)
    down = {"range": [layers - 0.5, -0.5], "dtick": 1 if layers <= 8 else 4, "ticks": ""}
    figure.update_yaxes(title_text="layer", row=2, **down, col=1)
    span = [math.log10(LOW), math.log10(HIGH)]
    figure.update_xaxes(type="log", range=span, dtick=1, tickformat="~g", col=2)
    figure.update_xaxes(title_text="temperature t", row=2, col=2)
    figure.update_yaxes(title_text="entropy E (nats)", title_standoff=6, row=1, col=2)
    figure.update_yaxes(title_text="dE / d(log t)", title_standoff=6, nticks=4, row=2, col=2)
    title = "<b>Entropy rises from 0 to its ceiling as the temperature grows, and never turns back</b>"
    margin = {"l": 56, "r": 18, "t": 56, "b": 48}
    return figure.update_layout(title_text=title, height=580, margin=margin, showlegend=False)
