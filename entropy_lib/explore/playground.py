"""Train a tiny model with settings of your own and watch its loss and its heads while it trains."""

from __future__ import annotations

import html
import math
import threading

import ipywidgets as widgets

from entropy_lib.entropy import diagnose
from entropy_lib.explore.controls import Explorer, coloured, dropdown, legible, row, slider
from entropy_lib.explore.figures import COLLAPSE, OVERLOAD, PALETTE, VARIANT_COLORS, significant
from entropy_lib.explore.live_training import LiveRun
from entropy_lib.explore.playground_figure import MAX_RUNS, empty_figure
from entropy_lib.modeling import MODEL_SIZES
from entropy_lib.training.corpus import load_corpus, unigram_entropy
from entropy_lib.training.recipe import Recipe, get_recipe
from entropy_lib.training.train import Corpus
from entropy_lib.variants import VARIANTS, get_variant

DASHES = (
    "solid",
    "dash",
    "dot",
    "dashdot",
    "longdash",
    "longdashdot",
)  # of one run and the next: variants have colours, and some share one
# Small steps and a short warm-up: a learning rate shows within seconds what it does. A run ends as collapsed sooner
# than in a study, where a few odd steps are worth sitting out.
QUICK = {
    "sequences_per_step": 8, "micro_batch": 8, "warmup_ratio": 0.1, "entropy_every": 4, "eval_every": 0,
    "eval_blocks": 32, "checkpoint_every": 0, "max_skipped_in_a_row": 5,
}  # fmt: skip


class TrainingPlayground(Explorer):
    """See `training_playground`. `runs` are the `LiveRun`s drawn, oldest first; `shown` is the one in the lower row."""

    def __init__(self, corpus: str | Corpus, recipe: Recipe, size: str, seed: int, variant: str):
        self.recipe, self.size, self.seed, self.runs, self._count = recipe, size, seed, [], 0
        self._corpus_given, self._corpus, self._unigram = corpus, None, None
        self._lock = threading.RLock()  # the training's thread draws, and so does the kernel's
        narrow = {"width": "165px"}
        controls = {
            "variant": dropdown("variant", "Variant", list(VARIANTS), get_variant(variant).name),
            "learning_rate": slider(
                "learning_rate", "Learning rate", recipe.learning_rate, 1e-4, 1.0, 0.1, log=True, form=".2g",
                width="270px",
            ),
            "steps": slider("steps", "Steps", recipe.steps, 1, max(500, recipe.steps), 1, **narrow),
            "temperature": slider(
                "temperature", "t₀", recipe.temperature_init, 1e-3, 10.0, 0.1, log=True, form=".2g",
                tip="temperature of every head and position before the first step", **narrow,
            ),
            "threshold": slider(
                "threshold", "θ₀", recipe.threshold_init, 0.0, 1.0, 0.05,
                tip="threshold of every head before the first step, as a fraction of log T", **narrow,
            ),
            "margin": slider(
                "margin", "γ", recipe.tolerance_margin_factor, 0.0, 0.5, 0.01,
                tip="tolerance margin, as a fraction of log T", **narrow,
            ),
            "coefficient": slider(
                "coefficient", "λ", recipe.loss_coeff, 1e-3, 10.0, 0.1, log=True, form=".2g",
                tip="weight of the penalty, a mean over heads and queries; the paper's 1e-5 of the sum is 0.16 here",
                **narrow,
            ),
            "show": dropdown("show", "Show", [("no run yet", None)], width="260px"),
        }  # fmt: skip
        self.buttons = {
            name: _button(name, lambda _, action=action: self._press(action))
            for name, action in (("run", self.run), ("stop", self.stop), ("resume", self.resume), ("clear", self.clear))
        }
        self.progress = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="140px"))
        self.progress.add_class("entropy-progress")
        rows = [["variant", "learning_rate", "steps"], ["temperature", "threshold", "margin", "coefficient"]]
        rows.append([row(*self.buttons.values()), self.progress, "show"])
        self._layers = MODEL_SIZES[size]["n_layer"]
        figure = empty_figure(self._layers, recipe.context_length)
        super().__init__(figure, controls, rows)

    # -- what the buttons do, also for use without a notebook ---------------------------------------------------

    def run(self) -> None:
        """Start a run with the settings of the controls; returns at once."""
        if self._running():
            raise ValueError("a run is under way: stop it first")
        value = {name: control.value for name, control in self.controls.items()}
        recipe = get_recipe(
            self.recipe, steps=value["steps"], learning_rate=value["learning_rate"], loss_coeff=value["coefficient"],
            tolerance_margin_factor=value["margin"], temperature_init=value["temperature"],
            threshold_init=value["threshold"],
        )  # fmt: skip
        self._count += 1
        run = LiveRun(
            f"{self._count} · {_settings(value['variant'], recipe)}", value["variant"], self._load, recipe,
            size=self.size, seed=self.seed, on_change=lambda run: self.redraw("training"),
        )  # fmt: skip
        run.number = self._count
        for old in self.runs[: len(self.runs) + 1 - MAX_RUNS]:
            old.close()
        self._show([*self.runs, run][-MAX_RUNS:], run)
        run.start()
        self.redraw("training")

    def stop(self) -> None:
        """Have the run finish its step, save a checkpoint and stop; returns at once."""
        for run in self._running():
            run.stop()

    def resume(self) -> None:
        """Go on with the stopped run that is shown, from its checkpoint; returns at once."""
        if self._running() or self.shown is None:
            raise ValueError("nothing to resume: a run is under way, or there is none")
        self.shown.start()
        self.redraw("training")

    def clear(self) -> None:
        """Stop and forget all runs."""
        for run in self.runs:
            run.close()
        self._show([], None)
        self.redraw("training")

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
        return self.controls["show"].value

    # -- drawing ------------------------------------------------------------------------------------------------

    def redraw(self, changed: str | None = None) -> None:
        with self._lock:
            super().redraw(changed)

    def draw(self, changed: str | None) -> None:
        variant = get_variant(self.controls["variant"].value)
        self.controls["temperature"].disabled = not variant.learnable_temperature
        for name in ("threshold", "margin", "coefficient"):
            self.controls[name].disabled = not variant.entropy_regularization
        if changed not in (None, "training", "show"):
            return  # the settings of the next run
        if changed != "show":
            self._draw_losses()
        self._draw_heads()
        running, shown = bool(self._running()), self.shown
        self.buttons["run"].disabled, self.buttons["stop"].disabled = running, not running
        self.buttons["resume"].disabled = running or shown is None or shown.state != "stopped"
        self.buttons["clear"].disabled = not self.runs
        self.progress.max = shown.recipe.steps if shown else 1
        self.progress.value = shown.step if shown else 0
        bad = shown is not None and shown.state in ("collapsed", "failed")
        self.progress.bar_style = "danger" if bad else "success" if shown and shown.state == "finished" else ""
        self.say(_words(shown))

    def _draw_losses(self) -> None:
        data, first = self.figure.data, [run.rows[0]["loss"] for run in self.runs if run.rows]
        marks = [self._unigram] if self._unigram else []
        top = 1.1 * max(first + marks, default=8)
        finite = [r["loss"] for run in self.runs for r in run.rows if math.isfinite(r["loss"])]
        low, high = min(finite + marks, default=0), max(finite, default=0)
        exploded = high > 1.5 * top  # a linear axis would hide that run, or all others
        high = min(high, 1e2 * top)
        top = 1.5 * high if exploded else top
        limit = high if exploded else top - 0.05 * (top - low)
        crosses = []
        for slot in range(MAX_RUNS):
            run = self.runs[slot] if slot < len(self.runs) else None
            rows = list(run.rows) if run else []
            line = {"x": [r["step"] for r in rows], "y": significant([r["loss"] for r in rows])}
            if run:
                color = legible(VARIANT_COLORS.get(run.variant, PALETTE[slot]))
                line |= {"name": run.name, "line.color": color, "line.dash": DASHES[(run.number - 1) % MAX_RUNS]}
                if run.state == "collapsed" and rows:
                    last = [r["loss"] for r in rows if math.isfinite(r["loss"])][-1:] or [limit]
                    crosses.append((run.step, min(*last, limit), color))
            data[slot].update({**line, "showlegend": run is not None}, overwrite=True)
        x, y, colors = zip(*crosses, strict=True) if crosses else ([], [], [])
        data[MAX_RUNS].update({"x": x, "y": y, "marker.color": colors})
        axis = self.figure.layout
        room = (
            [low * (low / top) ** 0.12, top] if exploded else [low - 0.12 * (top - low), top]
        )  # for the word under the dashed line
        axis.yaxis.update(type="log" if exploded else "linear", range=[*map(math.log10, room)] if exploded else room)
        axis.xaxis.range = [0, max([run.recipe.steps for run in self.runs], default=self.controls["steps"].value)]
        if self._unigram:
            axis.shapes[0].update(y0=self._unigram, y1=self._unigram, visible=True)
            axis.annotations[-1].update(y=math.log10(self._unigram) if exploded else self._unigram, visible=True)

    def _draw_heads(self) -> None:
        shown, layout = self.shown, self.figure.layout
        rows = list(shown.rows) if shown else []
        steps = [r["step"] for r in rows]
        lines = self.figure.data[MAX_RUNS + 1 : -1]
        for layer, line in enumerate(lines):
            line.update(x=steps, y=significant([sum(r["entropy"][layer]) / len(r["entropy"][layer]) for r in rows]))
        self.figure.data[-1].z = [significant(heads) for heads in rows[-1]["entropy"]] if rows else None
        layout.xaxis2.range = [0, shown.recipe.steps if shown else self.controls["steps"].value]
        name = f": {shown.name}" if shown else ""
        layout.annotations[1].text = f"<b>Mean entropy by layer{html.escape(name)}</b>"
        layout.annotations[2].text = f"<b>Every head{f' at step {steps[-1]}' if rows else ''}</b>"

    # -- runs ---------------------------------------------------------------------------------------------------

    def _press(self, action) -> None:
        try:
            action()
        except (ValueError, OSError) as error:
            self.say(coloured(html.escape(str(error)), OVERLOAD))

    def _running(self) -> list[LiveRun]:
        return [run for run in self.runs if run.state == "running"]

    def _show(self, runs: list[LiveRun], shown: LiveRun | None) -> None:
        with self._lock:
            self.runs, show = runs, self.controls["show"]
            self._drawing = True  # the list changes in two steps, of which neither is to be drawn
            show.options = [(run.name, run) for run in runs] or [("no run yet", None)]
            show.value = shown
            self._drawing = False

    def _load(self) -> Corpus:
        if self._corpus is None:
            given = self._corpus_given
            corpus = load_corpus(given, self.recipe.context_length) if isinstance(given, str) else given
            self._unigram = unigram_entropy(corpus[0])
            self._corpus = corpus
        return self._corpus


def training_playground(
    corpus: str | Corpus = "sample", recipe: str | Recipe = "smoke", *, size: str = "tiny", seed: int = 0,
    steps: int = 100, variant: str = "SM",
) -> TrainingPlayground:  # fmt: skip
    """Choose a variant and settings, press Run, and watch a tiny model train, as a widget.

    Training is `train_variant` in a thread, on the GPU if there is one. Stop leaves a checkpoint and Resume goes on
    from it; up to six runs are overlaid. What goes wrong is said above the figure.

    Args:
        corpus: a name as in `load_corpus`, or what it returned.
        recipe: where the settings start, "smoke" or a `Recipe`; "smoke" is made quicker still, see QUICK.
        size: a preset of `build_model`.   seed: of every run.   steps: at the start, with "smoke".
        variant: the one chosen at the start.

    At a learning rate of 0.1 SM collapses within 20 steps, and SM+LN+G trains on.
    """
    recipe = get_recipe(recipe, steps=steps, **QUICK) if isinstance(recipe, str) else recipe
    return TrainingPlayground(corpus, recipe, size, seed, variant)


def _settings(variant: str, recipe: Recipe) -> str:
    """What tells a run from others in a legend."""
    kind, words = get_variant(variant), [variant, f"lr {recipe.learning_rate:.2g}"]
    if kind.learnable_temperature:
        words.append(f"t {recipe.temperature_init:.2g}")
    if kind.entropy_regularization:
        words.append(f"θ {recipe.threshold_init:g}, γ {recipe.tolerance_margin_factor:g}, λ {recipe.loss_coeff:.2g}")
    return ", ".join(words)


def _words(run: LiveRun | None) -> str:
    if run is None:
        return "Press Run. At learning rate 0.1, SM collapses within 20 steps; does SM+LN+G?"
    at = f"step {run.step} of {run.recipe.steps}"
    if run.rows:
        at += f" · loss {run.rows[-1]['loss']:.3g} nats a token · {_heads(run)}"
    if run.state == "failed":
        error = f"{type(run.error).__name__}: {run.error}"
        return coloured(f"Failed after {at}. {html.escape(error)}", OVERLOAD)
    if run.state == "collapsed":
        lost = run.recipe.max_skipped_in_a_row
        return coloured(f"Collapsed: {lost} steps in a row without a finite gradient.", COLLAPSE) + f" {at}"
    if run.state == "finished":
        loss, minutes = run.record.eval_loss, run.record.minutes
        return f"<b>Finished in {minutes:.2g} min, validation loss {loss:.3g}.</b> {at}"
    if run.state == "stopped":
        return f"<b>Stopped; Resume goes on from here.</b> {at}"
    return f"<b>{'Loading the corpus' if run.step == 0 else 'Training'}.</b> {at}"


def _heads(run: LiveRun) -> str:
    counts = diagnose(run.rows[-1]["entropy"], run.recipe.context_length)
    words = []
    for state, color in (("collapsed", COLLAPSE), ("healthy", None), ("overloaded", OVERLOAD)):
        layers = [str(layer) for layer, heads in enumerate(counts[state].tolist()) if heads]
        text = f"{int(counts[state].sum())} {state}"
        if color and layers:
            text = coloured(f"{text} (layer {', '.join(layers)})", color)
        words.append(text)
    return "heads: " + ", ".join(words)


def _button(name: str, action) -> widgets.Button:
    button = widgets.Button(description=name.capitalize(), layout=widgets.Layout(width="74px"))
    button.button_style = "primary" if name == "run" else ""
    button.add_class(f"entropy-{name}")
    button.on_click(action)
    return button
