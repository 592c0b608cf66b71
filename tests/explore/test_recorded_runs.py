"""The run explorer shows what is on record, of both runs, at the step asked for."""

import math

import numpy as np
import pandas as pd
import pytest

from entropy_lib import diagnose, entropy_bands

pytest.importorskip("ipywidgets")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore import recorded_runs as runs  # noqa: E402
from entropy_lib.training.records import RunRecord, load_runs  # noqa: E402


@pytest.fixture(scope="module")
def records():
    return load_runs(runs.RUNS / "pypi-small")


@pytest.mark.parametrize(("step", "row"), [(0, 0), (50, 1), (199, 3), (300, -1)])
def test_both_sides_show_their_run_at_the_step(records, step, row):
    explorer = explore.run_explorer(records)
    left, right = 1, len(records) - 1
    for name, value in {"left": left, "right": right, "step": step}.items():
        explorer.controls[name].value = value
    data = explorer.figure.data
    for side, index in enumerate((left, right)):
        record = records[index]
        now = record.history.iloc[row]
        entropy = np.array(now["entropy"])
        np.testing.assert_allclose(data[runs.HEADS + side].z, entropy)
        shares = [bar.x[side] for bar in data[runs.BARS : runs.LEARNED]]
        np.testing.assert_allclose(shares, 100 * entropy_bands(entropy), rtol=1e-5)
        counts = diagnose(entropy, record.context_length)
        assert f"{int(counts['collapsed'].sum())} collapsed" in explorer.status.value
        assert f"step {now['step']}: loss {now['loss']:.3f}" in explorer.status.value
        assert explorer.figure.layout.annotations[side].text == f"<b>{record.variant}</b>"
        np.testing.assert_allclose(data[runs.LOSS + side].y, record.history["loss"])
        curves = np.array([trace.y for trace in data[runs.LAYERS + side :: 2]])
        np.testing.assert_allclose(curves.T, record.entropy_history()[1].mean(-1))
    assert {shape.x0 for shape in explorer.figure.layout.shapes} == {step}


def test_it_opens_on_two_runs_that_part_ways_at_the_first_step():
    explorer = explore.run_explorer()
    shown = [explorer.shown(side) for side in runs.SIDES]
    assert [record.variant for record, _ in shown] == ["SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)"]
    assert [(record.path.parent.name, record.seed, row) for record, row in shown] == [("table3", 0, 0)] * 2
    explorer.controls["step"].value = explorer.controls["step"].max
    assert [row for _, row in map(explorer.shown, runs.SIDES)] == [len(record.history) - 1 for record, _ in shown]


def test_an_experiment_narrows_the_lists():
    explorer = explore.run_explorer()
    everything = len(explorer.controls["left"].options)
    explorer.controls["experiment"].value = "pypi-small"
    listed = [runs.label(record) for record in runs.recorded(None) if record.path.parent.name == "pypi-small"]
    for side in runs.SIDES:
        assert [words for words, _ in explorer.controls[side].options] == listed
        assert explorer.shown(side)[0].path.parent.name == "pypi-small"
    assert explorer.shown("left")[0].variant in explorer.status.value
    explorer.controls["experiment"].value = None
    assert len(explorer.controls["left"].options) == everything > len(listed)


def test_what_was_learned(records):
    names = [record.variant for record in records]
    explorer = explore.run_explorer(records)
    explorer.controls["left"].value = names.index("EReg(SM(t)+ScFuFFN)")
    explorer.controls["right"].value = names.index("SM+LN+G")
    left, right = explorer.figure.data[runs.LEARNED : runs.LEARNED + 2]
    history = records[names.index("EReg(SM(t)+ScFuFFN)")].history
    for column, symbol in runs.SYMBOLS.items():
        explorer.controls["learned"].value = column
        table = np.array(history[column].tolist())  # [N, L, H] or [N, L]
        table = table.mean(-1) if table.ndim == 3 else table
        drawn = [y for y in left.y if y is not None and math.isfinite(y)]
        np.testing.assert_allclose(drawn, table.T.ravel())
        assert symbol in explorer.figure.layout.yaxis5.title.text
        assert len(right.y) == 0
    explorer.controls["left"].value = names.index("SM+LN+G")
    assert "neither" in explorer.figure.layout.annotations[2].text


def test_one_run_and_runs_of_other_shapes(records):
    alone = explore.run_explorer(records[0])
    assert alone.controls["right"].value == 0
    rng = np.random.default_rng(0)
    history = pd.DataFrame({"step": [1, 4], "loss": [3.0, math.nan], "entropy": rng.random((2, 2, 3)).tolist()})
    history = history.assign(thresholds=None, temperatures=None, alpha=None, beta=None)
    summary = records[0].summary() | {"entropy": history["entropy"][1], "status": "collapsed", "eval_loss": None}
    small = RunRecord(**summary, history=history)
    explorer = explore.run_explorer([small, records[1]])
    explorer.controls["step"].value = 300  # beyond the small run's end: its last record
    assert np.shape(explorer.figure.data[runs.HEADS].z) == (2, 3)
    assert len(explorer.figure.data[runs.LAYERS + 2 * 2].x) == 0  # it has no layer 2
    explorer.controls["left"].value = 1
    assert np.shape(explorer.figure.data[runs.HEADS].z) == (12, 12)
    assert len(explorer.figure.data[runs.LAYERS + 2 * 2].x) > 2
    bright = explorer.figure.data[runs.LAYERS + 2 * 11].line.color
    assert explorer.figure.layout.annotations[3].text.endswith("bright: layer 11")
    explorer.controls["left"].value = explorer.controls["right"].value = 0  # the shades span the layers shown
    assert explorer.figure.data[runs.LAYERS + 2 * 1].line.color == bright
    assert explorer.figure.layout.annotations[3].text.endswith("bright: layer 1")


def test_play_moves_the_step(records):
    explorer = explore.run_explorer(records)
    step = explorer.controls["step"]
    assert (explorer.play.min, explorer.play.max, explorer.play.step) == (step.min, step.max, step.step)
    assert (explorer._link.source[0], explorer._link.target[0]) == (explorer.play, step)
