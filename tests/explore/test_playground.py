"""The playground without a notebook: train, watch, stop, resume, overlay, fail; the picture is what was recorded."""

import _thread
import gc
import json
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from traitlets import TraitError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from entropy_lib.entropy import diagnose
from entropy_lib.training.recipe import Recipe
from entropy_lib.training.train import train_variant
from entropy_lib.training.trainer import EntropyTrainer

pytest.importorskip("anywidget")
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


def press(explorer, button, **settings):
    """As the page says it."""
    explorer._handle_custom_msg({"press": button, "settings": settings}, [])


@pytest.fixture
def sent(explorer, monkeypatch):
    """Messages to the page."""
    messages = []
    monkeypatch.setattr(explorer, "send", messages.append)
    return messages


def put_together(messages) -> dict:
    """Runs by number from what the page was told, which is every row once."""
    runs = {}
    for message in messages:
        run = dict(message.get("run") or {})
        if run:
            rows = [run.pop(name) for name in ("steps", "loss", "entropy")]
            kept = runs.setdefault(str(run["number"]), {"steps": [], "loss": [], "entropy": []})
            assert run.pop("first") == len(kept["steps"])
            for name, values in zip(("steps", "loss", "entropy"), rows, strict=True):
                kept[name] += values
            kept.update(run)
        runs = {number: run for number, run in runs.items() if int(number) in message["numbers"]}
    return runs


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_run_draws_what_train_variant_records(explorer, corpus, tmp_path, sent):
    settings = {"learning_rate": 3e-3, "margin": 0.1, "coefficient": 0.5, "threshold": 0.7, "temperature": 0.5}
    for name, value in settings.items():
        setattr(explorer, name, value)
    explorer.steps = 7
    explorer.run()
    assert explorer.wait(60) == "finished"
    run = explorer.shown
    used = run.record.recipe
    names = ["learning_rate", "tolerance_margin_factor", "loss_coeff", "threshold_init", "temperature_init"]
    assert [used[name] for name in names] == pytest.approx(list(settings.values()))
    record = train_variant(EREG, corpus, run.recipe, run_dir=tmp_path, progress=False)
    drawn = explorer.drawn["runs"]["1"]
    assert drawn["steps"] == record.history.step.tolist() == [1, 2, 4, 6, 7]
    assert drawn["loss"] == pytest.approx(record.history.loss.tolist(), rel=1e-5)
    entropy = np.array(record.history.entropy.tolist())
    found = [playground.entropies_of(drawn, row) for row in range(5)]
    np.testing.assert_allclose(found, entropy, rtol=1e-5)
    np.testing.assert_allclose(explorer.heads(), entropy[-1], rtol=1e-5)
    healthy = int(diagnose(entropy[-1], 16)["healthy"].sum())
    assert f"{healthy} healthy" in explorer.words()
    assert "Finished" in explorer.words()
    assert (drawn["step"], drawn["planned"], drawn["state"]) == (7, 7, "finished")
    assert put_together(sent) == explorer.drawn["runs"]
    assert sent[-1]["axis"] == explorer.drawn["axis"]


def test_the_map_of_any_step(explorer):
    explorer.run()
    explorer.wait(60)
    rows = explorer.shown.rows
    for step, row in ((1, 0), (3, 1), (4, 2), (0, 0), (99, -1), (None, -1)):
        explorer.step = step
        np.testing.assert_allclose(explorer.heads(), rows[row]["entropy"], rtol=1e-6)
        assert f"loss {rows[row]['loss']:.3g} nats a token" in explorer.words()
        assert ("at step" in explorer.words()) == (row >= 0)
    explorer.run()
    assert explorer.step is None  # a new run is followed
    with pytest.raises(TraitError, match="one of"):
        explorer.show = 3


def test_stop_and_resume_give_the_losses_of_one_run(explorer, slow_steps):
    before = time.monotonic()
    explorer.run()
    assert time.monotonic() - before < 1  # at once: the training has a thread of its own
    assert explorer.off() == {"run", "resume"}
    until(lambda: explorer.shown.step >= 4)
    press(explorer, "stop")
    assert explorer.wait(30) == "stopped"
    stopped = explorer.shown.step
    assert 4 <= stopped < 12
    assert "Resume" in explorer.words()
    assert explorer.off() == {"stop"}
    press(explorer, "resume")
    assert explorer.wait(30) == "finished"
    assert explorer.shown.step == 12
    explorer.run()  # the same settings, uninterrupted
    assert explorer.wait(30) == "finished"
    resumed, whole = explorer.drawn["runs"].values()
    assert whole["dash"] != resumed["dash"]
    found = dict(zip(resumed["steps"], resumed["loss"], strict=True))
    expected = dict(zip(whole["steps"], whole["loss"], strict=True))
    assert expected.keys() <= found.keys()
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_picture_follows_the_training(explorer, slow_steps, sent):
    explorer.run()
    explorer.wait(60)
    told = [message["run"]["first"] + len(message["run"]["steps"]) for message in sent]
    assert len(set(told) - {0}) >= 2
    assert max(len(json.dumps(message)) for message in sent) < 2500
    explorer._handle_custom_msg({"missed": True}, [])  # a page that came late, and has the trait sent whole
    assert explorer.get_state("drawn") == {"drawn": explorer.drawn}


def test_a_press_brings_the_settings_of_the_page(explorer):
    press(explorer, "run", steps=2, variant="SM", learning_rate=0.01)
    assert explorer.wait(60) == "finished"
    assert explorer.shown.recipe.steps == explorer.steps == 2
    assert explorer.shown.name == "1 · SM, lr 0.01"
    press(explorer, "run", temperature=0.0)
    assert "temperature_init must be above 0" in explorer.trouble
    assert len(explorer.runs) == 1
    press(explorer, "run", temperature=1.0)
    assert explorer.trouble == ""
    assert len(explorer.runs) == 2


def test_a_collapse_is_a_result(explorer):
    explorer.variant, explorer.learning_rate, explorer.steps = "SM", 1.0, 40
    explorer.run()
    assert explorer.wait(60) == "collapsed"
    run = explorer.shown
    assert "Collapsed: 3 steps in a row" in explorer.words()
    assert "(the library’s own rule is 20)" in explorer.words()
    assert run.step < 40
    axis, drawn = explorer.drawn["axis"], explorer.drawn["runs"]["1"]
    assert axis["log"]
    assert (drawn["step"], drawn["state"]) == (run.step, "collapsed")
    assert axis["limit"] <= axis["high"] < 20_000  # a loss of 1e9 does not flatten the others


def test_a_collapse_by_the_library_s_rule_says_no_other(explorer):
    explorer.recipe = replace(RECIPE, max_skipped_in_a_row=20)
    explorer.variant, explorer.learning_rate, explorer.steps = "SM", 1.0, 60
    explorer.run()
    assert explorer.wait(60) == "collapsed"
    assert "Collapsed: 20 steps in a row without a finite gradient. step" in explorer.words()


@pytest.mark.parametrize(("peak", "log"), [(6.5, False), (400.0, True)])
def test_a_run_that_explodes_is_seen_beside_one_that_learns(peak, log):
    losses = [[6.0, peak, None], [6.0, 5.0, 4.0]]
    axis = playground.loss_axis([{"loss": values, "unigram": None} for values in losses])
    assert axis["log"] == log
    cross = min(peak, axis["limit"])  # at the last finite loss
    assert axis["low"] < 4.0
    assert 6.0 < cross <= peak < axis["high"] * 1.1
    assert cross < axis["high"]
    assert not playground.loss_axis([])["log"]


def test_an_error_in_the_thread_is_shown_in_place(explorer, corpus):
    explorer._corpus_given = "no such corpus"
    explorer.run()
    assert explorer.wait(30) == "failed"
    assert "ValueError: " in explorer.words()
    assert "no such corpus" in explorer.words()
    explorer._corpus_given = corpus
    press(explorer, "run")
    assert explorer.wait(60) == "finished"
    assert "no such corpus" not in explorer.words()


def test_runs_are_overlaid_and_cleared(explorer, sent):
    explorer.steps = 1
    for _ in range(playground.MAX_RUNS + 1):
        explorer.run()
        explorer.wait(30)
    drawn = explorer.drawn["runs"]
    assert list(drawn) == ["2", "3", "4", "5", "6", "7"]
    assert [run["name"].split(" · ")[0] for run in drawn.values()] == list(drawn)
    assert len({run["dash"] for run in drawn.values()}) == playground.MAX_RUNS
    assert put_together(sent) == drawn
    explorer.show = explorer.runs[0].number
    assert explorer.shown.name.startswith("2 · ")
    press(explorer, "clear")
    assert explorer.drawn["runs"] == put_together(sent) == {}
    assert explorer.shown is None
    assert "clear" in explorer.off()


def test_controls_that_a_variant_lacks_are_off(explorer):
    explorer.variant = "SM(t)+ScFuFFN"
    settings = {"temperature", "threshold", "margin", "coefficient"}
    assert explorer.off() & settings == settings - {"temperature"}
    explorer.variant = "SM"
    assert explorer.off() & settings == settings


def test_without_a_kernel_the_page_has_what_was_made_or_two_prepared_runs(explorer, slow_steps):
    state = explorer.state()
    prepared = {run["variant"]: run["state"] for run in state["drawn"]["runs"].values()}
    assert prepared == {"SM": "collapsed", "SM+LN+G": "finished"}
    assert len(explorer.html()) < 32_000
    assert "Collapsed: 5 steps in a row" in playground.words_of(state)
    assert [line.name for line in explorer.still().data if line.name] == ["1 · SM", "2 · SM+LN+G"]
    explorer.run()
    until(lambda: len(explorer.drawn["runs"]["1"]["steps"]) >= 2)
    state = explorer.state()
    assert state["drawn"]["runs"]["1"]["name"] == explorer.shown.name
    assert playground.words_of(state).startswith("Stopped. step")
    assert explorer.wait(60) == "finished"
    assert explorer.state()["drawn"] == explorer.drawn
    [line] = explorer.still().data
    assert list(line.y) == pytest.approx(explorer.drawn["runs"]["1"]["loss"], rel=1e-5)


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
    assert "the disk is full" in explorer.words()
    assert logging.is_progress_bar_enabled()


def test_an_interrupt_of_the_kernel_leaves_the_training_alone(explorer, slow_steps):
    explorer.run()
    until(lambda: explorer.shown.step >= 1)
    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(5)
    assert explorer.wait(30) == "finished"
    assert "Finished" in explorer.words()


def test_a_second_run_has_to_wait(explorer, slow_steps):
    explorer.run()
    with pytest.raises(ValueError, match="stop it first"):
        explorer.run()
    explorer.stop()
    explorer.wait(30)
