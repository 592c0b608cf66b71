"""`notebooks/run.py --update` gives figures their pictures, which takes a browser."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

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
    """Nothing here opens the page of the other tests."""


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
