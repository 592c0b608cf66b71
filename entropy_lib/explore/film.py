"""The collapse film: the entropy of every head at every recorded step of a few runs, played side by side."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable

import numpy as np
import torch
from plotly.colors import sample_colorscale
from traitlets import Dict, Float, Int, List, Unicode

from entropy_lib.explore.figures import PALETTE, VARIANT_COLORS, entropy_heatmaps
from entropy_lib.explore.module import ModuleExplorer, module_source
from entropy_lib.training.records import RunRecord

LEVELS = 255  # of an entropy's share of log T, one byte a head and step


def collapse_film(records: Iterable[RunRecord], last_step: int | None = None) -> CollapseFilm:
    """Entropy maps of one to six runs, with their losses and the learning rate, step by step from 1 to `last_step`.

    For runs that recorded every step (`Recipe.entropy_every` = 1, `python notebooks/paper experiments collapse`); where
    one did not, the last recorded step stands. A run that breaks stays as it was. The learning rate is the first run's.
    Raises ValueError for no run or more than six, for runs of different context lengths and static heads.
    """
    records = list(records)
    if not 1 <= len(records) <= 6:
        raise ValueError(f"expected one to six runs, got {len(records)}")
    if len(lengths := {record.context_length for record in records}) > 1:
        raise ValueError(f"entropies of different context lengths have different ceilings: {sorted(lengths)}")
    film = CollapseFilm(ceiling=math.log(lengths.pop()))
    film.records = records
    film.runs = [film.run(record, last_step) for record in records]
    for run, color in zip(film.runs, PALETTE, strict=False):
        run["color"] = VARIANT_COLORS.get(run["name"], color)
    film.last_step = max(run["steps"][-1] for run in film.runs)
    rates = records[0].history[["step", "learning_rate"]].to_numpy()
    film.learning_rate = rates[rates[:, 0] <= film.last_step].tolist()
    return film


class CollapseFilm(ModuleExplorer):
    """See `collapse_film`. Traits: step (the one that is shown), runs, ceiling (log T), learning_rate [n][step, rate].

    Of each run: name, color, layers, heads, steps [n], loss [n] (None where it is not finite), `entropy` (base64 of
    [n, layers, heads] bytes: shares of log T in 255ths), and `broke`, the first step that was not finite, or None.
    """

    _esm = module_source("film")
    step = Int(1, min=1).tag(sync=True, state=True)
    last_step = Int(1).tag(sync=True, state=True)
    runs = List(Dict()).tag(sync=True, state=True)
    ceiling = Float().tag(sync=True, state=True)
    learning_rate = List(List(Float())).tag(sync=True, state=True)
    colors = List(Unicode(), sample_colorscale("Cividis", LEVELS + 1)).tag(sync=True, state=True)

    def run(self, record: RunRecord, last_step: int | None) -> dict:
        history = record.history if last_step is None else record.history[record.history["step"] <= last_step]
        entropy = np.array([np.stack(rows) for rows in history["entropy"]], dtype=float)
        if not np.isfinite(entropy).all():
            raise ValueError(f"{record.name} has static heads, whose entropy is not defined: leave it out")
        broken = history.loc[history["skipped"] > 0, "step"]
        return {
            "name": record.variant,
            "layers": entropy.shape[1],
            "heads": entropy.shape[2],
            "steps": history["step"].tolist(),
            "loss": [loss if math.isfinite(loss) else None for loss in history["loss"]],
            "entropy": base64.b64encode(np.rint(entropy / self.ceiling * LEVELS).astype(np.uint8)).decode(),
            "broke": int(broken.iloc[0]) if len(broken) else None,
        }

    def entropies(self) -> dict[str, torch.Tensor]:
        """Every run's entropies [layers, heads] in nats at the step that is shown, or the last one before it."""
        maps = {}
        for record in self.records:
            at = max(record.history["step"].searchsorted(min(self.step, self.last_step), side="right") - 1, 0)
            maps[record.variant] = torch.tensor(np.stack(record.history["entropy"].iloc[at]))
        return maps

    def still(self):
        """The maps at the step that is shown, as a figure."""
        title = f"Entropy of every head at step {self.step:,}"
        return entropy_heatmaps(self.entropies(), round(math.exp(self.ceiling)), title)
