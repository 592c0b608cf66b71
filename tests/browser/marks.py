"""Whether the marks of an explorer in the page stand where the library says."""

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entropy_lib import attention_entropy, entropy_bands
from entropy_lib.explore.recorded_runs import learned_means

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "browser"


def runs_as_recorded(root, explorer, levels: int):
    """Whether the run explorer's marks in the page stand where the records of the runs say, with so many levels."""
    drawn = lambda kind, name: root.locator(f"svg .entropy-{kind}").evaluate_all(  # noqa: E731
        "(all, name) => all.map((mark) => mark.getAttribute(name))", name
    )
    shown = [explorer.shown(side) for side in ("left", "right")]
    last = max(int(record.history["step"].iloc[-1]) for record, _ in shown)
    top = max(math.log(record.context_length) for record, _ in shown)
    fills, parts = drawn("cell", "fill"), drawn("band", "width")
    curves, losses, learnt = (drawn(kind, "d") for kind in ("layer", "loss", "learnt"))
    texts = root.locator("svg text").all_text_contents()
    starts = [losses_of(record)[0] for record, _ in shown]
    highest = math.ceil(max(starts))
    lowest = math.floor(min(min(losses_of(record)) for record, _ in shown))
    means = [learned_means(record, explorer.learned) for record, _ in shown]
    found = np.concatenate([values.ravel() for values in means if values is not None] or [np.zeros(0)])
    low, span = (found.min(), np.ptp(found)) if len(found) else (0, 1)
    for side, (record, row) in enumerate(shown):
        steps, entropy = record.entropy_history()
        assert texts.count(record.variant) >= 2  # over the map and beside the bar
        here, fills = fills[: entropy[row].size], fills[entropy[row].size :]
        shades = [explorer.colors.index(fill) for fill in here]
        np.testing.assert_allclose(shades, entropy[row].ravel() / top * 63, atol=0.51 + 32 / levels)
        bands = [float(width) for width in parts[4 * side : 4 * side + 4]]
        np.testing.assert_allclose(bands, 690 * entropy_bands(entropy[row]).numpy(), atol=0.04)
        here, curves = curves[: entropy.shape[1]], curves[entropy.shape[1] :]
        left = (56, 506)[side]
        for d, layer in zip(here, entropy.mean(-1).T, strict=True):
            x, y = places(d)
            np.testing.assert_allclose(x, left + 384 * steps / last, atol=0.06)
            np.testing.assert_allclose(y, 372 - 90 * layer / top, atol=0.06 + 45 / levels)
        _, y = places(losses[side])
        heights = np.minimum(losses_of(record), highest)
        np.testing.assert_allclose(y, 496 - 84 * (heights - lowest) / (highest - lowest), atol=0.06)
        if means[side] is not None:
            here, learnt = learnt[: entropy.shape[1]], learnt[entropy.shape[1] :]
            for d, layer in zip(here, means[side].T, strict=True):
                np.testing.assert_allclose(places(d)[1], 493 - 78 * (layer - low) / span, atol=0.06)
        assert drawn("selected", "visibility")[side] == ("visible" if has(entropy[0], explorer.selected) else "hidden")
        one = entropy[:, explorer.selected[0], explorer.selected[1]] if has(entropy[0], explorer.selected) else []
        d = drawn("one", "d")[side]
        if np.isfinite(one).all() and len(one):
            np.testing.assert_allclose(places(d)[0], left + 384 * steps / last, atol=0.06)
            np.testing.assert_allclose(places(d)[1], 372 - 90 * one / top, atol=0.06 + 45 / levels)
            assert texts.count("━ layer {}, head {}".format(*explorer.selected)) >= 1
        else:
            assert d == ""
    assert (fills, curves, learnt) == ([], [], [])
    assert ("neither run learned it" in texts) == (not len(found))
    for d, left in zip(drawn("cursor", "d"), (56, 506), strict=True):
        x = [float(place) for place in re.findall(r"M([\d.]+) ", d)]
        assert x == pytest.approx([left + 384 * explorer.step / last] * 2, abs=0.06)


def inspector_as_computed(root, explorer, entropy, attention, levels: int = 65_534):
    """Whether the inspector's map has the heads' entropies [L, H] and its matrix, bars and dot those of `attention`.

    `attention` is [T, T], of the chosen head at its temperature; `levels` are those of a weight in the page.
    """
    size, coarse = len(attention), levels < 256
    most = math.log(size)
    cells = root.locator(".entropy-cell")
    shades = [
        explorer.colors.index(fill) for fill in cells.evaluate_all("all => all.map((c) => c.getAttribute('fill'))")
    ]
    shown = entropy.clone()
    shown[explorer.layer, explorer.head] = attention_entropy(attention).mean()
    np.testing.assert_allclose(shades, shown.flatten() / most * 63, atol=0.51 + 0.2 * coarse)
    picture = root.locator(".entropy-matrix").get_attribute("href").split(",")[1]
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA"))[..., 3]
    np.testing.assert_allclose(alpha, 255 * attention.sqrt(), atol=0.52 + 2 * coarse)
    row = attention[explorer.position]
    bars = root.locator(".entropy-tokens i").evaluate_all("all => all.map((bar) => parseFloat(bar.style.height))")
    np.testing.assert_allclose(bars, 9 * row / row.max(), atol=0.0051 + 0.06 * coarse)
    marks = root.locator(".entropy-tokens span").evaluate_all("all => all.map((mark) => mark.style.outlineWidth)")
    assert [index for index, width in enumerate(marks) if width == "2px"] == [explorer.position]
    nats = attention_entropy(attention)
    y = places(root.locator("path.entropy-entropy").get_attribute("d"))[1]
    np.testing.assert_allclose(y, 334 - 290 * nats / most, atol=0.06 + 2 * coarse)
    dot = float(root.locator(".entropy-here").get_attribute("cy"))
    assert dot == pytest.approx(y[explorer.position], abs=0.11)


def has(heads, place: list[int]) -> bool:
    """Whether [layers, heads] has this [layer, head]."""
    return bool(place) and place[0] < heads.shape[0] and place[1] < heads.shape[1]


def losses_of(record) -> list[float]:
    return [loss for loss in record.history["loss"] if math.isfinite(loss)]


def places(d: str) -> np.ndarray:
    """Coordinates of a path, [2, n]."""
    return np.array([[float(number) for number in point.split()] for point in re.split("[ML]", d)[1:]]).T
