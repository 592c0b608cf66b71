"""Figures of what private inference costs: parts stacked in bars, and quality against communication."""

from __future__ import annotations

import math
from collections.abc import Mapping

from entropy_lib.explore.figures import GRID, INK, VARIANT_COLORS, go, laid_out, moved_apart, significant

PART_COLORS = {  # nonlinear operations in colour, linear ones in greys
    "softmax": "#0072B2",
    "LayerNorm": "#E69F00",
    "RMSNorm": "#F0C05A",
    "activation": "#D55E00",
    "attention linear": "#6F7680",
    "FFN linear": "#9AA1AB",
    "embedding": "#C3C8CF",
    "vocabulary projection": "#E0E3E7",
}
LABELS = {"softmax": "softmax or its stand-in"}  # ReLU or x² attention, where a row has that instead


def part_bars(
    costs: Mapping[str, Mapping[str, float]], *, title: str, x_title: str, marks: Mapping[str, float] | None = None
) -> go.Figure:
    """One horizontal bar a row, {row: {part: value}}, stacked by part, with its total at the end.

    `x_title` names the quantity and its unit; `marks` puts a ✕ at a row's printed value.
    """
    unknown = {part for parts in costs.values() for part in parts} - set(PART_COLORS)
    if unknown:
        raise ValueError(f"unknown part(s) {sorted(unknown)}; the parts are {', '.join(PART_COLORS)}")
    figure, rows = go.Figure(), list(costs)
    for part, color in PART_COLORS.items():
        values = significant([costs[row].get(part, 0.0) for row in rows])
        if not any(values):
            continue
        hover = "%{y}: %{x:.3g}<extra>" + part + "</extra>"
        look = {"marker": {"color": color, "line": {"color": "white", "width": 1}}, "orientation": "h"}
        figure.add_bar(x=values, y=rows, name=LABELS.get(part, part), hovertemplate=hover, **look)
    totals = [sum(costs[row].values()) for row in rows]
    reach = max([*totals, *(marks or {}).values()])
    for row, total in zip(rows, totals, strict=True):
        ahead = max(total, (marks or {}).get(row, 0) + 0.015 * reach) if marks else total
        place = {"x": ahead, "y": row, "xanchor": "left", "xshift": 6, "showarrow": False}
        figure.add_annotation(text=f"{total:,.0f}" if total >= 100 else f"{total:.3g}", **place)
    if marks:
        cross = {"symbol": "x", "size": 8, "color": INK, "line": {"color": "white", "width": 1}}
        where = {"x": significant(list(marks.values())), "y": list(marks)}
        figure.add_scatter(**where, mode="markers", marker=cross, name="printed in the paper")
    legend = {"x": 1, "y": 0, "xanchor": "right", "yanchor": "bottom", "traceorder": "normal"}  # under the long bars
    figure.update_layout(barmode="stack", bargap=0.3, legend=legend)
    figure.update_xaxes(title_text=x_title, range=[0, 1.12 * reach])
    figure.update_yaxes(autorange="reversed", ticks="", ticksuffix=" ", showgrid=False, automargin=True)
    return laid_out(figure, title, 110 + 34 * len(rows))


def quality_against_cost(
    points: Mapping[str, tuple[float, float]], *, title: str, x_title: str, y_title: str,
    spread: Mapping[str, float] | None = None, log_x: bool = False,
) -> go.Figure:  # fmt: skip
    """One dot a variant, {name: (cost, perplexity)}, lower left the best; a line joins those that nothing beats.

    `spread` {name: half the length} puts a bar through a dot, NaN none.
    """
    figure = go.Figure()
    best = sorted(
        (cost, loss)
        for cost, loss in points.values()
        if not any((c, q) != (cost, loss) and c <= cost and q <= loss for c, q in points.values())
    )
    steps = {"line": {"color": GRID, "width": 3, "shape": "hv"}, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=[cost for cost, _ in best], y=[loss for _, loss in best], mode="lines", **steps)
    costs = [cost for cost, _ in points.values()]
    span = [math.log10(min(costs) / 1.3), math.log10(2.5 * max(costs))] if log_x else [0, 1.3 * max(costs)]
    losses = [loss for _, loss in points.values()]
    low, high = min(losses), max(losses)
    room = 0.15 * (high - low or high)
    figure = laid_out(figure, title, 420)
    scale = 300 / (high - low + 2 * room)  # px per unit
    heights = moved_apart([loss * scale for loss in losses], gap=18)
    bottom = min(low - room, (min(heights) - 12) / scale)  # a name that was moved down stays inside
    for (name, (cost, loss)), at in zip(points.items(), heights, strict=True):
        color = VARIANT_COLORS.get(name, INK)
        dot = {"mode": "markers", "marker": {"size": 11, "color": color}, "name": name, "showlegend": False}
        hover = f"{name}: %{{x:.3g}}, perplexity %{{y:.3g}}<extra></extra>"
        if (half := (spread or {}).get(name, 0)) > 0:
            dot["error_y"] = {"array": [half], "color": color, "thickness": 1.5, "width": 5}
        figure.add_scatter(x=[cost], y=[loss], hovertemplate=hover, **dot)
        place = {"x": math.log10(cost) if log_x else cost, "y": loss, "xanchor": "left"}
        figure.add_annotation(
            **place, text=name, font={"color": color}, ax=16, ay=loss * scale - at, arrowcolor=color, standoff=6
        )
    figure.update_xaxes(title_text=x_title, range=span)
    if log_x:
        figure.update_xaxes(type="log", dtick="D2", tickformat=",")  # 1, 2, 5
    return figure.update_yaxes(title_text=y_title, range=[bottom, high + room])
