"""`notebooks/run.py --update` gives figures and explorers their pictures, which takes a browser."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from entropy_lib.explore import tug_of_war

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

import run  # noqa: E402

DRAW = """
import plotly.graph_objects as go
title = {"text": "<b>A finding<br>in two lines</b>"}
go.Figure(go.Heatmap(z=[[0, 1], [2, 3]]), {"title": title, "height": 300}).show("plotly_mimetype")
"""


@pytest.fixture(autouse=True)
def _no_error_in_the_console():
    """Nothing here does anything in the page of the other tests."""


@pytest.mark.usefixtures("playwright_and_chromium")
def test_a_figure_has_its_picture_where_it_is_written_back(tmp_path):
    path = tmp_path / "drawn.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(DRAW)]), path)
    command = [sys.executable, run.__file__, str(path), "--output", str(tmp_path / "out"), "--update"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout
    (output,) = nbformat.read(path, as_version=4).cells[0].outputs
    picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
    assert output.metadata["image/png"] == {"width": run.WIDTH, "height": 300, "alt": "A finding in two lines"}
    assert picture.size == (run.WIDTH, 300)
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_an_explorer_has_its_picture_until_its_module_starts(page, tmp_path):
    """With the words that stand in it, in the place of those that a page without scripts had."""
    path = tmp_path / "moved.ipynb"
    code = "from entropy_lib.explore import tug_of_war\ntoy = tug_of_war(theta=0.31)\ntoy"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    command = [sys.executable, run.__file__, str(path), "--output", str(tmp_path / "out"), "--update"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout
    (output,) = nbformat.read(path, as_version=4).cells[0].outputs
    html = output.data["text/html"]
    assert "An explorer: it moves" in tug_of_war(theta=0.31).html()
    assert "An explorer: it moves" not in html
    contexts = [page.context.browser.new_context(java_script_enabled=scripts) for scripts in (False, True)]
    still, moving = (context.new_page() for context in contexts)
    for opened in (still, moving):
        opened.set_content(html)
    moving.locator(".entropy-module").wait_for()
    said = moving.locator(".entropy-status").inner_text()
    assert moving.locator("img").count() == 0
    image = still.locator("[data-name='Tug of war'] > img")
    assert image.get_attribute("alt") == f"Tug of war: {'; '.join(said.splitlines())}"
    assert image.evaluate("image => image.naturalWidth") == run.EXPLORER_WIDTH
    source = image.get_attribute("src")
    for context in contexts:
        context.close()
    kind, picture = source.split(",")
    drawn = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert (kind, drawn.format) == ("data:image/webp;base64", "WEBP")
    assert len(picture) < 25_000
    assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_palette_shrinks_a_picture_and_keeps_its_colors():
    def written(colors):
        picture = io.BytesIO()
        Image.fromarray(colors.astype(np.uint8)).save(picture, "PNG")
        return picture.getvalue()

    generator = np.random.default_rng(0)
    shades = generator.integers(256, size=(100, 320))  # a heat map
    drawn = np.stack([shades, shades, 200 - shades // 2], -1)
    drawn[::7, ::3] = [213, 94, 0]
    small = run.with_palette(written(drawn))
    read = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert len(small) < len(written(drawn)) / 1.5
    assert abs(read - drawn).max() <= run.COLOR_ERROR
    noise = written(generator.integers(256, size=(64, 64, 3)))
    assert run.with_palette(noise) is noise  # no palette of 256 comes near
