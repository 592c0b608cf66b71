"""A module takes changes even where anywidget has given it up, as it does two seconds after a start on a busy page."""

import pytest
from conftest import GIVEN_UP

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


def test_changes_arrive_at_a_module_that_anywidget_gave_up(page, no_time_to_start):
    with page.expect_event("pageerror") as event:
        page.evaluate("lab.runCell('inspector = attention_inspector()')")
    assert GIVEN_UP in str(event.value)
    explorer = attention_inspector()
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-position)")
    for name, value in {"head": 3, "text": "a = [b, c]", "temperature": 2.0}.items():
        page.evaluate("code => lab.kernel().requestExecute({ code }).done", f"inspector.{name} = {value!r}")
        setattr(explorer, name, value)
        root.locator(".entropy-status", has_text=explorer.words()).wait_for()
