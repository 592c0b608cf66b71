"""What one private forward pass costs, for any size, variant, unit prices and network, beside SM+LN+G."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from traitlets import Dict, Enum, Int, List

from entropy_lib.explore.cost_figures import PART_COLORS, part_bars
from entropy_lib.explore.module import ModuleExplorer, module_source
from entropy_lib.modeling import EntropyGPT2Config
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.private_inference.costs import InferenceCost, inference_cost, printed_cells, unit_prices
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
CHOICES = {
    "heads": [1, 2, 4, 6, 8, 12, 16, 20, 24, 32],
    "width": [64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048],
    "context": [16, 32, 64, 128, 256, 512, 1024, 2048],
    "vocabulary": [0, 2048, 8192, 16384, 32000, 50257, 128256],
}
_SIZES = ("layers", "heads", "width", "vocabulary")


def cost_explorer(
    variant: str = "EReg(SM(t)+ScFuFFN)", prices: str = "paper", network: str | None = "WAN", context_length: int = 128
) -> CostExplorer:
    """Communication (GB) and latency (minutes) of one private forward pass by part, beside SM+LN+G, as a widget.

    Args:
        variant: a name in `VARIANTS` or `PRIVATE_VARIANTS`.
        prices: unit prices as in `inference_cost`; its numbers are drawn unchanged.
        network: a name in `NETWORKS`, or None; not used by prices whose minutes include theirs.
        context_length: T, one of the choices.

    ✕ marks what the paper prints for exactly this setting (Tables 3, 4, 7 and 8). Raises ValueError for an unknown
    variant, prices, network or T.
    """
    get_variant(variant)
    if network is not None and network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; choose from {', '.join(NETWORKS)} or None")
    if context_length not in CHOICES["context"]:
        raise ValueError(f"context_length must be one of {CHOICES['context']}, got {context_length!r}")
    name = unit_prices(prices).name
    return CostExplorer(variant=variant, prices=name, network=network or "", context=context_length)


class CostExplorer(ModuleExplorer):
    """See `cost_explorer`. Traits: layers, heads, width, context (T), vocabulary (0: blocks only), variant, prices,
    network ("": none).

    What the module shows is here by `inference_cost`: `costs`, of the variant and of the baseline, and `words`.
    """

    _esm = module_source("pricing")
    layers = Int(12, min=1, max=48).tag(sync=True, state=True)
    heads = Enum(CHOICES["heads"], 12).tag(sync=True, state=True)
    width = Enum(CHOICES["width"], 768).tag(sync=True, state=True)
    context = Enum(CHOICES["context"], 128).tag(sync=True, state=True)
    vocabulary = Enum(CHOICES["vocabulary"], 50257).tag(sync=True, state=True)
    variant = Enum([*VARIANTS, *PRIVATE_VARIANTS], BASELINE).tag(sync=True, state=True)
    prices = Enum(list(PRICE_LABELS), "paper").tag(sync=True, state=True)
    network = Enum(["", *NETWORKS], "").tag(sync=True, state=True)
    # What the module computes from.
    choices = Dict(CHOICES).tag(sync=True, state=True)
    architectures = Dict().tag(sync=True, state=True)
    price_tables = Dict().tag(sync=True, state=True)
    networks = Dict({name: asdict(network) for name, network in NETWORKS.items()}).tag(sync=True, state=True)
    cells = List(Dict()).tag(sync=True, state=True)
    colors = Dict({part: PART_COLORS[part] for part in Architecture().parts}).tag(sync=True, state=True)

    def __init__(self, **traits):
        super().__init__(
            architectures={name: asdict(_of_variant(name)) for name in (*VARIANTS, *PRIVATE_VARIANTS)},
            price_tables={name: _of_prices(name) for name in PRICE_LABELS},
            cells=[
                {"table": table[5:6], "variant": name, "context": length, "values": values}
                | {size: getattr(architecture, size) for size in _SIZES}
                for table, name, architecture, length, values in printed_cells()
            ],
            **traits,
        )

    def architecture(self, variant: str) -> Architecture:
        """Of the sizes as the traits stand. ValueError for what does not fit."""
        a = _of_variant(variant)
        sizes = {size: getattr(self, size) for size in _SIZES}
        return replace(a, **sizes, positions=None, ffn_width=a.ffn_width // a.width * self.width)

    @property
    def costs(self) -> list[InferenceCost]:
        """Of the variant and of the baseline. ValueError for sizes that do not fit and operations without a price."""
        paid = self.network if self.paid else None
        return [
            inference_cost(self.architecture(name), self.context, self.prices, paid)
            for name in (self.variant, BASELINE)
        ]

    @property
    def paid(self) -> bool:
        """Whether a network's time comes on top: not where the minutes include one, nor where there are no minutes."""
        priced = unit_prices(self.prices)
        return bool(self.network) and not priced.includes_network and bool(priced.seconds)

    def printed(self, variant: str) -> tuple[str, dict] | None:
        """(number of the table, what it prints) if the paper prints this setting."""
        here = {"variant": variant, "context": self.context} | {size: getattr(self, size) for size in _SIZES}
        found = (c for c in self.cells if all(c[name] == value for name, value in here.items()))
        return next(((cell["table"], cell["values"]) for cell in found), None)

    def words(self) -> str:
        """What the explorer says: the totals, or why there is no price."""
        try:
            cost, base = self.costs
        except ValueError as error:
            return str(error)
        words = [f"{cost.communication_gb:.3g} GB against {base.communication_gb:.3g}"]
        if not math.isnan(cost.latency_min):
            where = {"included": "network included", "none": "computation only"}.get(cost.network, cost.network)
            words.append(f"{cost.latency_min:.3g} min against {base.latency_min:.3g} ({where})")
        dearest = max(cost.bytes, key=cost.bytes.get)
        words.append(f"{dearest} is {cost.bytes[dearest] / sum(cost.bytes.values()):.0%} of the bytes")
        if tables := sorted({found[0] for found in map(self.printed, (self.variant, BASELINE)) if found}):
            words.append(f"✕ printed in Table {', '.join(tables)}")
        return " · ".join(words)

    def still(self):
        """The bytes of the variant and of the baseline, as a figure."""
        rows = dict(zip((self.variant, BASELINE), self.costs, strict=True))
        share = self.costs[0].communication_gb / self.costs[1].communication_gb
        title = f"{self.variant} sends {share:.0%} of what {BASELINE} sends"
        parts = {name: {part: sent / 1e9 for part, sent in cost.bytes.items()} for name, cost in rows.items()}
        found = {name: self.printed(name) for name in rows}
        marks = {name: cell[1]["communication_gb"] for name, cell in found.items() if cell}
        return part_bars(parts, title=title, x_title="communication (GB)", marks=marks)


def _of_variant(name: str) -> Architecture:
    return Architecture.of(EntropyGPT2Config(**get_variant(name).config_fields()))


def _of_prices(name: str) -> dict:
    priced = unit_prices(name)
    tables = {table: getattr(priced, table) for table in ("bytes", "seconds", "rounds")}
    return tables | {"label": PRICE_LABELS[name], "includes_network": priced.includes_network}
