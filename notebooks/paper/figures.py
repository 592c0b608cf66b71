"""Figures of the paper's tables beside recorded runs: gaps as printed and as found, layer entropies run by run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from entropy_lib.explore.figures import (
    COLLAPSE,
    GRID,
    HEALTHY,
    INK,
    OVERLOAD,
    VARIANT_COLORS,
    go,
    laid_out,
    layer_entropy_curves,
    make_subplots,
    mark_place,
    significant,
)

CLOSE = 10  # points, of per cents: a gap that is further from the paper's is called off in the title


def gap_dots(gaps: Mapping[str, tuple[float, float]], title: str, x_title: str = "gap to SM+LN+G (%)") -> go.Figure:
    """Relative gaps {row: (in the paper, here)} as hollow and filled dots, one line a row.

    A gap is a fraction (0.19 is drawn at 19%). NaN is not drawn; infinity, for a training that collapsed, is a ✕ at
    the right edge. `title` names the table; how far the two are apart is added to it.
    """
    finite = [100 * gap for pair in gaps.values() for gap in pair if math.isfinite(gap)]
    low, high = min([0.0, *finite]), max([1.0, *finite])
    low, high = low - 0.04 * (high - low) * (low < 0), high + 0.06 * (high - low)
    edge = high + 0.07 * (high - low)
    anything_collapsed = any(gap == math.inf for pair in gaps.values() for gap in pair)
    places = {row: [edge if gap == math.inf else 100 * gap for gap in pair] for row, pair in gaps.items()}
    figure = go.Figure()
    for row, (paper, here) in places.items():
        if math.isfinite(paper) and math.isfinite(here):
            link = {"line": {"color": GRID, "width": 3}, "showlegend": False, "hoverinfo": "skip"}
            figure.add_scatter(x=[paper, here], y=[row, row], mode="lines", **link)
    for index, (name, shape) in enumerate((("printed in the paper", "circle-open"), ("recorded here", "circle"))):
        rows = [row for row, pair in places.items() if math.isfinite(pair[index])]
        values = [gaps[row][index] for row in rows]
        color = [HEALTHY if index == 0 else VARIANT_COLORS.get(row.partition(",")[0], INK) for row in rows]
        look = {"color": color, "size": 13 - 4 * index, "line": {"width": 2, "color": color}}
        look["symbol"] = ["x" + shape.removeprefix("circle") if value == math.inf else shape for value in values]
        words = ["collapsed" if value == math.inf else f"{100 * value:+.1f}%" for value in values]
        hover = "%{y}: %{text}<extra>" + name + "</extra>"
        at = {"x": [places[row][index] for row in rows], "y": rows, "text": words}
        figure.add_scatter(**at, mode="markers", marker=look, name=name, hovertemplate=hover, showlegend=False)
        sample = {"symbol": shape, "size": 11, "color": HEALTHY if index == 0 else INK}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=sample, name=name)
    if anything_collapsed:
        label = {"x": edge, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        figure.add_annotation(text="collapsed ✕", **label)
        mark_place(figure, "x", high, "")
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    figure.update_layout(legend=legend)
    end = edge + 0.05 * (high - low) if anything_collapsed else high
    figure.update_xaxes(title_text=x_title, range=[low - 0.02 * (high - low), end], zeroline=True, zerolinecolor=INK)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if (high - low) / step <= 8)
    ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]  # none where ✕ stands
    figure.update_xaxes(tickvals=ticks)
    order = {"categoryorder": "array", "categoryarray": list(gaps)[::-1], "range": [-0.5, len(gaps) - 0.5]}
    figure.update_yaxes(ticks="", ticksuffix=" ", automargin=True, **order)
    title = f"{title}: {_difference(gaps)}"
    return laid_out(figure, title, 130 + 30 * len(gaps), right=50 if anything_collapsed else 24, extra_top=26)


def _difference(gaps: Mapping[str, tuple[float, float]]) -> str:
    finite = [pair for pair in gaps.values() if all(map(math.isfinite, pair)) and any(pair)]  # without the baseline's 0
    apart = [abs(here - paper) for paper, here in finite]
    lost = [row for row, (paper, here) in gaps.items() if math.isfinite(paper) and here == math.inf]
    if not apart and not lost:
        return "no gap on record"
    far = math.ceil(100 * max(apart, default=0))
    words = f"within {far} points of" if far <= CLOSE else f"up to {far} points off"
    findings = [f"our gaps are {words} the paper's"] if apart else []
    if lost:
        findings.append((" and ".join(lost) if len(lost) < 3 else f"{len(lost)} of its models") + " collapsed here")
    return "; ".join(findings)


def result_grid(perplexity: pd.DataFrame, words: pd.DataFrame, title: str, x_title: str) -> go.Figure:
    """Perplexities as a coloured grid, darker is better; `words` [same rows and columns] stand in the cells."""
    figure = go.Figure()
    look = {"colorscale": "Blues", "reversescale": True, "xgap": 2, "ygap": 2, "colorbar": {"title": "perplexity"}}
    rows, columns = list(map(str, perplexity.index)), list(map(str, perplexity.columns))
    values = [significant(row) for row in perplexity.to_numpy(float)]
    figure.add_heatmap(z=values, x=columns, y=rows, text=words.to_numpy().tolist(), texttemplate="%{text}", **look)
    figure.update_traces(hovertemplate="%{y}, %{x}: %{text}<extra></extra>")
    figure.update_xaxes(title_text=x_title, showgrid=False, type="category")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", ticksuffix=" ", automargin=True)
    figure = laid_out(figure, title, 130 + 30 * len(rows))
    return figure.update_layout(plot_bgcolor=GRID)


def layer_entropy_panels(histories: Mapping, context_length: int, title: str) -> go.Figure:
    """`layer_entropy_curves` of several runs side by side, {name: (steps, [steps, L, H] in nats)}, on one scale."""
    names = [f"<b>{name}</b>" for name in histories]
    figure = make_subplots(1, len(histories), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.04)
    figure.update_annotations(font_size=13, yshift=2)
    deepest = max(len(entropy[0]) for _, entropy in histories.values())
    ceiling, legend_shown = math.log(context_length), False
    for column, (steps, entropy) in enumerate(histories.values(), start=1):
        cell = {"row": 1, "col": column}
        for curve in layer_entropy_curves(steps, entropy, context_length).data:
            curve.showlegend = not legend_shown and len(entropy[0]) == deepest
            figure.add_trace(curve, **cell)
        legend_shown = legend_shown or len(entropy[0]) == deepest
        mark_place(figure, "y", math.lgamma(context_length + 1) / context_length, "", **cell)
        mark_place(figure, "y", 0, "collapse", ceiling / 4, COLLAPSE, **cell)
        mark_place(figure, "y", 0.75 * ceiling, "overload", ceiling, OVERLOAD, **cell)
        figure.update_xaxes(title_text="training step", range=[0, max(*steps, 1)], **cell)
    figure.update_yaxes(range=[0, ceiling]).update_yaxes(title_text="entropy (nats)", col=1)
    return laid_out(figure, title, max(380, 140 + 20 * deepest), extra_top=22)  # a line of the legend takes 20 pixels
