"""Train a tiny model with settings of your own and watch its loss and its heads while it trains."""

from __future__ import annotations

import base64
import copy
import json
import math
import threading
from pathlib import Path

import numpy as np
from plotly.colors import sample_colorscale
from traitlets import Bool, Dict, Enum, Float, Int, List, TraitError, Unicode, validate

from entropy_lib.entropy import diagnose
from entropy_lib.explore.figures import VARIANT_COLORS, loss_curves, page_color
from entropy_lib.explore.live_training import LiveRun
from entropy_lib.explore.module import ModuleExplorer, module_source
from entropy_lib.modeling import MODEL_SIZES
from entropy_lib.training.corpus import load_corpus, unigram_entropy
from entropy_lib.training.recipe import Recipe, get_recipe
from entropy_lib.training.train import Corpus
from entropy_lib.variants import VARIANTS, get_variant

MAX_RUNS = 6  # drawn; the oldest makes room for the next
DASHES = ("none", "9 5", "2 4", "9 4 2 4", "17 5", "17 4 2 4")  # of one run and the next: their colours are variants'
# Small steps and a short warm-up: a learning rate shows within seconds what it does. A run ends as collapsed sooner
# than in a study, where a few odd steps are worth sitting out; the words say so.
QUICK = {
    "sequences_per_step": 8, "micro_batch": 8, "warmup_ratio": 0.1, "entropy_every": 4, "eval_every": 0,
    "eval_blocks": 32, "checkpoint_every": 0, "max_skipped_in_a_row": 5,
}  # fmt: skip
PREPARED = Path(__file__).with_name("playground_runs.json")  # written by data/make/playground_runs.py
SETTINGS = {  # a trait: the field of the recipe
    "learning_rate": "learning_rate", "steps": "steps", "temperature": "temperature_init",
    "threshold": "threshold_init", "margin": "tolerance_margin_factor", "coefficient": "loss_coeff",
}  # fmt: skip
OF_TEMPERATURE, OF_PENALTY = ("temperature",), ("threshold", "margin", "coefficient")  # settings not all variants have
BUTTONS = ("run", "stop", "resume", "clear")


def training_playground(
    corpus: str | Corpus = "sample", recipe: str | Recipe = "smoke", *, size: str = "tiny", seed: int = 0,
    steps: int = 100, variant: str = "SM",
) -> TrainingPlayground:  # fmt: skip
    """Choose a variant and settings, press Run, and watch a tiny model train, as a widget.

    Training is `train_variant` in a thread, on the GPU if there is one. Stop leaves a checkpoint and Resume goes on
    from it; up to six runs are overlaid. What goes wrong is said above the curves. Without a kernel the page shows
    the runs that were made before it was saved, or else two prepared ones.

    Args:
        corpus: a name as in `load_corpus`, or what it returned.
        recipe: where the settings start, "smoke" or a `Recipe`; "smoke" is made quicker still, see QUICK.
        size: a preset of `build_model`.   seed: of every run.   steps: at the start, with "smoke".
        variant: the one chosen at the start.

    At a learning rate of 0.1 SM collapses within 20 steps, and SM+LN+G trains on.
    """
    recipe = get_recipe(recipe, steps=steps, **QUICK) if isinstance(recipe, str) else recipe
    return TrainingPlayground(corpus, recipe, size, seed, variant)


class TrainingPlayground(ModuleExplorer):
    """See `training_playground`. `runs` are the `LiveRun`s drawn, oldest first; `shown` is the one in the lower row.

    Traits: variant, learning_rate, steps, temperature (t₀), threshold (θ₀), margin (γ) and coefficient (λ), which are
    the settings of the next run; show (the number of the run that is shown, 0 for none); step (of training, whose map
    is shown; None for the newest). `drawn` is all that the page draws; from a training it is sent the new rows alone.
    """

    _esm = module_source("playground")
    variant = Enum(list(VARIANTS), "SM").tag(sync=True, state=True)
    learning_rate = Float().tag(sync=True, state=True)
    steps = Int(min=1, default_value=1).tag(sync=True, state=True)
    temperature = Float().tag(sync=True, state=True)
    threshold = Float().tag(sync=True, state=True)
    margin = Float().tag(sync=True, state=True)
    coefficient = Float().tag(sync=True, state=True)
    show = Int(0).tag(sync=True, state=True)
    step = Int(None, allow_none=True).tag(sync=True, state=True)
    drawn = Dict().tag(sync=True, state=True)
    trouble = Unicode().tag(sync=True, state=True)  # why the last press of a button did nothing
    kernel = Bool(True).tag(sync=True, state=True)
    most_steps = Int().tag(sync=True, state=True)
    lacking = Dict().tag(sync=True, state=True)  # settings that a variant does not have
    colors = List(Unicode(), sample_colorscale("Cividis", 64)).tag(sync=True, state=True)
    shades = List(Unicode(), sample_colorscale("Purples", np.linspace(0.42, 0.78, 18))).tag(sync=True, state=True)

    def __init__(self, corpus: str | Corpus, recipe: Recipe, size: str, seed: int, variant: str):
        self.recipe, self.size, self.seed, self.runs, self._count = recipe, size, seed, [], 0
        self._corpus_given, self._corpus, self._unigram = corpus, None, None
        self._lock = threading.RLock()  # the training's thread tells the page, and so does the kernel's
        super().__init__(
            variant=get_variant(variant).name,
            most_steps=max(500, recipe.steps),
            drawn={"runs": {}, "axis": loss_axis([])},
            lacking={
                name: OF_TEMPERATURE * (not kind.learnable_temperature) + OF_PENALTY * (not kind.entropy_regularization)
                for name, kind in VARIANTS.items()
            },
            **{name: getattr(recipe, field) for name, field in SETTINGS.items()},
        )
        self.on_msg(self._hear)

    @validate("show")
    def _one_of_them(self, proposal):
        numbers = [0, *(run.number for run in self.runs)]
        if proposal["value"] not in numbers:
            raise TraitError(f"show is the number of a run or 0, one of {numbers}, got {proposal['value']}")
        return proposal["value"]

    # -- what the buttons do, also for use without a notebook ---------------------------------------------------

    def run(self) -> None:
        """Start a run with the settings as they stand; returns at once."""
        if self._running():
            raise ValueError("a run is under way: stop it first")
        recipe = get_recipe(self.recipe, **{field: getattr(self, name) for name, field in SETTINGS.items()})
        run = LiveRun(
            f"{self._count + 1} · {_settings(self.variant, recipe)}", self.variant, self._load, recipe, size=self.size,
            seed=self.seed, on_change=self._tell,
        )  # fmt: skip
        self._count += 1
        run.number = self._count
        for old in self.runs[: len(self.runs) + 1 - MAX_RUNS]:
            old.close()
        self.runs = [*self.runs, run][-MAX_RUNS:]
        run.start()
        self._tell(run)
        self.show, self.step, self.trouble = run.number, None, ""

    def stop(self) -> None:
        """Have the run finish its step, save a checkpoint and stop; returns at once."""
        for run in self._running():
            run.stop()

    def resume(self) -> None:
        """Go on with the stopped run that is shown, from its checkpoint; returns at once."""
        if self._running() or self.shown is None:
            raise ValueError("nothing to resume: a run is under way, or there is none")
        self.shown.start()
        self._tell(self.shown)
        self.trouble = ""

    def clear(self) -> None:
        """Stop and forget all runs."""
        for run in self.runs:
            run.close()
        self.runs = []
        self._tell()
        self.show, self.step, self.trouble = 0, None, ""

    def wait(self, timeout: float | None = None) -> str | None:
        """The state of the shown run once its training has ended, or after `timeout` seconds."""
        return self.shown and self.shown.wait(timeout)

    def close(self) -> None:
        """End the training, then the widget: no thread outlives it."""
        for run in self.runs:
            run.close()
        super().close()

    @property
    def shown(self) -> LiveRun | None:
        return next((run for run in self.runs if run.number == self.show), None)

    def off(self) -> set[str]:
        """Settings and buttons that would do nothing now."""
        running = bool(self._running())
        resumable = not running and self.shown is not None and self.shown.state == "stopped"
        able = {"run": not running, "stop": running, "resume": resumable, "clear": bool(self.runs)}
        return {*self.lacking[self.variant], *(name for name in BUTTONS if not able[name])}

    # -- what is seen -------------------------------------------------------------------------------------------

    def words(self) -> str:
        """What is said above the curves."""
        return words_of(super().state())

    def heads(self) -> np.ndarray | None:
        """Entropies [layers, heads] in nats of the map that is shown, None where there is none."""
        run = self.drawn["runs"].get(str(self.show))
        row = None if run is None else row_at(run, self.step)
        return None if row is None else entropies_of(run, row)

    def still(self):
        """The losses of every run as a figure; without a kernel's runs, of the prepared ones."""
        runs = [run for run in self.state()["drawn"]["runs"].values() if any(map(_is_number, run["loss"]))]
        names = {f"{run['number']} · {run['variant']}": run for run in runs}
        losses = {name: [math.nan if loss is None else loss for loss in run["loss"]] for name, run in names.items()}
        return loss_curves(
            {name: {"step": run["steps"], "loss": losses[name]} for name, run in names.items()},
            title="Loss of every run",
            colors={name: VARIANT_COLORS[run["variant"]] for name, run in names.items()},
            stopped=[name for name, run in names.items() if run["state"] == "collapsed"],
            reference=dict([("unigram entropy: no use of context", run["unigram"]) for run in runs][:1]),
        )

    def state(self) -> dict:
        """What the page has without a kernel: the runs as they stand, or the prepared ones where none was made."""
        with self._lock:
            state = copy.deepcopy(super().state()) | {"kernel": False, "trouble": ""}
        runs = state["drawn"]["runs"]
        if not any(run["steps"] for run in runs.values()):
            return state | {"drawn": json.loads(PREPARED.read_text(encoding="utf-8")), "show": 1, "step": None}
        for run in runs.values():
            run["state"] = "stopped" if run["state"] == "running" else run["state"]
        return state

    def get_state(self, key=None, drop_defaults=False):
        """As ipywidgets does, but never in the middle of a row that the training adds."""
        with self._lock:
            return copy.deepcopy(super().get_state(key, drop_defaults))

    def _tell(self, run: LiveRun | None = None) -> None:
        """Bring `drawn` up to date, and the pages by a message: which runs there are, and of `run` what is new.

        Not by the trait, which would send all rows anew, and which the training's thread had better not set.
        """
        with self._lock:
            numbers, runs = [run.number for run in self.runs], self.drawn["runs"]
            for number in set(runs) - set(map(str, numbers)):
                del runs[number]
            message = {"numbers": numbers}
            if run in self.runs:  # it may have been cleared meanwhile
                kept = runs.setdefault(str(run.number), {"steps": [], "loss": [], "entropy": []})
                first, now = len(kept["steps"]), self._described(run)
                rows = [_packed(row) for row in run.rows[first:]]
                new = {name: [row[name] for row in rows] for name in ("steps", "loss", "entropy")}
                for name, values in new.items():
                    kept[name].extend(values)
                kept.update(now)
                message["run"] = {**now, **new, "first": first}
            self.drawn["axis"] = message["axis"] = loss_axis(runs.values())
            self.send(message)

    def _hear(self, _, content: dict, buffers) -> None:
        """A press of a button, with the settings as the page has them, since those may still be on their way."""
        if "missed" in content:  # a page that was not there when a row was told
            return self.send_state("drawn")
        try:
            for name, value in content.get("settings", {}).items():
                if name in ("variant", "show", *SETTINGS):
                    setattr(self, name, value)
            if content.get("press") in BUTTONS:
                getattr(self, content["press"])()
        except (ValueError, OSError, TraitError) as error:
            self.trouble = str(error)

    def _running(self) -> list[LiveRun]:
        return [run for run in self.runs if run.state == "running"]

    def _described(self, run: LiveRun) -> dict:
        """A run for the page, without its rows."""
        size, record, color = MODEL_SIZES[self.size], run.record, VARIANT_COLORS[run.variant]
        return {
            "number": run.number,
            "name": run.name,
            "variant": run.variant,
            "color": page_color(color),
            "dash": DASHES[(run.number - 1) % MAX_RUNS],
            "state": run.state,
            "step": run.step,
            "planned": run.recipe.steps,
            "lost": run.recipe.max_skipped_in_a_row,
            "usual": Recipe().max_skipped_in_a_row,
            "context": run.recipe.context_length,
            "layers": size["n_layer"],
            "heads": size["n_head"],
            "unigram": self._unigram,
            "minutes": record and record.minutes,
            "eval_loss": record and (record.eval_loss if _is_number(record.eval_loss) else None),
            "error": run.error and f"{type(run.error).__name__}: {run.error}",
        }

    def _load(self) -> Corpus:
        if self._corpus is None:
            given = self._corpus_given
            corpus = load_corpus(given, self.recipe.context_length) if isinstance(given, str) else given
            self._unigram = unigram_entropy(corpus[0])
            self._corpus = corpus
        return self._corpus


def loss_axis(runs) -> dict:
    """The losses' axis of runs as in `drawn`: its ends, whether it is logarithmic, and where what exceeds it is drawn.

    It is logarithmic where a run explodes: a linear axis would hide that run, or all others.
    """
    runs = list(runs)
    marks = [run["unigram"] for run in runs if run["unigram"]]
    top = 1.1 * max([run["loss"][0] for run in runs if run["loss"] and _is_number(run["loss"][0])] + marks, default=8)
    finite = [loss for run in runs for loss in run["loss"] if _is_number(loss)]
    low, high = min(finite + marks, default=0), max(finite, default=0)
    exploded = high > 1.5 * top
    if exploded:
        limit = min(high, 1e2 * top)
        top = 1.5 * limit
        return {"log": True, "low": low * (low / top) ** 0.12, "high": top, "limit": limit}
    return {"log": False, "low": low - 0.12 * (top - low), "high": top, "limit": top - 0.05 * (top - low)}


def row_at(run: dict, step: int | None) -> int | None:
    """The row of a run as in `drawn` at a step, or at the last recorded one before it; the newest for None."""
    if not run["steps"]:
        return None
    return len(run["steps"]) - 1 if step is None else max(int(np.searchsorted(run["steps"], step, side="right")) - 1, 0)


def entropies_of(run: dict, row: int) -> np.ndarray:
    """Entropies [layers, heads] in nats of a row of a run as in `drawn`."""
    values = np.frombuffer(base64.b64decode(run["entropy"][row]), "<f4").copy()  # which torch may write to
    return values.reshape(run["layers"], run["heads"])


def words_of(state: dict) -> str:
    """What the page says in this state: how the shown run stands, and its loss and heads at the step of the map."""
    run = state["drawn"]["runs"].get(str(state["show"]))
    if run is None:
        return "Press Run. At learning rate 0.1, SM collapses within 20 steps; does SM+LN+G?"
    parts = [f"{_stands(run, state['kernel'])} step {run['step']} of {run['planned']}"]
    row = row_at(run, state["step"])
    if row is not None:
        loss = run["loss"][row]
        loss = f"loss {loss:.3g} nats a token" if _is_number(loss) else "loss not finite"
        parts.append(loss if row == len(run["steps"]) - 1 else f"at step {run['steps'][row]}: {loss}")
        counts, heads = diagnose(entropies_of(run, row), run["context"]), []
        for name, of_layers in counts.items():
            layers = [str(layer) for layer, count in enumerate(of_layers.tolist()) if count and name != "healthy"]
            heads.append(f"{int(of_layers.sum())} {name}" + (f" (layer {', '.join(layers)})" if layers else ""))
        parts.append("heads: " + ", ".join(heads))
    return " · ".join(parts)


def _stands(run: dict, kernel: bool) -> str:
    if run["state"] == "failed":
        return f"Failed: {run['error']}."
    if run["state"] == "collapsed":
        rule = "" if run["lost"] == run["usual"] else f" (the library’s own rule is {run['usual']})"
        return f"Collapsed: {run['lost']} steps in a row without a finite gradient{rule}."
    if run["state"] == "finished":
        loss = "not finite" if run["eval_loss"] is None else f"{run['eval_loss']:.3g}"
        return f"Finished in {run['minutes']:.2g} min, validation loss {loss}."
    if run["state"] == "stopped":
        return "Stopped; Resume goes on from here." if kernel else "Stopped."
    return "Training." if run["step"] else "Loading the corpus."


def _settings(variant: str, recipe: Recipe) -> str:
    """What tells a run from others in a list."""
    kind, words = get_variant(variant), [variant, f"lr {recipe.learning_rate:.2g}"]
    if kind.learnable_temperature:
        words.append(f"t {recipe.temperature_init:.2g}")
    if kind.entropy_regularization:
        words.append(f"θ {recipe.threshold_init:g}, γ {recipe.tolerance_margin_factor:g}, λ {recipe.loss_coeff:.2g}")
    return ", ".join(words)


def _packed(row: dict) -> dict:
    """A recorded row for the page: the entropies as base64 of float32, which they are."""
    entropy = base64.b64encode(np.array(row["entropy"], dtype="<f4").tobytes()).decode()
    return {"steps": row["step"], "loss": row["loss"] if _is_number(row["loss"]) else None, "entropy": entropy}


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
