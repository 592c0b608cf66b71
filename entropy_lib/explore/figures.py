"""The companion's figures in one look: plotly from arrays (torch, numpy or lists; entropies in nats)."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Collection, Mapping
from itertools import pairwise

try:
    import plotly.graph_objects as go
    import plotly.io as pio
    from plotly.colors import sample_colorscale
    from plotly.subplots import make_subplots
except ImportError as error:
    raise ImportError("entropy_lib.explore draws with plotly: pip install 'entropy_lib[notebooks]'") from error

HEIGHT = 420  # px, of a figure that needs no more
COLLAPSE, OVERLOAD, HEALTHY, INK, GRID = "#3B6FB6", "#C8553D", "#8A9099", "#2B2F36", "#E6E8EC"
IN_NATS = {"text": "nats", "side": "top", "font": {"size": 13}}  # title of a colour bar

# Okabe-Ito without its yellow, which vanishes on white; the first four and olive are Tol's, indigo and wine are his but
# light enough for a dark page, and there are a grey and a brown.
# fmt: off
VARIANT_COLORS = {
    "SM(3)+LN(a)+R+V": "#4477AA", "R2(0,0,1)+LN(a)+R(2d)+V": "#117733", "SM(1)+LN(a)+R+V": "#44AA99",
    "SM(2)+LN(a)+R+V": "#AA4499",
    "SM+LN+G": "#000000", "SM+LN+R": "#6F55C0", "SM+LN": "#56B4E9", "SM+G": "#E69F00", "SM+R": "#999933",
    "SM": "#8A9099", "SM+WNorm": "#B03A6B", "SM+SNorm": "#8C6D46", "SM+ScFFN": "#CC79A7", "SM+ScFuFFN": "#009E73",
    "SM(t)+ScFuFFN": "#0072B2", "EReg(SM(t)+ScFuFFN)": "#D55E00",
}
# fmt: on
PALETTE = list(VARIANT_COLORS.values())[::-1]  # for other lines, the strongest first
BANDS = {"below ¼ of the maximum": COLLAPSE, "¼ to ½": "#C3C8CF", "½ to ¾": "#9AA1AB", "¾ and above": OVERLOAD}
FEW_POINTS = 15  # of a curve
_AXIS_TITLES = {"step": "training step", "tokens": "tokens seen", "loss": "loss (nats per token)"}


def register_template() -> None:
    """Make "entropy" plotly's default template, also for figures of one's own.

    Without this call plotly's default stays, and the companion's figures name "entropy".
    """
    pio.templates.default = "entropy"


def _make_template() -> go.layout.Template:
    base = pio.templates["simple_white"].layout  # only these: the rest would travel with every figure
    template = go.layout.Template(layout={key: base[key] for key in ("xaxis", "yaxis", "annotationdefaults")})
    font = {"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": INK}
    axis = {"gridcolor": GRID, "showgrid": True, "linecolor": INK, "tickcolor": INK, "title": {"font": font}}
    title = {"font": {"size": 15}, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"l": 12, "t": 12}}
    paper = {"paper_bgcolor": "white", "plot_bgcolor": "white"}
    template.layout.update(font=font, title=title, xaxis=axis, yaxis=axis, **paper)
    template.layout.modebar.remove = ["select2d", "lasso2d", "autoScale2d"]
    return template


def lines(
    curves: Mapping, *, title: str, x_title: str, y_title: str, colors: Mapping[str, str] | None = None,
    reference: Mapping[str, float] | None = None, stopped: Collection[str] = (), log_x: bool = False,
    y_range: tuple[float, float] | None = None, labels: bool = True, height: int = HEIGHT,
) -> go.Figure:  # fmt: skip
    """Named lines {name: (x, y)}: up to six are labelled at their ends, more by a legend; `labels=False` for neither.

    `reference` adds dashed horizontal lines {label: value}; lines named in `stopped` end in a cross. Points that
    are not finite are left out.
    """
    points = {name: list(zip(significant(x), significant(y), strict=True)) for name, (x, y) in curves.items()}
    points = {name: [pair for pair in pairs if None not in pair] for name, pairs in points.items()}
    if not points or not all(points.values()):
        raise ValueError(f"nothing finite to draw for {[name for name, pairs in points.items() if not pairs]}")
    reference, colors = reference or {}, {**VARIANT_COLORS, **(colors or {})}
    if y_range is None:
        values = [*reference.values(), *(y for pairs in points.values() for _, y in pairs)]
        room = 0.05 * (max(values) - min(values) or 1)
        y_range = (min(values) - room, max(values) + room)
    ends_labelled = labels and len(points) <= 6
    right = 30 + 7.3 * max(len(name) + 2 * (name in stopped) for name in points) if ends_labelled else 24
    figure = laid_out(go.Figure(), title, height, right=right)
    ends = []
    for index, (name, pairs) in enumerate(points.items()):
        x, y = zip(*pairs, strict=True)
        color = colors.get(name, PALETTE[index % len(PALETTE)])
        few = len(x) <= FEW_POINTS  # a line between two of them is no measurement: show where they are
        style = {"mode": "lines+markers" if few else "lines", "line": {"color": color, "width": 2}}
        figure.add_scatter(x=x, y=y, name=name, marker={"size": 5}, **style)
        if name in stopped:
            cross = {"symbol": "x", "size": 9, "color": color}
            figure.add_scatter(x=x[-1:], y=y[-1:], mode="markers", marker=cross, showlegend=False, hoverinfo="skip")
        ends.append((name + " ✕" * (name in stopped), color, x[-1], min(max(y[-1], y_range[0]), y_range[1])))
    for label, value in reference.items():
        mark_place(figure, "y", value, label)
    if ends_labelled:
        scale = (height - figure.layout.margin.t - figure.layout.margin.b) / (y_range[1] - y_range[0])  # px per unit
        heights = moved_apart([y * scale for *_, y in ends], gap=17)
        for (label, color, x, y), at in zip(ends, heights, strict=True):
            leader = {"ax": 20, "ay": y * scale - at, "arrowcolor": color, "standoff": 3}
            leader["x"] = math.log10(x) if log_x else x
            figure.add_annotation(y=y, text=label, font={"color": color}, xanchor="left", **leader)
    span = [min(pairs[0][0] for pairs in points.values()), max(pairs[-1][0] for pairs in points.values())]
    if log_x:
        span = [math.log10(x) for x in span]
        decades = span[1] - span[0]
        figure.update_xaxes(type="log", dtick=max(1, round(decades / 7)) if decades > 1 else "D1", tickformat="~g")
    figure.update_layout(showlegend=labels and not ends_labelled).update_xaxes(title_text=x_title, range=span)
    return figure.update_yaxes(title_text=y_title, range=y_range)


def loss_curves(histories: Mapping, *, x="step", y="loss", title="Loss over training", **options) -> go.Figure:
    """Training curves of several runs, {name: table with columns `x` and `y`} (DataFrame or dict of lists).

    Options as in `lines`, above all reference={"unigram entropy": 6.1} and stopped={names of runs that diverged}.
    The axis ends at the highest loss that a run starts with, so that a diverging run does not flatten the others.
    """
    losses = [[loss for loss in significant(table[y]) if loss is not None] for table in histories.values()]
    marks = list((options.get("reference") or {}).values())
    top = max([values[0] for values in losses if values] + marks, default=1)
    low = min([min(values) for values in losses if values] + marks, default=0)
    room = 0.05 * (top - low or 1)
    options = {"y_range": (low - room, top + room), "x_title": _AXIS_TITLES.get(x, x), **options}
    curves = {name: (table[x], table[y]) for name, table in histories.items()}
    return lines(curves, title=title, y_title=_AXIS_TITLES.get(y, y), **options)


def entropy_heatmap(entropy, context_length: int, title: str | None = None) -> go.Figure:
    """Mean entropy of every head, [L, H] in nats, on a scale from 0 to log(context_length); layer 0 at the top."""
    return entropy_heatmaps({"": entropy}, context_length, title=title or "Mean entropy of every head")


def entropy_heatmaps(entropies: Mapping, context_length: int, title: str | None = None) -> go.Figure:
    """Head entropies of several models, {name: [L, H]} in nats, side by side on one colour scale."""
    grids = {name: [significant(row) for row in _nested(grid, 2)] for name, grid in entropies.items()}
    alone, layers, rows = len(grids) == 1, max(map(len, grids.values())), math.ceil(len(grids) / 4)
    columns = math.ceil(len(grids) / rows)  # of five maps 3 and 2: rivals stay side by side
    height = 50 + rows * (66 + max((24 if alone else 17) * layers, 130))
    names, gaps = [f"<b>{name}</b>" for name in grids], {"horizontal_spacing": 0.035, "vertical_spacing": 78 / height}
    figure = make_subplots(rows, columns, subplot_titles=None if alone else names, shared_yaxes=True, **gaps)
    for index, (name, grid) in enumerate(grids.items()):
        cell = {"row": index // columns + 1, "col": index % columns + 1}
        hover = "layer %{y}, head %{x}<br>%{z:.3g} nats<extra>" + name + "</extra>"
        figure.add_heatmap(z=grid, xgap=2, ygap=2, coloraxis="coloraxis", hovertemplate=hover, **cell)
        below = index + columns >= len(grids)  # nothing is drawn below it
        every = 1 if len(grid[0]) <= 8 or alone else 2 if len(grid[0]) <= 16 else 4
        figure.update_xaxes(title_text="head" if below else "", dtick=every, **cell)
        down = {"range": [layers - 0.5, -0.5], "dtick": 1 if layers <= 8 or alone else 2}
        figure.update_yaxes(title_text="layer" if cell["col"] == 1 else "", **down, **cell)
    bare = {"showline": False, "showgrid": False, "ticks": ""}
    figure.update_xaxes(**bare).update_yaxes(**bare).update_annotations(font_size=13, yshift=2)
    ceiling = math.log(context_length)
    ticks = [*range(0, math.ceil(ceiling - 0.35), 1 if height > 260 else 2), ceiling]
    names = [*map(str, ticks[:-1]), f"{ceiling:.2f} = log {context_length}"]
    bar = {"title": IN_NATS, "thickness": 12, "outlinewidth": 0, "tickvals": ticks, "ticktext": names, "len": 1}
    figure.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": ceiling, "colorbar": bar})
    return laid_out(figure, title or "Mean entropy of every head, by model", height, extra_top=0 if alone else 22)


def entropy_band_bars(bands: Mapping, title: str | None = None) -> go.Figure:
    """Share of heads in the four bands of Figure 2a, {name: [4]} from `entropy_bands`, one bar a model."""
    shares = [[100 * share for share in significant(fractions)] for fractions in bands.values()]
    if any(len(share) != 4 for share in shares):
        raise ValueError(f"expected four fractions a model, got {[len(share) for share in shares]}")
    figure = go.Figure()
    for band, (label, color) in enumerate(BANDS.items()):
        share = [percent[band] for percent in shares]
        text = [f"{percent:.0f}%" if percent >= 6 else "" for percent in share]
        look = {"marker": {"color": color, "line": {"color": "white", "width": 1}}, "text": text, "textangle": 0}
        look |= {"textposition": "inside", "insidetextanchor": "middle", "orientation": "h"}
        hover = "%{y}: %{x:.1f}% of heads<extra>" + label + "</extra>"
        figure.add_bar(x=share, y=list(bands), name=label, hovertemplate=hover, **look)
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"}
    figure.update_layout(barmode="stack", bargap=0.35, legend=legend)
    figure.update_xaxes(title_text="share of heads (%)", range=[0, 100]).update_yaxes(autorange="reversed", ticks="")
    title = title or "Share of heads by entropy, in quarters of the largest head entropy"
    return laid_out(figure, title, 130 + 40 * len(shares), extra_top=26)


def layer_entropy_curves(steps, entropy_history, context_length: int, title: str | None = None) -> go.Figure:
    """Mean entropy of each layer over training, [steps, L, H] in nats, from light (layer 0) to dark (the deepest).

    Shaded: the outer quarters of 0 to log T. Dashed: uniform causal attention, mean_i log(i+1) = log(T!)/T.
    """
    means = [[sum(heads) / len(heads) for heads in layers] for layers in _nested(entropy_history, 3)]
    names, ceiling = [f"layer {layer}" for layer in range(len(means[0]))], math.log(context_length)
    shades = sample_colorscale("Purples", [0.45 + 0.55 * n / max(len(names) - 1, 1) for n in range(len(names))])
    curves = {name: (steps, [step[layer] for step in means]) for layer, name in enumerate(names)}
    look = {"colors": dict(zip(names, shades, strict=True)), "y_range": (0, ceiling)}
    look["reference"] = {"uniform over the visible keys": math.lgamma(context_length + 1) / context_length}
    title = title or "Mean entropy of each layer over training"
    figure = lines(curves, title=title, x_title=_AXIS_TITLES["step"], y_title="entropy (nats)", **look)
    mark_place(figure, "y", 0, "collapse", ceiling / 4, COLLAPSE)
    return mark_place(figure, "y", 0.75 * ceiling, "overload", ceiling, OVERLOAD)


def attention_rows(rows: Mapping, title: str, notes: Mapping | None = None) -> go.Figure:
    """Rows of attention weights, {label: [T_k]}, as bars side by side; `notes` {label: a second line}.

    Where more than three stand side by side, a note is broken at " · ".
    """
    notes = {label: note.replace(" · ", "<br>") if len(rows) > 3 else note for label, note in (notes or {}).items()}
    labels = [f"<b>{label}</b>" + (f"<br>{notes[label]}" if notes else "") for label in rows]
    figure = make_subplots(1, len(rows), subplot_titles=labels, shared_yaxes=True, horizontal_spacing=0.03)
    for column, weights in enumerate(rows.values(), start=1):
        figure.add_bar(y=significant(weights), marker={"color": HEALTHY, "line": {"width": 0}}, row=1, col=column)
    figure.update_xaxes(title_text="key", showgrid=False).update_yaxes(range=[0, 1.02], tickvals=[0, 0.5, 1])
    figure.update_yaxes(title_text="attention weight", col=1).update_annotations(font_size=13, yshift=4)
    top = 22 + 18 * max((1 + note.count("<br>") for note in notes.values()), default=0)
    return laid_out(figure.update_layout(showlegend=False), title, 250 + top, extra_top=top)


def temperature_curves(temperatures, entropy, ceiling: float, title: str, mark: float = 1.0) -> go.Figure:
    """Entropy of several heads against temperature, [n] and [n, heads] in nats; `ceiling` dashed, `mark` dotted."""
    curves = {f"head {n}": (temperatures, head) for n, head in enumerate(zip(*_nested(entropy, 2), strict=True))}
    label = {f"{ceiling:.2f} nats: every key counts the same": ceiling}
    axes = {"x_title": "temperature t", "y_title": "entropy (nats)", "log_x": True, "y_range": (0, 1.1 * ceiling)}
    # The curves meet at both ends, so end labels would pile up; which head is which tells nothing here.
    return mark_place(lines(curves, title=title, reference=label, labels=False, **axes), "x", mark, f"t = {mark:g}")


def penalty_curve(entropy, penalty, gradient, *, threshold: float, margin: float, ceiling: float, title: str):
    """The penalty of Algorithm 1 and its slope at head entropies [n]; θ and γ (`margin`) are fractions of E_max."""
    figure = make_subplots(1, 2, horizontal_spacing=0.11)
    for column, values, label in ((1, penalty, "penalty (nats²)"), (2, gradient, "d penalty / dE (nats)")):
        cell, line = {"row": 1, "col": column}, {"color": INK, "width": 2}
        figure.add_scatter(
            x=significant(entropy), y=significant(values), mode="lines", line=line, showlegend=False, **cell
        )
        figure.update_yaxes(title_text=label, **cell)
        mark_place(figure, "x", 0, "pushed up", (threshold - margin) * ceiling, COLLAPSE, **cell)
        mark_place(figure, "x", (threshold + margin) * ceiling, "pushed down", ceiling, OVERLOAD, **cell)
        mark_place(figure, "x", threshold * ceiling, "θ·E<sub>max</sub>", **cell)
    return laid_out(figure.update_xaxes(title_text="entropy of the head (nats)", range=[0, ceiling]), title, 360)


def ceilings_by_row(ceilings, *, lower: float, upper: float, context_ceiling: float, title: str) -> go.Figure:
    """What each row can reach, [T] in nats, against the band [lower, upper] that one threshold asks of all rows."""
    reach, top = significant(ceilings), 1.12 * max(upper, context_ceiling)
    look = {"labels": False, "colors": {"reach": INK}, "reference": {f"log T = {context_ceiling:.2f}": context_ceiling}}
    look |= {"x_title": "query position i", "y_title": "entropy (nats)", "y_range": (0, top)}
    figure = lines({"reach": (range(len(reach)), reach)}, title=title, **look)
    name, middle = "log(i + 1), all that row i can reach", len(reach) // 2
    figure.add_annotation(x=middle, y=reach[middle], text=name, ax=40, ay=40, xanchor="left")
    mark_place(figure, "y", lower, "the band every row is held to", upper, HEALTHY)
    short = sum(value < lower for value in reach)
    if short:
        mark_place(figure, "x", 0, f"{short} rows cannot reach it", short - 0.5, COLLAPSE, beside=True)
    return figure


def show(figure: go.Figure, name: str | None = None) -> None:
    """Display a figure in a notebook, where its camera button saves it as `name`.png; nothing outside of one."""
    if "IPython" in sys.modules:
        renderer = "colab" if "google.colab" in sys.modules else "plotly_mimetype"  # which Colab does not know
        figure.show(renderer=renderer, config={"toImageButtonOptions": {"filename": name}} if name else {})


def significant(values) -> list:
    """Numbers as a list of six significant digits, None where not finite: small and readable in a notebook."""
    values = values.tolist() if hasattr(values, "tolist") else [getattr(v, "item", lambda v=v: v)() for v in values]
    return [v if isinstance(v, int) else float(f"{v:.6g}") if math.isfinite(v) else None for v in values]


def _nested(array, dims: int) -> list:
    """An array or nested sequence as lists, `dims` deep."""
    array = array.tolist() if hasattr(array, "tolist") else array
    if isinstance(array, list | tuple) != (dims > 0):
        raise ValueError(f"expected an array with {dims} further dimension(s) here, got {array!r:.60}")
    return [_nested(row, dims - 1) for row in array] if dims else array


def page_color(color: str) -> str:
    """A variant's colour in a page that may be dark: black is the page's own ink, all others show on both."""
    return "currentColor" if color in (INK, "#000000") else color


def laid_out(figure: go.Figure, title: str, height: int, right: float = 24, extra_top: int = 0) -> go.Figure:
    """Template, bold title wrapped to the width, height and margins. The template is named, not left to a default."""
    words = textwrap.wrap(title, 90)
    margin = {"l": 64, "r": right, "t": 24 + 20 * len(words) + extra_top, "b": 56}
    text = "<br>".join(f"<b>{line}</b>" for line in words)
    pad = {"l": 12, "t": 12 + 10 * max(len(words) - 1, 0)}  # plotly centres a title of two lines where one would stand
    return figure.update_layout(template="entropy", title={"text": text, "pad": pad}, height=height, margin=margin)


def mark_place(figure: go.Figure, axis: str, start: float, label: str, end=None, color=None, beside=False, **cell):
    """Mark and name a place on an axis: a thin line at `start`, or a tinted band from there to `end`."""
    other, stop = "x" if axis == "y" else "y", start if end is None else end
    span = {f"{axis}0": start, f"{axis}1": stop, f"{other}0": 0, f"{other}1": 1, f"{other}ref": f"{other} domain"}
    if end is None:
        style = {"color": INK, "width": 1, "dash": "dash" if axis == "y" else "dot"}
        span |= {"type": "line", "line": style, "opacity": 0.5}
        exponent = axis == "x" and figure.layout.xaxis.type == "log"  # what annotations want there, unlike shapes
        at = {axis: math.log10(start) if exponent else start, other: 1, "xshift": 4 if axis == "x" else 0}
        at |= {"xanchor": "right", "yanchor": "bottom"} if axis == "y" else {"xanchor": "left", "yanchor": "top"}
    else:
        span |= {"fillcolor": color, "opacity": 0.12, "line_width": 0, "layer": "below", "type": "rect"}
        corner = axis == "y" or beside
        at = {axis: end if corner else (start + end) / 2, other: 0 if axis == "y" else 0.03 if beside else 1}
        at |= {"xanchor": "left" if corner else "center", "yanchor": "bottom" if beside else "top"}
        at |= {"xshift": 6 if corner else 0, "font": {"color": color}, "text": f"<b>{label}</b>"}
    figure.add_shape(**span, **cell)
    return figure.add_annotation(**{"text": label, f"{other}ref": f"{other} domain", "showarrow": False, **at}, **cell)


def moved_apart(positions: list[float], gap: float) -> list[float]:
    """The positions moved apart until any two differ by `gap`, each crowd staying centred where it was."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    spread = list(positions)
    for _ in range(100):
        for lower, upper in pairwise(order):
            overlap = max(gap - (spread[upper] - spread[lower]), 0)
            spread[lower], spread[upper] = spread[lower] - overlap / 2, spread[upper] + overlap / 2
    return spread


pio.templates["entropy"] = _make_template()
