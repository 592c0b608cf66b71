"""The run explorer hands to the page what is on record, of both runs, and says of it what the library does."""

import base64
import json
import math

import numpy as np
import pandas as pd
import pytest
from traitlets import TraitError

from entropy_lib import diagnose, entropy_bands

pytest.importorskip("anywidget")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore import recorded_runs as runs  # noqa: E402
from entropy_lib.training.records import RunRecord, load_runs  # noqa: E402


@pytest.fixture(scope="module")
def records():
    return load_runs(runs.RUNS / "pypi-small")


def unpacked(packed, *shape):
    """Numbers as the page reads them, [N, ...]."""
    planes = np.frombuffer(base64.b64decode(packed["data"]), "u1").reshape(2 if packed["levels"] > 255 else 1, -1)
    whole = planes.T.copy().view("<u2" if len(planes) == 2 else "u1").reshape(*shape, -1)
    whole = np.cumsum(whole, 0, dtype=whole.dtype)  # of differences that wrap
    values = packed["low"] + (packed["high"] - packed["low"]) * whole / (packed["levels"] - 1)
    return np.where(whole == packed["levels"], np.nan, values)


@pytest.mark.parametrize(("step", "row"), [(0, 0), (50, 1), (199, 3), (300, -1)])
def test_both_sides_show_their_run_at_the_step(records, step, row):
    explorer = explore.run_explorer(records)
    explorer.left, explorer.right, explorer.step = 1, len(records) - 1, step
    lines = explorer.words().split("\n")
    figure = explorer.still()
    for side, index in enumerate((explorer.left, explorer.right)):
        record, sent = records[index], explorer.histories[str(index)]
        now = record.history.iloc[row]
        entropy = np.array(now["entropy"])
        np.testing.assert_allclose(figure.data[side].z, entropy, rtol=1e-5)
        np.testing.assert_allclose(np.array(sent["bands"][row]), 100 * entropy_bands(entropy), atol=0.0051)
        states = [int(heads.sum()) for heads in diagnose(entropy, record.context_length).values()]
        assert sent["states"][row] == states
        assert f"{states[0]} collapsed · {states[1]} healthy · {states[2]} overloaded" in lines[side]
        assert lines[side].startswith(f"{record.variant} at step {now['step']}: loss {now['loss']:.3f} ·")
        assert sent["loss"] == record.history["loss"].tolist()
        steps, every = record.entropy_history()
        assert sent["steps"] == steps.tolist()
        np.testing.assert_allclose(unpacked(sent["entropy"], *every.shape[:2]), every, atol=4e-5)
        assert explorer.runs[index]["variant"] == record.variant
    assert set(explorer.histories) == {"1", str(len(records) - 1)}


def test_it_opens_on_two_runs_that_part_ways_at_the_first_step():
    explorer = explore.run_explorer()
    shown = [explorer.shown(side) for side in runs.SIDES]
    assert [record.variant for record, _ in shown] == ["SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)"]
    assert [(record.path.parent.name, record.seed, row) for record, row in shown] == [("table3", 0, 0)] * 2
    explorer.step = 10**6
    assert [row for _, row in map(explorer.shown, runs.SIDES)] == [len(record.history) - 1 for record, _ in shown]


def test_the_lists_are_grouped_by_experiment():
    explorer = explore.run_explorer()
    records = runs.recorded(None)
    assert len(explorer.runs) == len(records)
    listed = [run["name"] for run in explorer.runs if run["group"] == "pypi-small"]
    assert listed == [runs.run_name(record) for record in records if record.path.parent.name == "pypi-small"]
    explorer.left = next(index for index, run in enumerate(explorer.runs) if run["group"] == "pypi-small")
    assert explorer.shown("left")[0].path.parent.name == "pypi-small"
    assert explorer.shown("left")[0].variant in explorer.words()
    with pytest.raises(TraitError, match=f"right is an index of {len(records)} records"):
        explorer.right = len(records)
    with pytest.raises(ValueError, match="no run records"):
        explore.run_explorer([])


def test_what_was_learned(records):
    names = [record.variant for record in records]
    explorer = explore.run_explorer(records)
    explorer.left, explorer.right = names.index("EReg(SM(t)+ScFuFFN)"), names.index("SM+LN+G")
    left, right = (explorer.histories[str(index)]["learned"] for index in (explorer.left, explorer.right))
    history = records[explorer.left].history
    assert explorer.symbols == {"thresholds": "θ", "temperatures": "t", "alpha": "α", "beta": "β"}
    for column in explorer.symbols:
        explorer.learned = column
        table = np.array(history[column].tolist())  # [N, L, H] or [N, L]
        table = table.mean(-1) if table.ndim == 3 else table
        np.testing.assert_allclose(runs.learned_means(records[explorer.left], column), table)
        np.testing.assert_allclose(unpacked(left[column], len(table)), table, atol=(np.ptp(table) or 1) / 65_000)
    assert right == {}


def test_static_heads_are_in_no_mean_and_in_no_count():
    record = next(r for r in load_runs(runs.RUNS / "private" / "66M") if r.variant == "EReg(SM(3)+LN(a)+R+V)")
    explorer = explore.run_explorer(record)
    sent, steps = explorer.histories["0"], len(record.history)
    assert [sum(states) for states in sent["states"]] == [3 * 12] * steps
    assert explorer.words().count("· 108 static") == 2
    found = unpacked(sent["entropy"], steps, 12)
    np.testing.assert_array_equal(np.isnan(found), np.arange(12)[None, None] >= np.full((steps, 12, 1), 3))
    thresholds = np.array(record.history["thresholds"].tolist())[..., :3].mean(-1)
    np.testing.assert_allclose(unpacked(sent["learned"]["thresholds"], steps), thresholds, atol=1e-5)


def test_a_head_is_selected_and_told_of_at_the_step(records):
    small, large, static = (
        records[0],
        *(
            next(r for r in runs.recorded(None) if wanted(r))
            for wanted in (
                lambda r: (r.size, r.variant) == ("gpt2-18l", "SM+LN+G"),
                lambda r: r.variant == "EReg(SM(3)+LN(a)+R+V)",
            )
        ),
    )
    explorer = explore.run_explorer([small, large, static])
    explorer.left, explorer.right, explorer.step = 0, 1, 100
    before = explorer.words().split("\n")
    explorer.selected = [3, 5]
    for side, line, plain in zip(runs.SIDES, explorer.words().split("\n"), before, strict=True):
        record, row = explorer.shown(side)
        nats = record.history["entropy"].iloc[row][3][5]
        assert line == f"{plain} · layer 3, head 5: {nats:.2f} nats"
    assert f"head 5: {nats:.1f} nats" in explorer.words(digits=1)
    explorer.selected = [17, 5]  # of the right run alone
    assert explorer.words().split("\n")[0] == before[0]
    assert " · layer 17, head 5: " in explorer.words().split("\n")[1]
    for wrong in ([18, 0], [0, 12], [0], [0, -1]):
        with pytest.raises(TraitError, match="one of the two runs"):
            explorer.selected = wrong
    explorer.left = 2
    assert explorer.selected == [17, 5]
    explorer.right = 0
    assert explorer.selected == []
    explorer.selected = [3, 5]
    assert explorer.words().split("\n")[0].endswith("· 108 static · layer 3, head 5: static")


def test_one_run_and_runs_of_other_shapes(records):
    alone = explore.run_explorer(records[0])
    assert alone.right == 0
    rng = np.random.default_rng(0)
    history = pd.DataFrame({"step": [1, 4], "loss": [3.0, math.nan], "entropy": rng.random((2, 2, 3)).tolist()})
    history = history.assign(thresholds=None, temperatures=None, alpha=None, beta=None)
    summary = records[0].summary() | {"entropy": history["entropy"][1], "status": "collapsed", "eval_loss": None}
    small = RunRecord(**summary, history=history)
    explorer = explore.run_explorer([small, records[1]])
    explorer.step = 300  # beyond the small run's end: its last record
    assert "at step 4: loss not finite" in explorer.words()
    assert np.shape(explorer.still().data[0].z) == (2, 3)
    sent = explorer.histories["0"]
    assert (sent["layers"], sent["heads"], sent["loss"], sent["learned"]) == (2, 3, [3.0, None], {})
    explorer.left = 1
    assert np.shape(explorer.still().data[0].z) == (12, 12)
    assert explorer.histories["1"]["layers"] == 12


def test_without_a_kernel_the_page_has_some_runs_in_fewer_levels():
    explorer = explore.run_explorer()
    explorer.right = next(k for k, run in enumerate(explorer.runs) if run["group"] == "collapse")
    state = explorer.state()
    assert len(explorer.html()) < 160_000
    shown = [state["runs"][state[side]] for side in runs.SIDES]
    assert shown == [explorer.runs[explorer.left], explorer.runs[explorer.right]]
    assert len(state["runs"]) == len(state["histories"]) == len(explorer.runs) - state["left_out"] >= 10
    collapsed = {run["variant"] for run in state["runs"] if run["name"].endswith("collapsed")}
    assert {"SM", "SM(t)+ScFuFFN"} <= collapsed
    sent, record = state["histories"][str(state["right"])], explorer.records[explorer.right]
    assert len(sent["steps"]) <= runs.STEPS + 1 < len(record.history)
    assert (sent["steps"][0], sent["steps"][-1]) == (record.history["step"].iloc[0], record.history["step"].iloc[-1])
    every = np.array(record.history.set_index("step")["entropy"][sent["steps"]].tolist())
    half = sent["ceiling"] / 254 / 2
    np.testing.assert_allclose(unpacked(sent["entropy"], *every.shape[:2]), every, atol=1.001 * half)
    few = explore.run_explorer(load_runs(runs.RUNS / "pypi-small"))
    assert (len(few.state()["runs"]), few.state()["left_out"]) == (3, 0)
    json.dumps(few.state(), allow_nan=False)
