"""What the browser shows is what the library computes, after the keyboard and the mouse have moved the controls."""

import math

import pytest
import torch
from marks import inspector_as_computed, runs_as_recorded

from entropy_lib import record_entropy
from entropy_lib.explore import attention_inspector, penalty_explorer, run_explorer
from entropy_lib.explore.inspector import TEXTS
from entropy_lib.explore.recorded_runs import recorded
from entropy_lib.explore.tiny_model import load_tiny_model

DEEPER = "gpt2-18l", "SM+LN+G"  # size and variant of a run with other layers and no static head


@pytest.fixture(scope="module")
def records():
    return recorded(None)


def test_runs(page, records):
    """A run that the page did not have comes from the kernel, with another number of layers too."""
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-right)")
    root.scroll_into_view_if_needed()
    explorer = run_explorer(records)
    explorer.left = 1
    explorer.right = next(i for i, r in enumerate(records) if (r.size, r.variant) == DEEPER)
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


def test_a_head_of_the_penalty_is_shown_by_the_runs(page, records):
    """The kernel sends the history of a run that was not shown; both know the head, and the arrow keys move it."""
    heads = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-gamma)")
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-right)")
    penalty, explorer = penalty_explorer(), run_explorer(records)
    runs = ((n, r) for n, r in enumerate(penalty.records) if hasattr(r, "size"))
    penalty.run, record = next((n, r) for n, r in runs if (r.size, r.variant) == DEEPER)
    explorer.left = [other.path for other in records].index(record.path)
    explorer.right = int(root.locator(".entropy-right").input_value())
    explorer.step = int(root.locator("output").inner_text())
    heads.scroll_into_view_if_needed()
    heads.locator(".entropy-run").select_option(str(penalty.run))
    heads.locator(".entropy-cell").nth(17 * 12 + 5).click()
    penalty.selected = explorer.selected = [17, 5]
    heads.locator(".entropy-status", has_text=penalty.words()).wait_for()
    root.locator(".entropy-status", has_text=explorer.words()).wait_for()
    root.locator("svg g[tabindex]").first.focus()
    for key in ("ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    explorer.selected = [16, 4]
    root.locator(".entropy-status", has_text=explorer.words()).wait_for()
    runs_as_recorded(root, explorer, levels=65_535)
    told = page.evaluate(
        """async () => {
            const future = lab.kernel().requestExecute({ code: "print(penalty.selected, runs.selected, runs.left)" });
            let told = "";
            future.onIOPub = ({ content }) => (told += content.text ?? "");
            await future.done;
            return told;
        }"""
    )
    assert told.split("\n")[0] == f"[17, 5] [16, 4] {explorer.left}"
    page.keyboard.press("Escape")


def test_inspector(page):
    """A text typed in the page is read by the kernel; what is shown of it is the library's."""
    root = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-position)")
    root.scroll_into_view_if_needed()
    explorer = attention_inspector()
    explorer.text = "import math\nprint(math.pi)\n"
    says = lambda: root.locator(".entropy-status", has_text=explorer.words()).wait_for()  # noqa: E731
    root.locator("textarea").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(explorer.text, delay=20)
    press(page, root, "layer", "Home", "ArrowRight", "ArrowRight")
    press(page, root, "head", "End")
    explorer.layer, explorer.head = 2, 3
    says()
    model, tokenizer = load_tiny_model()
    ids = tokenizer(explorer.text, return_tensors="pt").input_ids
    with torch.no_grad(), record_entropy(model) as recorder:
        model(ids)
    entropy = torch.cat(recorder.entropies)  # [L, H, T]: one sequence
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[2][0, -1]

    inspector_as_computed(root, explorer, entropy.mean(-1), attention)
    assert explorer.position == ids.shape[1] - 1  # the end of the text

    root.locator(".entropy-tokens span").nth(4).hover()
    explorer.position = 4
    says()
    inspector_as_computed(root, explorer, entropy.mean(-1), attention)
    nats = entropy[2, -1, 4].item()
    assert f"{nats:.3g} nats, {math.exp(nats):.3g} keys" in root.locator(".entropy-status").inner_text()

    cell = root.locator(".entropy-cell").nth(1 * 4 + 2).bounding_box()
    page.mouse.click(cell["x"] + 3, cell["y"] + 3)
    explorer.layer, explorer.head = 1, 2
    says()
    press(page, root, "temperature", *["ArrowRight"] * 12)
    explorer.temperature = 2.0
    says()
    lists = root.locator(".entropy-expected")
    page.wait_for_timeout(500)  # for the kernel's pass at the last of twelve temperatures
    for name, found in zip(("before", "after"), lists.all(), strict=True):
        told = [float(p) for p in found.locator("span").all_text_contents()]
        assert told == pytest.approx([p for _, p in explorer.predictions[name][4]], abs=6e-4)
    root.locator("textarea").fill("")
    root.locator(".entropy-status", has_text="no tokens").wait_for()
    root.locator(".entropy-try").select_option(label="brackets")
    explorer.text = TEXTS["brackets"]
    says()
    page.evaluate("code => lab.kernel().requestExecute({ code }).done", "inspector.slow = True")
    root.get_by_text("read when you leave the box").wait_for()
    root.locator("textarea").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("x = y")
    page.wait_for_timeout(500)
    says()  # still of the text before
    root.locator(".entropy-layer").focus()
    explorer.text = "x = y"
    says()
    page.evaluate("code => lab.kernel().requestExecute({ code }).done", "inspector.slow = False")


def press(page, root, name: str, *keys: str):
    root.locator(f".entropy-{name}").focus()
    for key in keys:
        page.keyboard.press(key)
