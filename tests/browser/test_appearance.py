"""Every explorer fits its cell as soon as it is there and in every width; pictures of all of them in build/browser."""

import pytest
from window import MARKS, OUTPUT, Window

THEMES = {"dark": "JupyterLab Dark", "light": "JupyterLab Light"}  # light last: what the other tests then use


def notebook_width(page, width: int):
    """Make the notebook this wide, whatever JupyterLab has around it."""
    notebook = page.locator(".jp-NotebookPanel:visible")
    around = page.viewport_size["width"] - notebook.bounding_box()["width"]
    page.set_viewport_size({"width": round(width + around), "height": page.viewport_size["height"]})
    page.wait_for_function(
        "width => Math.abs(document.querySelector('.jp-NotebookPanel').offsetWidth - width) < 2", arg=width
    )


def assert_it_fits(window):
    drawn, cell = (window.root.locator(part).first for part in (".main-svg", ".js-plotly-plot"))
    widths = {"drawn": drawn.bounding_box()["width"], "explorer": window.root.bounding_box()["width"]}
    assert widths["drawn"] == pytest.approx(widths["explorer"], abs=6), widths
    assert cell.evaluate("cell => cell.scrollWidth <= cell.clientWidth + 1")


@pytest.mark.parametrize("name", MARKS)
def test_the_first_picture_is_as_wide_as_its_cell(page, name):
    assert_it_fits(Window(page, name))


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [900, 1300])
def test_it_fits_and_has_its_picture_taken(page, theme, width):
    page.evaluate("theme => lab.app.commands.execute('apputils:change-theme', { theme })", THEMES[theme])
    notebook_width(page, width)
    for name in MARKS:
        window = Window(page, name)
        window.settle()
        assert_it_fits(window)
        window.root.screenshot(path=OUTPUT / f"{name}-{theme}-{width}.png")
