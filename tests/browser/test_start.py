"""The notebook that `make lab` opens: "Run All" ends at the film, and the film has its curves."""

import pytest
from conftest import NOTEBOOK, prepare


@pytest.fixture
def first_notebook(page, server):
    """Beside the page of the other tests, in the same browser."""
    opened = page.context.browser.new_page(viewport=page.viewport_size)
    opened.set_default_timeout(60_000)
    address = server.replace(f"lab/tree/{NOTEBOOK}", "lab/workspaces/start/tree/00_start_here.ipynb")
    opened.goto(address, wait_until="domcontentloaded")
    prepare(opened)
    yield opened
    opened.close()


def test_run_all_ends_at_the_film(first_notebook):
    first_notebook.evaluate("lab.app.commands.execute('notebook:run-all-cells')")
    film = first_notebook.locator(".jp-OutputArea-output .entropy-module:has(.entropy-maps)")
    film.wait_for()
    first_notebook.wait_for_function("lab.idle()")
    first_notebook.wait_for_timeout(2000)  # the last cell has been scrolled to, and then the film
    seen = first_notebook.locator(".jp-WindowedPanel-outer").bounding_box()
    box = film.bounding_box()
    assert seen["y"] <= box["y"] <= box["y"] + 300 <= seen["y"] + seen["height"]
    curves = film.locator("svg path").evaluate_all("all => all.map((path) => getComputedStyle(path).stroke)")
    assert len({stroke for stroke in curves if stroke != "none"}) == 5
