"""A module takes changes even where anywidget has given it up, as it does two seconds after a start on a busy page."""

import pytest

from entropy_lib.explore import attention_inspector, penalty_explorer, temperature_explorer

AT_ONCE = """() => {
  const timeout = AbortSignal.timeout;
  window.givenUp = 0;
  AbortSignal.timeout = (milliseconds) => {
    const late = new AbortController();
    queueMicrotask(() => {
      late.abort();
      if (milliseconds === 2000) window.givenUp += 1; // a module's start; an error in the page only at times
    });
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
    page.evaluate("code => lab.runCell(code)", f"{name} = {make.__name__}()")
    page.wait_for_function("givenUp === 1")
    explorer = make()
    for trait, value in changes.items():
        page.evaluate("code => lab.kernel().requestExecute({ code }).done", f"{name}.{trait} = {value!r}")
        setattr(explorer, trait, value)
        page.locator(".jp-OutputArea-output .entropy-status", has_text=explorer.words()).wait_for()
