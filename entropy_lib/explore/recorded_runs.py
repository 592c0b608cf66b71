"""Explorer of recorded runs: two of them side by side at any training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plotly.colors import sample_colorscale
from traitlets import Dict, Enum, Int, List, TraitError, Unicode, observe, validate

from entropy_lib.clone import CLONE
from entropy_lib.entropy import diagnose, entropy_bands, head_entropies
from entropy_lib.explore.figures import BANDS, INK, VARIANT_COLORS, entropy_heatmaps, page_color
from entropy_lib.explore.module import ModuleExplorer, in_planes, module_source, zipped
from entropy_lib.training.records import RunRecord, load_runs

RUNS = CLONE / "data" / "runs" if CLONE else Path(__file__).with_name("example_runs")
SIDES = ("left", "right")
SYMBOLS = {"thresholds": "θ", "temperatures": "t", "alpha": "α", "beta": "β"}  # of a history's columns
EXACT, COARSE = 65_535, 255  # highest level of a number in two bytes, and in one
ROOM, STEPS = 115_000, 64  # of the page without a kernel: characters of zipped histories, and steps of one


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

    Entropies are those of the training batch, in nats; θ and t are means over the heads of a layer. Click a head, or
    move through a map by the arrow keys, to follow it through training in both runs; what is selected in the page's
    penalty explorer is shown here too, on the left. Without a kernel the lists hold the runs that fit into the page.
    Raises ValueError where there is no record.
    """
    return RunExplorer(recorded(records))


class RunExplorer(ModuleExplorer):
    """See `run_explorer`. Traits: left and right (indices of runs), step (of training), learned (which parameter).

    `selected` is [layer, head] of at least one of the two runs that are shown, or empty. `histories` are of these two.
    What the page says is here from the records: `shown`, `words`.
    """

    _esm = module_source("recorded_runs")
    runs = List(Dict()).tag(sync=True, state=True)
    histories = Dict().tag(sync=True, state=True)
    left_out = Int(0).tag(sync=True, state=True)  # runs that a kernel would have
    left = Int(0, min=0).tag(sync=True, state=True)
    right = Int(0, min=0).tag(sync=True, state=True)
    step = Int(0, min=0).tag(sync=True, state=True)
    learned = Enum(list(SYMBOLS), "thresholds").tag(sync=True, state=True)
    selected = List(Int()).tag(sync=True, state=True)
    symbols = Dict(SYMBOLS).tag(sync=True, state=True)
    colors = List(Unicode(), sample_colorscale("Cividis", 64)).tag(sync=True, state=True)
    shades = List(Unicode(), sample_colorscale("Purples", np.linspace(0.4, 0.8, 18))).tag(sync=True, state=True)
    bands = Dict(BANDS).tag(sync=True, state=True)

    def __init__(self, records: Sequence[RunRecord]):
        self.records, self._packed = list(records), {}
        left, right = _story(self.records)
        super().__init__(runs=[_named(record) for record in self.records], left=left, right=right)
        self._hand_over()

    @validate("left", "right")
    def _one_of_them(self, proposal):
        if proposal["value"] >= len(self.records):
            raise TraitError(f"{proposal['trait'].name} is an index of {len(self.records)} records")
        return proposal["value"]

    @validate("selected")
    def _a_head(self, proposal):
        if proposal["value"] and not self._has(proposal["value"]):
            raise TraitError(f"selected is [layer, head] of one of the two runs, or empty; got {proposal['value']}")
        return proposal["value"]

    def _has(self, place: list[int]) -> bool:
        shapes = [np.shape(self.shown(side)[0].entropy) for side in SIDES]
        return len(place) == 2 and any(0 <= place[0] < layers and 0 <= place[1] < heads for layers, heads in shapes)

    @observe("left", "right")
    def _hand_over(self, change=None):
        if self.selected and not self._has(self.selected):
            self.selected = []
        for index in (self.left, self.right):
            if index not in self._packed:
                self._packed[index] = _history(self.records[index], np.arange(len(self.records[index].history)), EXACT)
        self.histories = {str(index): self._packed[index] for index in (self.left, self.right)}

    def state(self) -> dict:
        """What the page has without a kernel: the runs shown, one of each known variant, and others, up to `ROOM`."""
        kept, room, variants = {}, ROOM, [record.variant for record in self.records]
        firsts = sorted(variants.index(variant) for variant in VARIANT_COLORS if variant in variants)
        for index in dict.fromkeys([self.left, self.right, *firsts, *range(len(self.records))]):
            rows = len(self.records[index].history)
            every = math.ceil(rows / STEPS)
            history = _history(self.records[index], np.unique([*range(0, rows, every), rows - 1]), COARSE)
            room -= len(zipped(history))
            if room < 0 and index not in (self.left, self.right):
                break
            kept[index] = history
        order = sorted(kept)
        return super().state() | {
            "runs": [self.runs[index] for index in order],
            "histories": {str(place): kept[index] for place, index in enumerate(order)},
            "left": order.index(self.left),
            "right": order.index(self.right),
            "left_out": len(self.runs) - len(order),
        }

    def shown(self, side: str) -> tuple[RunRecord, int]:
        """(record, row of its history) on a side, "left" or "right"."""
        record = self.records[getattr(self, side)]
        return record, max(int(record.history["step"].searchsorted(self.step, side="right")) - 1, 0)

    def words(self, digits: int = 2) -> str:
        """What the explorer says of the two runs, a line each; without a kernel an entropy has one digit."""
        lines = []
        for record, row in map(self.shown, SIDES):
            now = record.history.iloc[row]
            loss = f"{now['loss']:.3f}" if math.isfinite(now["loss"]) else "not finite"
            states, _ = counts(now["entropy"], record.context_length)
            heads = " · ".join(f"{count} {state}" for state, count in states.items())
            entropy = head_entropies(now["entropy"])
            static = int(entropy.isnan().sum())
            heads += f" · {static} static" * (static > 0)
            if self.selected and all(n < count for n, count in zip(self.selected, entropy.shape, strict=True)):
                nats = entropy[tuple(self.selected)].item()
                heads += " · layer {}, head {}: ".format(*self.selected)
                heads += "static" if math.isnan(nats) else f"{nats:.{digits}f} nats"
            lines.append(f"{record.variant} at step {now['step']}: loss {loss} · {heads}")
        return "\n".join(lines)

    def still(self):
        """The maps of the two runs at the step that is shown, as a figure."""
        shown = [self.shown(side) for side in SIDES]
        maps = {run_name(record): head_entropies(record.history["entropy"].iloc[row]) for record, row in shown}
        longest = max(record.context_length for record, _ in shown)
        return entropy_heatmaps(maps, longest, f"Entropy of every head at step {self.step:,}")


def counts(entropy, context_length: int) -> tuple[dict[str, int], list[float]]:
    """Heads [L, H] by state, as `diagnose` counts them, and their shares in the four bands, in percent."""
    states = {state: int(heads.sum()) for state, heads in diagnose(entropy, context_length).items()}
    return states, [round(100 * share, 2) if share == share else 0.0 for share in entropy_bands(entropy).tolist()]


def learned_means(record: RunRecord, column: str) -> np.ndarray | None:
    """A learned parameter by recorded step and layer, [N, L], mean over heads; NaN in steps without, None for none."""
    values = [np.atleast_1d(np.array(value, dtype=float)) for value in record.history[column]]  # None becomes [NaN]
    layers = max(len(value) for value in values)
    values = [value if len(value) == layers else np.full(layers, math.nan) for value in values]
    means = np.array([masked_mean(value.reshape(layers, -1)) for value in values])
    return None if np.isnan(means).all() else means


def masked_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last dimension of what is not NaN; NaN where there is nothing."""
    return np.ma.masked_invalid(values).mean(-1).filled(math.nan)


def _named(record: RunRecord) -> dict:
    color = page_color(VARIANT_COLORS.get(record.variant, INK))
    return {"name": run_name(record), "group": folder_of(record), "variant": record.variant, "color": color}


def _history(record: RunRecord, rows: np.ndarray, levels: int) -> dict:
    """Rows of a run's history for the page; `levels` are the entropies', EXACT or COARSE."""
    table, ceiling = record.history.iloc[rows], math.log(record.context_length)
    entropy = np.stack([head_entropies(heads).numpy() for heads in table["entropy"]])  # [N, L, H]
    counted = [counts(heads, record.context_length) for heads in table["entropy"]]
    learned = {column: learned_means(record, column) for column in SYMBOLS}
    return {
        "layers": entropy.shape[1],
        "heads": entropy.shape[2],
        "ceiling": ceiling,
        "steps": table["step"].tolist(),
        "loss": [loss if math.isfinite(loss) else None for loss in table["loss"]],
        "entropy": _levels(entropy, 0.0, ceiling, levels),
        "states": [list(states.values()) for states, _ in counted],
        "bands": [shares for _, shares in counted],
        "learned": {
            column: _levels(values[rows], float(np.nanmin(values[rows])), float(np.nanmax(values[rows])), EXACT)
            for column, values in learned.items()
            if values is not None
        },
    }


def _levels(values: np.ndarray, low: float, high: float, levels: int) -> dict:
    """Numbers [N, ...] as whole shares, low is 0 and high `levels` - 1, in one byte or two; `levels` itself is NaN.

    In planes, and from the second step on as differences from the one before, which wrap: a zip likes both.
    """
    shares = np.clip((values - low) / ((high - low) or 1), 0, 1) * (levels - 1)
    whole = np.where(np.isnan(values), levels, np.rint(shares)).astype("<u2" if levels > COARSE else "u1")
    whole[1:] -= whole[:-1].copy()
    return {"low": low, "high": high, "levels": levels, "data": in_planes(whole)}
