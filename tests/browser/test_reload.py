"""A page that is loaded anew while the kernel lives on shows the figures that its controls say."""

import pytest
from conftest import prepare

from entropy_lib.explore import attention_inspector

TEXT = "a = [b, c]"  # that only the kernel has read


def load_anew(page, attempts: int = 6, seconds: float = 10):
    """Reload until the explorers are there, as whoever reads "widget model not found" would.

    On a busy machine JupyterLab asks the kernel for its widgets too early and finds none: in two of seven reloads
    beside a process that kept a core busy.
    """
    explorers = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-position)")
    for _ in range(attempts):
        page.reload(wait_until="domcontentloaded")
        prepare(page)
        for _ in range(round(10 * seconds)):
            if explorers.count():
                return
            page.wait_for_timeout(100)
        page.errors[:] = [error for error in page.errors if "widget model not found" not in error]
    pytest.fail(f"no explorer after {attempts} reloads")


def test_the_inspector_loaded_anew_shows_what_the_kernel_has_read(page):
    explorer, code = attention_inspector(), []
    for name, value in {"text": TEXT, "layer": 1, "head": 0, "position": 3, "temperature": 1.0}.items():
        setattr(explorer, name, value)
        code.append(f"inspector.{name} = {value!r}")
    page.evaluate("code => lab.kernel().requestExecute({ code }).done", "\n".join(code))
    page.evaluate("lab.app.commands.execute('docmanager:save')")
    load_anew(page)
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-position)")
    root.locator(".entropy-status", has_text=explorer.words()).wait_for()
    assert root.locator("textarea").input_value() == TEXT
