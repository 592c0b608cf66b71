"""The collapse film: what it hands to the page is what the records say."""

import base64
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anywidget")
from entropy_lib.clone import CLONE
from entropy_lib.explore import collapse_film
from entropy_lib.training.records import load_runs

RECORDS = {record.variant: record for record in load_runs(CLONE / "data" / "runs" / "collapse")}


def test_every_head_of_every_step_comes_within_a_half_of_a_255th():
    film = collapse_film(RECORDS.values(), last_step=306)
    assert film.ceiling == math.log(128)
    assert film.last_step == 306
    for run in film.runs:
        history = RECORDS[run["name"]].history.query("step <= 306")
        truth = np.array([np.stack(rows) for rows in history["entropy"]])
        sent = np.frombuffer(base64.b64decode(run["entropy"]), np.uint8).reshape(truth.shape)
        assert run["steps"] == history["step"].tolist() == list(range(1, len(truth) + 1))
        np.testing.assert_allclose(sent / 255 * film.ceiling, truth, atol=0.5001 * film.ceiling / 255)
        np.testing.assert_allclose(run["loss"], history["loss"])
    assert film.learning_rate[-1] == pytest.approx([306, 1e-3])
    assert len(film.html()) < 200_000


def test_two_of_five_break_and_stay_as_they_were():
    film = collapse_film(RECORDS.values())
    broke = {run["name"]: run["broke"] for run in film.runs}
    assert {name for name, step in broke.items() if step} == {"SM", "SM(t)+ScFuFFN"}
    film.step = 10_000
    last = RECORDS["SM"].history["entropy"].iloc[-1]
    torch.testing.assert_close(film.entropies()["SM"], torch.tensor(np.stack(last)))
    film.step = 1
    assert film.entropies()["SM"].mean() > 3.8  # at the start all are wide
    assert "at step 1<" in film.still().layout.title.text


def test_the_animation_shows_the_maps_step_by_step():
    film = collapse_film([RECORDS["SM"], RECORDS["SM+LN+G"]], last_step=306)
    picture = Image.open(io.BytesIO(film.animation(every=50, fps=2)))
    assert picture.format == "WEBP"
    picture.seek(2)  # step 101
    film.step, cell = 101, np.array(picture.convert("RGB"))[42 + 5 :: 11][:12]  # the middle of every row of cells
    for place, entropies in enumerate(film.entropies().values()):
        middles = cell[:, 14 + place * (132 + 14) + 5 :: 11][:, :12]
        levels = np.rint(entropies.numpy() / film.ceiling * 255).astype(int)
        expected = [[[int(n) for n in re.findall(r"\d+", film.colors[level])] for level in row] for row in levels]
        np.testing.assert_array_equal(middles, expected)


def test_runs_that_do_not_belong_together_are_refused():
    record = RECORDS["SM"]
    with pytest.raises(ValueError, match="one to six runs"):
        collapse_film([])
    with pytest.raises(ValueError, match="different ceilings"):
        collapse_film([record, replace(record, context_length=256)])
    history = record.history.assign(entropy=[[[math.nan] * 12] * 12] * len(record.history))
    with pytest.raises(ValueError, match="static heads"):
        collapse_film([replace(record, history=history)])
