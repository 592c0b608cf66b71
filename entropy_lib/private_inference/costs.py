"""What private inference costs: counts of every operation, times unit prices."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field, replace
from importlib.resources import files

from entropy_lib.private_inference.architecture import NORMS, Architecture, Operation, operations
from entropy_lib.private_inference.network import NETWORKS, Network

PRICE_FILES = files("entropy_lib.private_inference") / "prices"
PAPER_TABLES = files("entropy_lib") / "paper_tables.json"
_PRINTED = {  # layers, T, vocabulary
    "table3_codeparrot_T128": (12, 128, 50257),
    "table4_languini_T512": (12, 512, 16384),
    "table7_codeparrot_T256": (12, 256, 50257),
    "table8_codeparrot_L18_T128": (18, 128, 50257),
}
_CHANGES = {
    "SM+LN+G": {},
    "SM+LN+R": {"activation": "relu"},
    "SM+ScFuFFN": {"layer_norm": False, "activation": "linear", "fused": True, "scaled": True},
}


@dataclass(frozen=True)
class UnitPrices:
    """Unit prices of one engine, read from `prices` beside this file.

    `bytes` and `seconds`: operation (see `Operation.name`; "vocabulary projection" where it differs from "linear") ->
    unit ("in", "out", "element", "row") -> price. Seconds are the busier party's processor time or, if
    `includes_network`, everything; none were measured for the old engine, whose minutes are NaN.
    `rounds`: operation -> messages one way that wait for each other, whatever the size.
    `method`: how the parties compute the operations, see `methods.METHODS`.
    """

    name: str
    source: str
    includes_network: bool
    bytes: dict[str, dict[str, float]] = field(repr=False)
    seconds: dict[str, dict[str, float]] = field(repr=False)
    rounds: dict[str, float] = field(repr=False)
    factors: dict[str, dict[str, float]] = field(repr=False, default_factory=dict)  # the paper's: data/make/prices.py
    method: str = "as given"

    def price(self, operation: Operation, table: dict[str, dict[str, float]]) -> float:
        if not table:
            return math.nan  # not measured on this engine
        vocabulary = operation.part == "vocabulary projection" and operation.part in table
        prices = table.get(operation.part if vocabulary else operation.name)
        if prices is None:
            raise ValueError(f"{self.name!r} has no price for {operation.name!r}; it has {list(table)}")
        units = operation.units()
        return sum(price * units[unit] for unit, price in prices.items())


def paper_tables() -> dict:
    """The figures that the paper prints (arXiv 2501.03489v2), by table."""
    return json.loads(PAPER_TABLES.read_text(encoding="utf-8"))


def printed_cells():
    """(table, variant, Architecture, T, printed values) of Tables 3, 4, 7 and 8.

    The paper prints the final model at the price of SM+ScFuFFN, so its temperature is not priced here either.
    """
    tables = paper_tables()
    for table, (layers, length, vocabulary) in _PRINTED.items():
        for variant, values in tables[table].items():
            change = _CHANGES["SM+ScFuFFN" if variant.startswith("EReg") else variant]
            yield table, variant, Architecture(layers=layers, vocabulary=vocabulary, **change), length, values


def price_names() -> list[str]:
    return sorted(path.name.removesuffix(".json") for path in PRICE_FILES.iterdir())


def unit_prices(name: str) -> UnitPrices:
    """Prices by their name or an unambiguous beginning of it, e.g. "spu-0.9.5"; ValueError lists the names."""
    names = price_names()
    found = [known for known in names if known == name] or [n for n in names if n.startswith(str(name))]
    if len(found) != 1:
        raise ValueError(f"unknown prices {name!r}; choose from {', '.join(names)}")
    return UnitPrices(name=found[0], **json.loads((PRICE_FILES / f"{found[0]}.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class InferenceCost:
    """The cost of one private forward pass of T tokens, in total and by part (see `Architecture.parts`).

    Attributes:
        nonlinear_ops: name -> [how many, *shape], as Table 3 prints them; the final LayerNorm is not among them.
        flops_ffn, flops_attention: plain floating-point operations, as Tables 3, 4, 7 and 8 count them.
        communication_gb: 10^9 bytes, both ways.   latency_min: minutes.
        bytes, minutes: by part; they add up to the two above.
        per_layer_gb: communication of one layer, the mean of all; embedding and vocabulary left out.
    """

    architecture: Architecture
    context_length: int
    prices: str
    network: str
    nonlinear_ops: dict[str, list[int]]
    flops_ffn: int
    flops_attention: int
    bytes: dict[str, float] = field(repr=False)
    minutes: dict[str, float] = field(repr=False)
    per_layer_gb: float

    @property
    def communication_gb(self) -> float:
        return sum(self.bytes.values()) / 1e9

    @property
    def latency_min(self) -> float:
        return sum(self.minutes.values())

    def to_frame(self):
        """A DataFrame with one row a part and a total: GB, share of the GB, minutes."""
        import pandas as pd

        frame = pd.DataFrame({"GB": {part: value / 1e9 for part, value in self.bytes.items()}})
        frame["share"], frame["minutes"] = frame["GB"] / frame["GB"].sum(), pd.Series(self.minutes)
        frame.loc["total"] = frame.sum()
        return frame

    def _repr_html_(self) -> str:
        a, table = self.architecture, self.to_frame()
        head = (
            f"L={a.layers} H={a.heads} d={a.width} T={self.context_length} V={a.vocabulary:,}; prices {self.prices}, "
            f"network {self.network}; FFN {self.flops_ffn / 1e9:.1f}, attention {self.flops_attention / 1e9:.1f} GFLOP"
        )
        formats = {"GB": "{:.3g}".format, "share": "{:.0%}".format, "minutes": "{:.3g}".format}
        return f"<p>{html.escape(head)}</p>{table.to_html(formatters=formats)}"


def inference_cost(
    config, context_length: int, prices: str = "paper", network: Network | str | None = None, logits_to_keep: int = 0
) -> InferenceCost:
    """What one private forward pass over `context_length` tokens costs, operation by operation.

    Args:
        config: a model or its configuration, this library's or transformers' of one of `MODEL_TYPES` (GPT-2, OPT,
            GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma); or an `Architecture`.
        context_length: T, at most the model's positions.
        prices: "paper", fitted to the printed Tables 3, 4, 7 and 8; "spu-0.9.5-cheetah", measured here, with each
            operation as given; "optimized" and "bounded-logits", the same engine by cheaper `methods`;
            "spu-0.9.2b0-cheetah", the engine of the paper's time, measured here.
        network: a `Network` or a name in `NETWORKS`, which adds bytes / bandwidth + rounds × latency to the measured
            computation. None adds nothing; the paper's minutes include its network and cannot be moved to another.
        logits_to_keep: of the last so many tokens, 0 for all: 1 where a token is generated.

    Raises ValueError for unknown prices or an unknown network, a model or a length that has no price, and an
    operation that the prices have none for; FileNotFoundError without their files.
    """
    architecture = _architecture(config)
    context_length = architecture.checked_length(context_length)
    priced = unit_prices(prices)
    if isinstance(network, str):
        if network not in NETWORKS:
            raise ValueError(f"unknown network {network!r}; choose from {', '.join(NETWORKS)} or pass a Network")
        network = NETWORKS[network]
    if not (network is None or isinstance(network, Network)):
        raise ValueError(f"network must be a Network, one of {', '.join(NETWORKS)} or None, got {network!r}")
    if network and priced.includes_network:
        raise ValueError(f"the minutes of {priced.name!r} include the network they were measured on; pass network=None")
    if network and not priced.seconds:
        raise ValueError(f"{priced.name!r} has no minutes that a network could add to; pass network=None")
    sent, seconds = dict.fromkeys(architecture.parts, 0.0), dict.fromkeys(architecture.parts, 0.0)
    flops = dict.fromkeys(architecture.parts, 0)
    nonlinear: dict[str, list[int]] = {}
    per_layer = 0.0
    for operation in operations(architecture, context_length, logits_to_keep):
        communicated = priced.price(operation, priced.bytes)
        sent[operation.part] += communicated
        seconds[operation.part] += priced.price(operation, priced.seconds)
        if network:
            seconds[operation.part] += network.seconds(communicated, priced.rounds[operation.name])
        flops[operation.part] += operation.flops
        per_layer += communicated if operation.layer is not None else 0
        if operation.part in ("softmax", *NORMS.values(), "activation") and operation.layer is not None:
            heads = operation.shape[0] if len(operation.shape) == 3 else 1  # Table 3 counts every head
            of_heads = " of queries and keys" if operation.part != "softmax" and heads > 1 else ""
            entry = nonlinear.setdefault(operation.name + of_heads, [0, *operation.shape[-2:]])
            entry[0] += heads
    label = network.name if network else "included" if priced.includes_network else "none"
    return InferenceCost(
        architecture, context_length, priced.name, label,
        nonlinear, flops["FFN linear"], flops["attention linear"], sent,
        {part: value / 60 for part, value in seconds.items()}, per_layer / architecture.layers / 1e9,
    )  # fmt: skip


def savings(config, context_length: int, prices: str = "spu-0.9.5-cheetah", logits_to_keep: int = 0):
    """What each removal would save of a model's bytes, alone: a DataFrame, GB that are left and share saved.

    Arguments and errors are those of `inference_cost`. The rows: norms that became constants, as annealed LayerNorms do
    (the last stays); ReLU for the activation; all but one head of each layer static; all three. What a removal costs
    in perplexity is another question. A row is missing where there is nothing to remove.
    """
    import pandas as pd

    architecture = _architecture(config)
    changes = {}
    if architecture.layer_norm:
        changes["norms become constants"] = {"layer_norm": False, "query_key_norm": False}
    if architecture.activation not in ("relu", "linear"):
        changes[f"{architecture.activation} becomes relu"] = {"activation": "relu"}
    if architecture.heads > 1:
        changes["one softmax head a layer, the others static"] = {"dynamic_heads": (1,)}
    if len(changes) > 1:
        changes["all of these"] = {name: value for change in changes.values() for name, value in change.items()}
    cost = {
        name: inference_cost(replace(architecture, **change), context_length, prices, None, logits_to_keep)
        for name, change in {"as it is": {}, **changes}.items()
    }
    left = pd.Series({name: c.communication_gb for name, c in cost.items()})
    return pd.DataFrame({"GB": left, "saved": 1 - left / left["as it is"]})


def _architecture(config) -> Architecture:
    return config if isinstance(config, Architecture) else Architecture.of(getattr(config, "config", config))
