"""A module takes changes even where anywidget has given it up, as it does two seconds after a start on a busy page."""

import pytest
from conftest import GIVEN_UP

from entropy_lib.explore import attention_inspector, penalty_explorer, temperature_explorer

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


@pytest.mark.parametrize(
    ("name", "make", "changes"),
    [
        ("inspector", attention_inspector, {"head": 3, "text": "a = [b, c]", "temperature": 2.0}),
        ("penalty", penalty_explorer, {"theta": 0.25, "own": True}),
        ("temperature", temperature_explorer, {"layer": 1, "row": 3, "single": True}),
    ],
)
def test_changes_arrive_at_a_module_that_anywidget_gave_up(page, no_time_to_start, name, make, changes):
    with page.expect_event("pageerror") as event:
        page.evaluate("code => lab.runCell(code)", f"{name} = {make.__name__}()")
    assert GIVEN_UP in str(event.value)
    explorer = make()
    for trait, value in changes.items():
        page.evaluate("code => lab.kernel().requestExecute({ code }).done", f"{name}.{trait} = {value!r}")
        setattr(explorer, trait, value)
        page.locator(".jp-OutputArea-output .entropy-status", has_text=explorer.words()).wait_for()
