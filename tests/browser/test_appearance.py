"""Every explorer fits its cell in JupyterLab, in both themes and in two widths; pictures of all in build/browser."""

import pytest
from marks import OUTPUT

MARKS = ("position", "right", "scope", "network", "coefficient")  # a control that only this explorer has
THEMES = {"dark": "JupyterLab Dark", "light": "JupyterLab Light"}  # light last: what the other tests then use


def notebook_width(page, width: int):
    """Make the notebook this wide, whatever JupyterLab has around it."""
    notebook = page.locator(".jp-NotebookPanel:visible")
    around = page.viewport_size["width"] - notebook.bounding_box()["width"]
    page.set_viewport_size({"width": round(width + around), "height": page.viewport_size["height"]})
    page.wait_for_function(
        "width => Math.abs(document.querySelector('.jp-NotebookPanel').offsetWidth - width) < 2", arg=width
    )


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [900, 1300])
def test_it_fits_and_has_its_picture_taken(page, theme, width):
    page.evaluate("theme => lab.app.commands.execute('apputils:change-theme', { theme })", THEMES[theme])
    notebook_width(page, width)
    for mark in MARKS:
        root = page.locator(f".jp-OutputArea-output .entropy-module:has(.entropy-{mark})").first
        root.scroll_into_view_if_needed()
        root.locator("svg").first.wait_for()
        assert root.evaluate("root => root.scrollWidth <= root.clientWidth + 1"), mark
        assert root.bounding_box()["width"] <= width
        root.screenshot(path=OUTPUT / f"{mark}-{theme}-{width}.png")
