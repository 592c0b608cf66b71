"""The figure of the training playground, empty: losses of runs above, entropies by layer and by head below."""

from __future__ import annotations

import math

from entropy_lib.explore.figures import IN_NATS, INK, go, laid_out, make_subplots, sample_colorscale

MAX_RUNS = 6  # overlaid; the oldest makes room for the next


def empty_figure(layers: int, context_length: int) -> go.Figure:
    """Traces: MAX_RUNS losses, the crosses of collapsed runs, one line a layer, the heatmap of heads."""
    specs = [[{"colspan": 2}, None], [{}, {}]]
    gaps = {"vertical_spacing": 0.17, "horizontal_spacing": 0.12, "column_widths": [0.58, 0.42]}
    figure = make_subplots(2, 2, specs=specs, subplot_titles=["<b>Loss of every run</b>", "", ""], **gaps)
    for _ in range(MAX_RUNS):
        figure.add_scatter(x=[], y=[], mode="lines", showlegend=False, line={"width": 2}, row=1, col=1)
    crosses = {"marker": {"symbol": "x", "size": 10}, "hovertemplate": "collapsed at step %{x}<extra></extra>"}
    figure.add_scatter(x=[], y=[], mode="markers", showlegend=False, cliponaxis=False, **crosses, row=1, col=1)
    shades = sample_colorscale("Purples", [0.42 + 0.36 * n / max(layers - 1, 1) for n in range(layers)])
    for layer, shade in enumerate(shades):
        style = {"line": {"width": 2, "color": shade}, "name": f"layer {layer}", "legend": "legend2"}
        figure.add_scatter(x=[], y=[], mode="lines", **style, row=2, col=1)
    ceiling = math.log(context_length)
    bar = {
        "title": IN_NATS,
        "tickfont": {"size": 13},
        "thickness": 12,
        "outlinewidth": 0,
        "len": 0.42,
        "y": 0.2,
    }
    figure.add_heatmap(
        z=None, xgap=2, ygap=2, colorscale="Cividis", zmin=0, zmax=ceiling, colorbar=bar, row=2, col=2,
        hovertemplate="layer %{y}, head %{x}<br>%{z:.3g} nats<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title_text="training step", title_standoff=6)
    figure.update_yaxes(title_text="loss (nats per token)", row=1, col=1)
    figure.update_yaxes(title_text="entropy (nats)", range=[0, ceiling], row=2, col=1)
    bare = {"showgrid": False, "showline": False, "ticks": "", "dtick": 1}
    figure.update_xaxes(title_text="head", **bare, row=2, col=2)
    figure.update_yaxes(title_text="layer", range=[layers - 0.5, -0.5], **bare, row=2, col=2)
    figure.add_shape(
        type="line", x0=0, x1=1, xref="x domain", yref="y", line={"dash": "dash", "color": INK, "width": 1}
    )
    figure.layout.shapes[0].update(y0=0, y1=0, opacity=0.5, visible=False)
    for annotation in figure.layout.annotations:
        annotation.update(font_size=13, xanchor="left", x=0)
    for x in (0, figure.layout.xaxis3.domain[0]):
        place = {"x": x, "y": figure.layout.yaxis2.domain[1], "xref": "paper", "yref": "paper", "xanchor": "left"}
        figure.add_annotation(text="", showarrow=False, yanchor="bottom", font={"size": 13}, **place)
    label = {"text": "unigram entropy: no use of context", "x": 1, "xref": "x domain", "xanchor": "right", "y": 0}
    figure.add_annotation(**label, yanchor="top", showarrow=False, visible=False)
    across = {"orientation": "h", "x": 0, "yanchor": "top"}
    laid_out(figure, "", 640, extra_top=8)
    below = figure.layout.yaxis2.domain
    figure.update_layout(
        legend={"orientation": "v", "x": 1, "xanchor": "right", "y": 1, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"},
        legend2={**across, "y": below[0] - 0.11},
    )
    return figure
