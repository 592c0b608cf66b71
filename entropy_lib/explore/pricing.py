"""What one private forward pass costs, for any size, variant, unit prices and network, beside SM+LN+G."""

from __future__ import annotations

import math

from entropy_lib.explore.controls import Explorer, dropdown, slider
from entropy_lib.explore.cost_figures import PART_COLORS
from entropy_lib.explore.figures import INK, go, laid_out, make_subplots, significant
from entropy_lib.modeling import EntropyGPT2Config
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.costs import InferenceCost, inference_cost, price_names, printed_cells, unit_prices
from entropy_lib.private_inference.network import NETWORKS
from entropy_lib.variants import PRIVATE_VARIANTS, VARIANTS, get_variant

BASELINE = "SM+LN+G"
PRICE_LABELS = {  # what a reader knows them by
    "paper": "the paper's tables (fitted)",
    "spu-0.9.5-cheetah": "SPU 0.9.5, measured",
    "optimized-spu-0.9.5-cheetah": "SPU 0.9.5, optimized operations",
    "bounded-logits-spu-0.9.5-cheetah": "SPU 0.9.5, optimized for bounded logits",
    "spu-0.9.2b0-cheetah": "SPU 0.9.2b0 of 2024, measured",
}
NO_NETWORK = "none: computation only"
_QUANTITIES = (("communication (GB)", "communication_gb"), ("latency (minutes)", "latency_min"))


class CostExplorer(Explorer):
    """See `cost_explorer`. `costs` are the `InferenceCost`s drawn, of the variant and of the baseline."""

    def __init__(self, variant: str, prices: str, network: str | None, context_length: int):
        get_variant(variant)
        known = sorted(price_names(), key=[*PRICE_LABELS, ""].index)
        networks = [(NO_NETWORK, None)]
        networks += [
            (f"{n.name}: {n.bandwidth / 1e6:g} Mbit/s, {n.latency * 1e3:g} ms", n.name) for n in NETWORKS.values()
        ]
        controls = {
            "layers": slider("layers", "Layers L", 12, 1, 48, 1, width="215px"),
            "heads": dropdown("heads", "Heads H", [1, 2, 4, 6, 8, 12, 16, 20, 24, 32], 12),
            "width": dropdown("width", "Width d", [64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048], 768),
            "context": dropdown("context", "Tokens T", [16, 32, 64, 128, 256, 512, 1024, 2048], context_length),
            "vocabulary": dropdown(
                "vocabulary", "Vocabulary V", [(f"{v:,}", v) for v in (0, 2048, 8192, 16384, 32000, 50257, 128256)],
                50257, tip="0: the blocks only, without embedding and vocabulary projection",
            ),
            "variant": dropdown("variant", "Variant", [*VARIANTS, *PRIVATE_VARIANTS], variant),
            "prices": dropdown("prices", "Prices", [(PRICE_LABELS[p], p) for p in known], unit_prices(prices).name),
            "network": dropdown("network", "Network", networks),
        }  # fmt: skip
        controls["network"].value = network  # None is a choice here
        arrangement = [["layers", "heads", "width", "context", "vocabulary"], ["variant", "prices", "network"]]
        super().__init__(_empty_figure(), controls, arrangement)

    def architecture(self, variant: str) -> Architecture:
        value = {name: control.value for name, control in self.controls.items()}
        sizes = {"n_layer": value["layers"], "n_head": value["heads"], "n_embd": value["width"]}
        sizes["n_positions"] = value["context"]
        # the configuration wants a vocabulary; a price needs none
        config = EntropyGPT2Config(**get_variant(variant).config_fields(), **sizes, vocab_size=value["vocabulary"] or 1)
        found = Architecture.of(config)
        return found if value["vocabulary"] else Architecture(**{**vars(found), "vocabulary": 0})

    def printed(self, variant: str) -> tuple[str, dict] | None:
        """(number of the table, what it prints) if the paper prints this setting."""
        a, length = self.architecture(variant), self.controls["context"].value
        for table, name, b, t, values in printed_cells():
            same = (a.layers, a.heads, a.width, a.vocabulary, length) == (b.layers, b.heads, b.width, b.vocabulary, t)
            if name == variant and same:
                return table[5:6], values
        return None

    def draw(self, changed: str | None) -> None:
        variant, priced = self.controls["variant"].value, unit_prices(self.controls["prices"].value)
        network = self.controls["network"]
        network.disabled = priced.includes_network or not priced.seconds
        paid = None if network.disabled else network.value
        names, length = (variant, BASELINE), self.controls["context"].value
        self.costs = [inference_cost(self.architecture(name), length, priced.name, paid) for name in names]
        printed = [self.printed(name) for name in names]
        figure = self.figure
        for column, (title, quantity) in enumerate(_QUANTITIES):
            parts = [_by_part(cost, quantity) for cost in self.costs]
            for index, part in enumerate(PART_COLORS):
                figure.data[column * len(PART_COLORS) + index].x = significant([values[part] for values in parts])
            totals, crosses = figure.data[2 * len(PART_COLORS) + 2 * column :][:2]
            marks = [values[quantity] if found else None for found, values in [(p, p and p[1]) for p in printed]]
            total = [getattr(cost, quantity) for cost in self.costs]
            known = not math.isnan(total[0])
            ends = [max(t, m + 0.02 * max(total) if m else 0) for t, m in zip(total, marks, strict=True)]
            totals.x = ends if known else [0, 0]
            totals.text = [f" {t:.3g}" for t in total] if known else [" not measured on this engine"] * 2
            crosses.x = marks if known else [None, None]
            reach = 1.22 * max(*ends, *(mark or 0 for mark in marks)) if known else 1
            axis = figure.layout[f"xaxis{column + 1 if column else ''}"]
            axis.range, axis.title.text = [0, reach], title
        figure.layout.yaxis.ticktext = names
        cost, base = self.costs
        share = cost.communication_gb / base.communication_gb
        figure.layout.title.text = f"<b>{variant} sends {share:.0%} of what {BASELINE} sends</b>"
        self.say(self._words(printed))

    def _words(self, printed: list) -> str:
        cost, base = self.costs
        dearest = max(cost.bytes, key=cost.bytes.get)
        words = [f"<b>{cost.communication_gb:.3g} GB</b> against {base.communication_gb:.3g}"]
        if not math.isnan(cost.latency_min):
            where = {"included": "network included", "none": "computation only"}.get(cost.network, cost.network)
            words.append(f"<b>{cost.latency_min:.3g} min</b> against {base.latency_min:.3g} ({where})")
        words.append(f"{dearest} is {cost.bytes[dearest] / sum(cost.bytes.values()):.0%} of the bytes")
        if tables := sorted({found[0] for found in printed if found}):
            words.append(f"✕ printed in Table {', '.join(tables)}")
        return " · ".join(words)


def cost_explorer(
    variant: str = "EReg(SM(t)+ScFuFFN)", prices: str = "paper", network: str | None = "WAN", context_length: int = 128
) -> CostExplorer:
    """Communication (GB) and latency (minutes) of one private forward pass by part, beside SM+LN+G, as a widget.

    Args:
        variant: a name in `VARIANTS` or `PRIVATE_VARIANTS`.
        prices: a unit prices as in `inference_cost`; its numbers are drawn unchanged.
        network: a name in `NETWORKS`, or None; not used by prices whose minutes include theirs.
        context_length: T, one of the choices.

    ✕ marks what the paper prints for exactly this setting (Tables 3, 4, 7 and 8). Raises ValueError for an unknown
    variant, prices, network or T.
    """
    if network is not None and network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; choose from {', '.join(NETWORKS)} or None")
    return CostExplorer(variant, prices, network, context_length)


def _by_part(cost: InferenceCost, quantity: str) -> dict[str, float]:
    if quantity == "latency_min":
        return cost.minutes
    return {part: sent / 1e9 for part, sent in cost.bytes.items()}


def _empty_figure() -> go.Figure:
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05)
    for column, unit in ((1, "GB"), (2, "min")):
        for part, color in PART_COLORS.items():
            figure.add_bar(
                x=[0, 0], y=[0, 1], name=part, legendgroup=part, showlegend=column == 1, orientation="h",
                marker={"color": color, "line": {"color": "white", "width": 1}},
                hovertemplate=f"%{{x:.3g}} {unit}<extra>{part}</extra>", row=1, col=column,
            )  # fmt: skip
    for column in (1, 2):
        style = {"cliponaxis": False, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=[0, 0], y=[0, 1], mode="text", textposition="middle right", **style, row=1, col=column)
        figure.add_scatter(
            x=[None, None], y=[0, 1], mode="markers", name="printed in the paper", showlegend=column == 1,
            marker={"symbol": "x", "size": 9, "color": INK, "line": {"color": "white", "width": 1}},
            hovertemplate="printed: %{x}<extra></extra>", row=1, col=column,
        )  # fmt: skip
    legend = {"orientation": "h", "x": 0.01, "xref": "container", "y": 0.0, "yref": "container", "yanchor": "bottom"}
    laid_out(figure, "", 350, extra_top=20).update_layout(barmode="stack", bargap=0.35, legend=legend)
    figure.update_layout(margin={"l": 170, "b": 115}, legend_traceorder="normal")
    bare = {"ticks": "", "ticksuffix": " ", "showgrid": False, "range": [1.5, -0.5]}
    return figure.update_yaxes(tickvals=[0, 1], **bare)
