"""The playground without a notebook: train, watch, stop, resume, overlay, fail; the picture is what was recorded."""

import _thread
import gc
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from entropy_lib.entropy import diagnose
from entropy_lib.explore.playground_figure import MAX_RUNS
from entropy_lib.training.recipe import Recipe
from entropy_lib.training.train import train_variant
from entropy_lib.training.trainer import EntropyTrainer

pytest.importorskip("ipywidgets")
playground = pytest.importorskip("entropy_lib.explore.playground", exc_type=ImportError)

EREG = "EReg(SM(t)+ScFuFFN)"
RECIPE = Recipe(
    steps=12, context_length=16, sequences_per_step=4, micro_batch=4, learning_rate=1e-3, warmup_ratio=0.1,
    entropy_every=2, eval_every=0, checkpoint_every=0, eval_blocks=4, max_skipped_in_a_row=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    walk = (np.cumsum(np.random.default_rng(0).integers(0, 5, size=80 * 16)) % 50).reshape(-1, 16)
    splits = {"train": walk[:64], "validation": walk[64:]}
    words = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", bos_token="0")
    return DatasetDict({k: Dataset.from_dict({"input_ids": v.tolist()}) for k, v in splits.items()}), tokenizer


@pytest.fixture
def explorer(corpus):
    made = playground.training_playground(corpus, RECIPE, variant=EREG)
    yield made
    made.close()


@pytest.fixture
def slow_steps(monkeypatch):
    """20 steps a second at most: time to press a button."""
    training_step = EntropyTrainer.training_step
    monkeypatch.setattr(
        EntropyTrainer, "training_step", lambda *args, **kwargs: time.sleep(0.05) or training_step(*args, **kwargs)
    )


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_run_draws_what_train_variant_records(explorer, corpus, tmp_path):
    controls = explorer.controls
    settings = {"learning_rate": 3e-3, "margin": 0.1, "coefficient": 0.5, "threshold": 0.7, "temperature": 0.5}
    for name, value in settings.items():
        controls[name].value = value
    controls["steps"].value = 7
    explorer.run()
    assert explorer.wait(60) == "finished"
    run = explorer.shown
    used = run.record.recipe
    names = ["learning_rate", "tolerance_margin_factor", "loss_coeff", "threshold_init", "temperature_init"]
    assert [used[name] for name in names] == pytest.approx(list(settings.values()))
    record = train_variant(EREG, corpus, run.recipe, run_dir=tmp_path, progress=False)
    assert list(explorer.figure.data[0].x) == record.history.step.tolist() == [1, 2, 4, 6, 7]
    assert list(explorer.figure.data[0].y) == pytest.approx(record.history.loss.tolist(), rel=1e-5)
    entropy = np.array(record.history.entropy.tolist())
    layers = [line.y for line in explorer.figure.data[playground.MAX_RUNS + 1 : -1]]
    np.testing.assert_allclose(np.array(layers).T, entropy.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(explorer.figure.data[-1].z, entropy[-1], rtol=1e-5)
    healthy = int(diagnose(entropy[-1], 16)["healthy"].sum())
    assert f"{healthy} healthy" in explorer.status.value
    assert "Finished" in explorer.status.value
    assert (explorer.progress.value, explorer.progress.max, explorer.progress.bar_style) == (7, 7, "success")


def test_stop_and_resume_give_the_losses_of_one_run(explorer, slow_steps):
    before = time.monotonic()
    explorer.run()
    assert time.monotonic() - before < 1  # at once: the training has a thread of its own
    assert {name for name, button in explorer.buttons.items() if button.disabled} == {"run", "resume"}
    until(lambda: explorer.shown.step >= 4)
    explorer.buttons["stop"].click()
    assert explorer.wait(30) == "stopped"
    stopped = explorer.shown.step
    assert 4 <= stopped < 12
    assert "Resume" in explorer.status.value
    assert not explorer.buttons["resume"].disabled
    explorer.buttons["resume"].click()
    assert explorer.wait(30) == "finished"
    assert explorer.shown.step == 12
    explorer.run()  # the same settings, uninterrupted
    assert explorer.wait(30) == "finished"
    resumed, whole = explorer.figure.data[:2]
    assert whole.line.dash != resumed.line.dash
    found = dict(zip(resumed.x, resumed.y, strict=True))
    expected = dict(zip(whole.x, whole.y, strict=True))
    assert expected.keys() <= found.keys()
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_picture_follows_the_training(explorer, slow_steps):
    seen = set()
    explorer.figure.data[0].on_change(lambda trace, y: seen.add(len(y)), "y")
    explorer.run()
    explorer.wait(60)
    assert len(seen) >= 2


def test_a_collapse_is_a_result(explorer):
    explorer.controls["variant"].value = "SM"
    explorer.controls["learning_rate"].value = 1.0
    explorer.controls["steps"].value = 40
    explorer.run()
    assert explorer.wait(60) == "collapsed"
    run = explorer.shown
    assert "Collapsed: 3 steps in a row" in explorer.status.value
    assert run.step < 40
    crosses = explorer.figure.data[playground.MAX_RUNS]
    assert explorer.figure.layout.yaxis.type == "log"
    top = 10 ** explorer.figure.layout.yaxis.range[1]
    assert tuple(crosses.x) == (run.step,)
    assert crosses.y[0] <= top < 20_000  # a loss of 1e9 does not flatten the others


@pytest.mark.parametrize(("peak", "axis"), [(6.5, "linear"), (400.0, "log")])
def test_a_run_that_explodes_is_seen_beside_one_that_learns(explorer, peak, axis):
    explorer.clear()
    losses = {"SM": [6.0, peak, float("nan")], "SM+LN+G": [6.0, 5.0, 4.0]}
    for number, (variant, values) in enumerate(losses.items(), 1):
        rows = [{"step": step, "loss": loss} for step, loss in enumerate(values)]
        state = "finished" if variant == "SM+LN+G" else "collapsed"
        run = SimpleNamespace(variant=variant, name=variant, number=number, rows=rows, state=state, step=2)
        run.recipe = SimpleNamespace(steps=3)
        explorer.runs.append(run)
    explorer._draw_losses()
    explorer.runs.clear()
    figure = explorer.figure
    assert figure.layout.yaxis.type == axis
    low, high = (10**edge if axis == "log" else edge for edge in figure.layout.yaxis.range)
    (cross,) = figure.data[MAX_RUNS].y
    assert low < 4.0
    assert 6.0 < cross <= peak < high * 1.1
    assert cross < high
    explorer.clear()
    assert figure.layout.yaxis.type == "linear"


def test_an_error_in_the_thread_is_shown_in_place(explorer, corpus):
    explorer._corpus_given = "no such corpus"
    explorer.run()
    assert explorer.wait(30) == "failed"
    assert "ValueError: " in explorer.status.value
    assert "no such corpus" in explorer.status.value
    explorer._corpus_given = corpus
    explorer.buttons["run"].click()
    assert explorer.wait(60) == "finished"
    assert "no such corpus" not in explorer.status.value


def test_runs_are_overlaid_and_cleared(explorer):
    explorer.controls["steps"].value = 1
    for _ in range(playground.MAX_RUNS + 1):
        explorer.run()
        explorer.wait(30)
    names = [line.name for line in explorer.figure.data[: playground.MAX_RUNS]]
    assert [name.split(" · ")[0] for name in names] == ["2", "3", "4", "5", "6", "7"]
    assert len({line.line.dash for line in explorer.figure.data[: playground.MAX_RUNS]}) == playground.MAX_RUNS
    explorer.controls["show"].value = explorer.runs[0]
    assert "2 · " in explorer.figure.layout.annotations[1].text
    explorer.buttons["clear"].click()
    assert not any(line.x for line in explorer.figure.data[: playground.MAX_RUNS])
    assert explorer.shown is None
    assert explorer.buttons["clear"].disabled


def test_controls_that_a_variant_lacks_are_off(explorer):
    explorer.controls["variant"].value = "SM(t)+ScFuFFN"
    names = ("temperature", "threshold", "margin", "coefficient")
    assert [explorer.controls[name].disabled for name in names] == [False, True, True, True]
    explorer.controls["variant"].value = "SM"
    assert all(explorer.controls[name].disabled for name in names)


def test_no_thread_and_no_folder_outlives_the_widget(corpus, slow_steps):
    explorer = playground.training_playground(corpus, RECIPE)
    explorer.run()
    run = explorer.shown
    until(lambda: run.step >= 1)
    explorer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("train ")]
    assert run.step < 12
    assert not Path(run._folder).exists()


def test_a_run_that_is_over_is_not_kept_for_ever(corpus):
    run = playground.LiveRun("run", "SM", lambda: corpus, RECIPE)
    run.start()
    assert run.wait(60) == "finished"
    folder, seen = Path(run._folder), weakref.ref(run)
    folder.mkdir(exist_ok=True)
    del run
    gc.collect()
    assert seen() is None
    assert not folder.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_progress_bars(explorer, slow_steps, monkeypatch):
    def fail(*args, **options):
        raise OSError("the disk is full")

    monkeypatch.setattr(EntropyTrainer, "_save_checkpoint", fail)
    explorer.run()
    until(lambda: explorer.shown.step >= 1)
    explorer.stop()
    assert explorer.wait(30) == "failed"
    assert "the disk is full" in explorer.status.value
    assert logging.is_progress_bar_enabled()


def test_an_interrupt_of_the_kernel_leaves_the_training_alone(explorer, slow_steps):
    explorer.run()
    until(lambda: explorer.shown.step >= 1)
    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(5)
    assert explorer.wait(30) == "finished"
    assert "Finished" in explorer.status.value


def test_a_second_run_has_to_wait(explorer, slow_steps):
    explorer.run()
    with pytest.raises(ValueError, match="stop it first"):
        explorer.run()
    explorer.stop()
    explorer.wait(30)
