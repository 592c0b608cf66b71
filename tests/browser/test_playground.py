"""In JupyterLab the playground trains, its curves grow, Stop and Resume do as they say, a page loaded anew has all."""

import json
import re
import time
from statistics import median

import numpy as np
import pytest
from conftest import prepare
from marks import OUTPUT, places
from test_slow_start import no_time_to_start  # noqa: F401

from entropy_lib.explore.playground import BUTTONS, QUICK, SETTINGS, loss_axis
from entropy_lib.training.corpus import load_corpus, unigram_entropy
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.train import train_variant

FRAME = 33  # ms: two frames, since machines of a CI are shared


@pytest.fixture
def root(page):
    made = page.locator(".jp-OutputArea-output .entropy-module:has(.entropy-coefficient)")
    made.scroll_into_view_if_needed()
    click(made, "clear")
    made.locator(".entropy-show", has_text="no run yet").wait_for()
    yield made
    click(made, "clear")
    made.locator(".entropy-show", has_text="no run yet").wait_for()


def click(root, button):
    button = root.locator(f"button.entropy-{button}")
    if button.is_enabled():
        button.click()


def losses(root, index: int = 0) -> np.ndarray:
    """Places of a run's losses in the picture, [2, n]."""
    drawn = root.locator("svg .entropy-loss").evaluate_all("all => all.map((path) => path.getAttribute('d'))")
    return places(drawn[index]) if len(drawn) > index and drawn[index] else np.zeros((2, 0))


def status(root) -> str:
    return root.locator(".entropy-status").inner_text()


def says(root, words: str):
    root.locator(".entropy-status", has_text=words).wait_for()


def until(condition, what: str, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def press(root, name: str, key: str, times: int = 1):
    root.locator(f".entropy-{name}").focus()
    for _ in range(times):
        root.page.keyboard.press(key)


def readout(root, name: str) -> float:
    return float(root.locator(f"label:has(.entropy-{name}) output").inner_text())


def set_steps(root, steps: int):
    """From the left end of the slider, whose first step is 1."""
    press(root, "steps", "Home")
    press(root, "steps", "ArrowRight", steps - 1)
    assert readout(root, "steps") == steps


def test_a_run_in_the_page_is_train_variant_s(root, tmp_path):
    set_steps(root, 8)
    press(root, "learning_rate", "Home")
    click(root, "run")
    says(root, "Finished")
    recipe = get_recipe("smoke", steps=8, learning_rate=1e-4, **QUICK)
    corpus = load_corpus("sample", recipe.context_length)
    record = train_variant("SM", corpus, recipe, run_dir=tmp_path, progress=False)
    x, y = losses(root)
    assert x == pytest.approx(56 + 834 * record.history["step"] / 8, abs=0.06)
    expected = record.history["loss"].tolist()
    axis = loss_axis([{"loss": expected, "unigram": unigram_entropy(corpus[0])}])
    shown = axis["low"] + (246 - y) / 220 * (axis["high"] - axis["low"])
    assert shown == pytest.approx(expected, rel=1e-3)
    assert f"validation loss {record.eval_loss:.3g}" in status(root)
    numbers = [float(cell) for cell in root.locator("svg .entropy-mark").all_text_contents()]
    np.testing.assert_allclose(numbers, np.ravel(record.history["entropy"].tolist()[-1]), atol=0.0061)
    assert root.locator(".entropy-progress").evaluate("bar => [bar.value, bar.max]") == [8, 8]


def test_stop_and_resume(root):
    press(root, "steps", "End")
    press(root, "learning_rate", "Home")
    click(root, "run")
    says(root, "Training.")
    first = until(lambda: losses(root).shape[1], "a loss")
    until(lambda: losses(root).shape[1] > first + 1, "the curve to grow")
    assert root.locator("button:disabled").all_text_contents() == ["Run", "Resume"]
    root.locator("button.entropy-stop").click()
    says(root, "Stopped; Resume goes on")
    at = lambda: int(root.locator(".entropy-status").inner_text().split(" step ")[1].split()[0])  # noqa: E731
    stopped, steps = losses(root), at()
    assert steps < readout(root, "steps")
    assert root.locator("button:disabled").all_text_contents() == ["Stop"]
    time.sleep(1)
    np.testing.assert_array_equal(losses(root), stopped)
    root.locator("button.entropy-resume").click()
    until(lambda: losses(root).shape[1] > stopped.shape[1] + 1, "the run to go on")
    resumed = losses(root)[:, : stopped.shape[1]]
    np.testing.assert_allclose(resumed, stopped, atol=0.11)  # the axis may have grown by a hair
    root.locator("button.entropy-stop").click()
    says(root, "Stopped; Resume goes on")
    assert at() > steps


def test_the_map_stays_at_a_step_while_the_run_goes_on(root):
    press(root, "steps", "End")
    press(root, "learning_rate", "Home")
    click(root, "run")
    until(lambda: losses(root).shape[1] > 3, "some steps")
    press(root, "step", "Home")
    root.get_by_text("Every head at step 1 (nats)").wait_for()
    says(root, "at step 1: loss")
    drawn = losses(root).shape[1]
    until(lambda: losses(root).shape[1] > drawn + 1, "the run to go on")
    assert root.get_by_text("Every head at step 1 (nats)").count() == 1
    press(root, "step", "End")
    until(lambda: "at step 1:" not in status(root), "the map of the newest step")
    newest = root.get_by_text("Every head at step").text_content()
    until(lambda: root.get_by_text("Every head at step").text_content() != newest, "the map to follow")
    root.locator("button.entropy-stop").click()
    says(root, "Stopped")


def test_the_page_answers_while_a_run_goes_on(page, root):
    press(root, "steps", "End")
    click(root, "run")
    until(lambda: losses(root).shape[1] > 3, "some steps")
    report = root.evaluate(
        """async (root) => {
            const frames = [], messages = [], redraws = [];
            const listen = (_, { msg, direction }) => {
                const ofWidget = direction === "recv" && msg.header.msg_type === "comm_msg";
                if (ofWidget) messages.push(JSON.stringify(msg.content).length);
            };
            const watch = new MutationObserver(() => redraws.push(performance.now()));
            lab.kernel().anyMessage.connect(listen);
            watch.observe(root.querySelector("svg[role=img]"), { subtree: true, childList: true });
            for (let last = performance.now(); frames.length < 120; last = performance.now()) {
                await new Promise(requestAnimationFrame);
                frames.push(performance.now() - last);
            }
            lab.kernel().anyMessage.disconnect(listen);
            watch.disconnect();
            return { frames, messages, redraws: redraws.length };
        }"""
    )
    report["input"] = root.evaluate(
        """async (root) => {
            const times = [], slider = root.querySelector(".entropy-step");
            for (let k = 0; k < 20; k++) {
                const start = performance.now();
                slider.value = k % 2;
                slider.dispatchEvent(new Event("input", { bubbles: true }));
                await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
                times.push(performance.now() - start);
                await new Promise((later) => setTimeout(later, 40));
            }
            return times;
        }"""
    )
    click(root, "stop")
    says(root, "Stopped")
    (OUTPUT / "latency_playground.json").write_text(json.dumps(report))
    assert report["redraws"] >= 2
    assert max(report["messages"]) < 3000  # bytes: new rows only
    assert median(report["frames"]) < FRAME
    assert median(report["input"]) < FRAME


def test_tab_reaches_every_control_and_each_has_its_name(page, root):
    controls = root.locator("input, select, button")
    names = controls.evaluate_all("all => all.map((it) => it.getAttribute('aria-label') || it.textContent)")
    settings = ["Variant", "Learning rate", "Steps", "t₀", "θ₀", "γ", "λ"]
    assert names == [*settings, "Run", "Stop", "Resume", "Clear", "Show", "Map at step"]
    classes = ["variant", *SETTINGS, *BUTTONS, "show", "step"]
    assert controls.evaluate_all("all => all.map((it) => it.className)") == [f"entropy-{name}" for name in classes]
    off = {"t₀", "θ₀", "γ", "λ", "Stop", "Resume", "Clear", "Map at step"}  # of SM, before a run
    assert reached(page, root, controls) == set(names) - off
    root.locator(".entropy-variant").select_option("EReg(SM(t)+ScFuFFN)")
    root.locator(".entropy-threshold:enabled").wait_for()
    assert reached(page, root, controls) == set(names) - off | {"t₀", "θ₀", "γ", "λ"}
    root.locator(".entropy-variant").select_option("SM")
    root.locator(".entropy-threshold:disabled").wait_for()


def reached(page, root, controls) -> set[str]:
    root.evaluate("root => (root.tabIndex = -1, root.focus())")
    found = set()
    for _ in range(controls.count() + 1):
        page.keyboard.press("Tab")
        if not root.evaluate("root => root.contains(document.activeElement)"):
            break
        name = "it => it.getAttribute('aria-label') || it.textContent"
        found.add(page.evaluate(f"({name})(document.activeElement)"))
    return found


def test_the_keyboard_alone_runs_and_stops(page, root):
    press(root, "steps", "End")
    root.locator(".entropy-run").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.matches('.entropy-stop')")  # where Run is off
    page.keyboard.press("Enter")
    says(root, "Stopped; Resume goes on")


def test_a_page_loaded_anew_shows_the_runs_and_hears_of_more(page, root):
    set_steps(root, 8)
    press(root, "learning_rate", "Home")
    click(root, "run")
    says(root, "Finished")
    first, words = losses(root), status(root)
    page.evaluate("lab.app.commands.execute('docmanager:save')")
    for _ in range(6):  # on a busy machine JupyterLab asks the kernel for its widgets too early
        page.reload(wait_until="domcontentloaded")
        prepare(page)
        try:
            root.scroll_into_view_if_needed(timeout=10_000)
            break
        except Exception as error:
            assert "Timeout" in str(error)  # noqa: PT017
        page.errors[:] = [error for error in page.errors if "widget model not found" not in error]
    says(root, words)
    np.testing.assert_array_equal(losses(root), first)
    click(root, "run")
    until(lambda: losses(root, 1).shape == first.shape, "the second run")
    np.testing.assert_allclose(losses(root, 1), losses(root, 0), atol=0.2)  # the same settings and seed
    assert root.locator(".entropy-show option").count() == 2


def test_a_training_is_seen_where_anywidget_has_given_the_module_up(page, root, no_time_to_start):  # noqa: F811
    page.evaluate("lab.runCell('playground = training_playground(')")
    root.locator("label:has(.entropy-learning_rate) output", has_text=re.compile("^0.1$")).wait_for()  # set at once
    set_steps(root, 8)
    press(root, "learning_rate", "Home")
    click(root, "run")
    says(root, "Finished")
    assert losses(root).shape[1] == 3  # steps 1, 4 and 8
    page.evaluate("lab.kernel().requestExecute({ code: 'playground.step = 1' }).done")
    root.get_by_text("Every head at step 1 (nats)").wait_for()
