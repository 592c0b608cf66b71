"""A figure takes changes even where anywidget has given it up, as it does two seconds after a start on a busy page."""

import numpy as np
import pytest
from conftest import GIVEN_UP
from window import Window

from entropy_lib.explore import attention_inspector

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
        page.evaluate("lab.runCell('inspector = attention_inspector()')")
    assert GIVEN_UP in str(event.value)
    window = Window(page, "inspector")
    attention = attention_inspector().reading.attention
    for key in ("End", "ArrowLeft"):
        window.press("head", key)
        layer, head = (int(window.readout(name)) for name in ("layer", "head"))
        np.testing.assert_allclose(window.traces()[5]["z"], attention[layer, head], rtol=1e-6)
