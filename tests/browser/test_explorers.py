"""What the browser shows is what the library computes, after the keyboard and the mouse have moved the controls."""

import math

import numpy as np
import pytest
import torch
from window import MARKS, Window, runs_as_recorded

from entropy_lib import record_entropy
from entropy_lib.explore import run_explorer
from entropy_lib.explore.recorded_runs import recorded
from entropy_lib.explore.tiny_model import load_tiny_model


@pytest.fixture(scope="module")
def records():
    return recorded(None)


@pytest.mark.parametrize("name", MARKS)
def test_tab_reaches_every_control(page, name):
    window = Window(page, name)
    controls = window.root.locator(".widget-slider, .widget-dropdown, .widget-checkbox, button[class*=entropy-]")
    assert all(words.strip() for words in controls.all_text_contents())
    reachable = window.root.locator(".noUi-handle, select, textarea, input[type=checkbox], button.widget-button")
    enabled = "them => them.flatMap((it, index) => it.matches(':disabled, [disabled] *') ? [] : [index])"
    wanted = set(reachable.evaluate_all(enabled))
    window.root.evaluate("root => (root.tabIndex = -1, root.focus())")
    reached = set()
    for _ in range(4 * reachable.count()):  # readouts of sliders take the focus too
        page.keyboard.press("Tab")
        if not window.root.evaluate("root => root.contains(document.activeElement)"):
            break
        reached.add(reachable.evaluate_all("them => them.indexOf(document.activeElement)"))
    assert wanted
    assert wanted <= reached


@pytest.mark.parametrize("name", MARKS)
def test_every_slider_has_the_name_that_is_beside_it(page, name):
    root = Window(page, name).root
    labels = root.locator(".widget-slider .widget-label").all_text_contents()
    assert len(labels) == root.locator(".noUi-handle").count() > 0
    for text in labels:
        assert root.get_by_role("slider", name=text, exact=True).count() == 1


def test_runs(page, records):
    """A run that the page did not have comes from the kernel, with another number of layers too."""
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-right)")
    root.scroll_into_view_if_needed()
    explorer = run_explorer(records)
    explorer.left = 1
    explorer.right = next(i for i, r in enumerate(records) if (r.size, r.status) == ("gpt2-18l", "finished"))
    root.locator(".entropy-left").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    root.locator(".entropy-right").select_option(str(explorer.right))
    for side in ("left", "right"):
        root.locator(".entropy-status", has_text=explorer.shown(side)[0].variant + " at step").wait_for()
    track = root.locator(".entropy-step").bounding_box()
    page.mouse.click(track["x"] + 0.2 * track["width"], track["y"] + track["height"] / 2)
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(500)
    explorer.step = int(root.locator("output").inner_text())
    assert 0 < explorer.step < explorer.shown("right")[0].history["step"].iloc[-1]
    root.locator(".entropy-status", has_text=explorer.words()).wait_for()
    runs_as_recorded(root, explorer, levels=65_535)


def test_inspector(page):
    window = Window(page, "inspector")
    text = "import math\nprint(math.pi)\n"
    window.control("text").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(text, delay=20)
    window.press("layer", "Home")
    window.press("layer", "ArrowRight", 2)
    window.press("head", "End")
    model, tokenizer = load_tiny_model()
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad(), record_entropy(model) as recorder:
        model(ids)
    entropy = torch.cat(recorder.entropies)  # [L, H, T]: one sequence
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[2][0, -1]

    cells, weights, _, grid, chosen, matrix, here = window.traces()
    np.testing.assert_allclose(grid["z"], entropy.mean(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(matrix["z"], attention, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cells["color"], entropy[2, -1], rtol=1e-4, atol=1e-5)
    assert (chosen["x"], chosen["y"]) == ([3], [2])
    assert here["y"] == [ids.shape[1] - 1] * 2  # the end of the text

    position = 4
    hover(window, cells["base"][position] + cells["x"][position] / 2, cells["y"][position])
    row = attention[position]
    weights, here = window.traces()[1], window.traces()[-1]
    np.testing.assert_allclose(weights["width"], 0.3 * row / row.max(), rtol=1e-4, atol=1e-6)
    assert here["y"] == [position] * 2
    assert window.readout("position") == position
    nats = entropy[2, -1, position].item()
    assert f"{nats:.3g} nats, {math.exp(nats):.3g} keys" in window.status()


def hover(window, x: float, y: float):
    """The mouse to a place in the figure's first panel, in the panel's coordinates."""
    pixel = window.figure.evaluate(
        """(figure, [x, y]) => {
          const { xaxis, yaxis } = figure._fullLayout, box = figure.getBoundingClientRect();
          return [box.x + xaxis._offset + xaxis.l2p(x), box.y + yaxis._offset + yaxis.l2p(y)];
        }""",
        [x, y],
    )
    window.page.mouse.move(pixel[0] - 3, pixel[1])
    window.page.mouse.move(*pixel, steps=3)
    window.settle()
