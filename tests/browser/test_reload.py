"""A page that is loaded anew while the kernel lives on shows the figures that its controls say."""

import pytest
from conftest import prepare
from window import MARKS, Window

from entropy_lib.explore import attention_inspector

MOVES = {}
TEXT = "a = [b, c]"  # that only the kernel has read


@pytest.fixture(scope="module")
def loaded_anew(page):
    """Traces of every explorer before and after its control was moved, and in a page that is loaded then."""
    first, moved = {}, {}
    for name, control in MOVES.items():
        window = Window(page, name)
        first[name] = window.traces()
        window.press(control, "Home")
        window.press(control, "ArrowRight")
        moved[name] = window.traces()
    page.evaluate("code => lab.kernel().requestExecute({ code }).done", f"inspector.text = {TEXT!r}")
    page.evaluate("lab.app.commands.execute('docmanager:save')")
    load_anew(page)
    return first, moved


def load_anew(page, attempts: int = 6, seconds: float = 10):
    """Reload until the explorers are there, as whoever reads "widget model not found" would.

    On a busy machine JupyterLab asks the kernel for its widgets too early and finds none: in two of seven reloads
    beside a process that kept a core busy.
    """
    explorers = page.locator(".entropy-explorer")
    for _ in range(attempts):
        page.reload(wait_until="domcontentloaded")
        prepare(page)
        for _ in range(round(10 * seconds)):
            if explorers.count():
                explorers.first.scroll_into_view_if_needed()  # out of sight figures are not drawn
            if explorers.locator(".main-svg").count():
                return
            page.wait_for_timeout(100)
        page.errors[:] = [error for error in page.errors if "widget model not found" not in error]
    pytest.fail(f"no explorer after {attempts} reloads")


@pytest.mark.parametrize("name", MARKS)
def test_a_page_loaded_anew_shows_what_the_controls_say(page, name, loaded_anew):
    first, moved = (traces[name] for traces in loaded_anew)
    window = Window(page, name)
    window.figure.locator(".main-svg").first.wait_for()
    window.settle()
    assert window.traces() == moved
    assert moved != first
    assert not window.figure.locator('path[d*="NaN"]').count()


def test_the_inspector_loaded_anew_shows_what_the_kernel_has_read(page, loaded_anew):
    explorer = attention_inspector()
    explorer.text = TEXT
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-position)")
    root.locator(".entropy-status", has_text=explorer.words()).wait_for()
    assert root.locator("textarea").input_value() == TEXT
