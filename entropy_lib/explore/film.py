"""The collapse film: the entropy of every head at every recorded step of a few runs, played side by side."""

from __future__ import annotations

import base64
import io
import math
import re
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from plotly.colors import sample_colorscale
from traitlets import Bool, Dict, Float, Int, List, Unicode

from entropy_lib.explore.figures import INK, OVERLOAD, PALETTE, VARIANT_COLORS, entropy_heatmaps, page_color
from entropy_lib.explore.module import ModuleExplorer, module_source
from entropy_lib.training.records import RunRecord

LEVELS = 255  # of an entropy's share of log T, one byte a head and step


def collapse_film(records: Iterable[RunRecord], last_step: int | None = None, opens_page: bool = False) -> CollapseFilm:
    """Entropy maps of one to six runs, with their losses and the learning rate, step by step from 1 to `last_step`.

    For runs that recorded every step (`Recipe.entropy_every` = 1, `python notebooks/paper experiments collapse`); where
    one did not, the last recorded step stands. A run that breaks stays as it was. The learning rate is the first run's.
    With `opens_page` its first drawing scrolls the notebook to it, where "Run All" would leave the reader at the end.
    Raises ValueError for no run or more than six, for runs of different context lengths and static heads.
    """
    records = list(records)
    if not 1 <= len(records) <= 6:
        raise ValueError(f"expected one to six runs, got {len(records)}")
    if len(lengths := {record.context_length for record in records}) > 1:
        raise ValueError(f"entropies of different context lengths have different ceilings: {sorted(lengths)}")
    film = CollapseFilm(ceiling=math.log(lengths.pop()), opens_page=opens_page)
    film.records = records
    runs = [film.run(record, last_step) for record in records]
    colors = [VARIANT_COLORS.get(run["name"], color) for run, color in zip(runs, PALETTE, strict=False)]
    film.runs = [run | {"color": page_color(color)} for run, color in zip(runs, colors, strict=True)]
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
    opens_page = Bool(False).tag(sync=True)  # with a kernel only: a page that is opened is at its top
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

    def animation(self, every: int = 3, fps: int = 15) -> bytes:
        """The maps of every `every`-th step as an animated WebP, for where nothing runs (a GIF is six times larger)."""
        cell, gap, top = 11, 14, 42
        size = [max(run[name] for run in self.runs) * cell for name in ("heads", "layers")]
        colors = np.array([re.findall(r"\d+", color) for color in self.colors], dtype=np.uint8)
        frames, font = [], ImageFont.load_default(12)
        for step in [*range(1, self.last_step, every), *[self.last_step] * (2 * fps)]:
            frame = Image.new("RGB", (gap + len(self.runs) * (size[0] + gap), top + size[1] + 24), "white")
            pen = ImageDraw.Draw(frame)
            pen.text((gap, 4), f"step {step}", INK, ImageFont.load_default(13))
            for place, run in enumerate(self.runs):
                x = gap + place * (size[0] + gap)
                at = max(bisect_right(run["steps"], step) - 1, 0)
                shape = len(run["steps"]), run["layers"], run["heads"]
                levels = np.frombuffer(base64.b64decode(run["entropy"]), np.uint8).reshape(shape)[at]
                grid = Image.fromarray(colors[levels])
                frame.paste(
                    grid.resize((run["heads"] * cell, run["layers"] * cell), Image.Resampling.NEAREST), (x, top)
                )
                broke, loss = run["broke"], run["loss"][at]
                words = f"broke at step {broke}" if broke and step >= broke else f"loss {loss:.3g}"
                pen.text((x, top - 18), run["name"], INK, font)
                pen.text((x, top + size[1] + 4), words, OVERLOAD if words.startswith("broke") else INK, font)
            frames.append(frame)
        file = io.BytesIO()
        options = {"duration": 1000 // fps, "loop": 0, "lossless": True, "quality": 100, "method": 6}
        frames[0].save(file, "webp", save_all=True, append_images=frames[1:], **options)
        return file.getvalue()

    def still(self):
        """The maps at the step that is shown, as a figure."""
        title = f"Entropy of every head at step {self.step:,}"
        return entropy_heatmaps(self.entropies(), round(math.exp(self.ceiling)), title)
