"""A figure takes changes even where anywidget has given it up, as it does two seconds after a start on a busy page."""

import numpy as np
import pytest
from conftest import GIVEN_UP
from window import Window

from entropy_lib.explore import run_explorer

AT_ONCE = """() => {
  const timeout = AbortSignal.timeout;
  AbortSignal.timeout = () => {
    const late = new AbortController();
    queueMicrotask(() => late.abort());
    return late.signal;
  };
  return () => (AbortSignal.timeout = timeout);
}"""


@pytest.fixture
def no_time_to_start(page):
    restore = page.evaluate_handle(AT_ONCE)
    yield
    restore.evaluate("restore => restore()")


def test_changes_arrive_at_a_figure_that_anywidget_gave_up(page, no_time_to_start):
    with page.expect_event("pageerror") as event:
        page.evaluate("lab.runCell('runs = run_explorer()')")
    assert GIVEN_UP in str(event.value)
    window = Window(page, "runs")
    shown, _ = run_explorer().shown("left")
    for key in ("End", "ArrowLeft"):
        window.press("step", key)
        history = shown.history
        now = history[history["step"] <= window.readout("step")].iloc[-1]
        np.testing.assert_allclose(window.traces()[0]["z"], now["entropy"])
