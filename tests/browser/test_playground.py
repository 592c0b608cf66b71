"""In the page the playground trains, its curves grow, Stop stops it and Resume goes on."""

import time

import pytest
from window import Window

from entropy_lib.training.corpus import load_corpus
from entropy_lib.training.recipe import get_recipe
from entropy_lib.training.train import train_variant


@pytest.fixture
def window(page):
    made = Window(page, "playground")
    click(made, "clear")
    yield made
    click(made, "clear")


def click(window, button):
    button = window.root.locator(f"button.entropy-{button}")
    if button.is_enabled():
        button.click()
    window.settle()


def losses(window) -> dict[int, float]:
    first = window.traces()[0]
    return dict(zip(first["x"], first["y"], strict=True))


def until(condition, what: str, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def set_steps(window, steps: int):
    """From the left end of the slider, whose first step is 1."""
    window.press("steps", "Home")
    window.press("steps", "ArrowRight", steps - 1)
    assert window.readout("steps") == steps


def test_a_run_in_the_page_is_train_variant_s(window, tmp_path):
    set_steps(window, 8)
    window.press("learning_rate", "Home")
    click(window, "run")
    until(lambda: "Finished" in window.status(), "the run's end")
    window.settle()
    recipe = get_recipe(
        "smoke", steps=8, learning_rate=1e-4, sequences_per_step=8, micro_batch=8, warmup_ratio=0.1, entropy_every=4,
        eval_every=0, eval_blocks=32, checkpoint_every=0,
    )  # fmt: skip
    record = train_variant("SM", load_corpus("sample", recipe.context_length), recipe, run_dir=tmp_path, progress=False)
    shown = losses(window)
    assert list(shown) == record.history["step"].tolist()
    assert list(shown.values()) == pytest.approx(record.history["loss"].tolist(), rel=1e-3)
    assert f"validation loss {record.eval_loss:.3g}" in window.status()


def test_stop_and_resume(window):
    window.press("steps", "End")
    window.press("learning_rate", "Home")
    click_at_once = window.root.locator("button.entropy-run").click
    click_at_once()
    first = until(lambda: losses(window), "a loss")
    until(lambda: len(losses(window)) > len(first) + 1, "the curve to grow")
    window.root.locator("button.entropy-stop").click()
    until(lambda: "Stopped" in window.status(), "the run to stop")
    window.settle()
    stopped = losses(window)
    assert max(stopped) < window.readout("steps")
    time.sleep(1)
    assert losses(window) == stopped
    window.root.locator("button.entropy-resume").click()
    until(lambda: max(losses(window)) > max(stopped) + 4, "the run to go on")
    resumed = losses(window)
    assert all(resumed[step] == loss for step, loss in stopped.items())
    window.root.locator("button.entropy-stop").click()
    until(lambda: "Stopped" in window.status(), "the run to stop again")
