"""The parts of the explorers: one redraw per change, classes to select by, colours for light and dark pages."""

import threading

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")
controls = pytest.importorskip("entropy_lib.explore.controls", exc_type=ImportError)
figures = pytest.importorskip("entropy_lib.explore.figures", exc_type=ImportError)
from ipywidgets.widgets.widget import _put_buffers  # noqa: E402


class Doubler(controls.Explorer):
    """y = 2x, or an error for x = 13; drawing at x = 7 moves the other slider."""

    def __init__(self):
        self.drawn = []
        figure = controls.go.Figure(layout={"template": "entropy"})
        figure.add_scatter(y=[0], line={"color": figures.INK})
        sliders = {
            "x": controls.slider("x", "x", 1, 0, 20, 1),
            "t": controls.slider("t", "t", 1.0, 0.01, 100, 0.05, log=True, tip="temperature"),
            "kind": controls.dropdown("kind", "kind", ["a", "b"]),
            "on": controls.dropdown("on", "on", [False, True]),
        }
        super().__init__(figure, sliders, [["x", "t"], ["kind", "on"]])

    def draw(self, changed):
        self.drawn.append(changed)
        if self.controls["x"].value == 13:
            raise ValueError("13 is not drawn")
        if self.controls["x"].value == 7:
            self.controls["t"].value = 10.0
        self.figure.data[0].y = [2 * self.controls["x"].value]
        self.figure.layout.xaxis.title.text = f"t = {self.controls['t'].value:g}"
        self.say(f"x is {self.controls['x'].value}")


def test_a_change_draws_once_and_is_sent_once(monkeypatch):
    explorer, sent = Doubler(), []
    assert explorer.drawn == [None]
    monkeypatch.setattr(type(explorer.figure), "_send_update_msg", lambda *a, **k: sent.append((a, k)))
    explorer.controls["x"].value = 4
    assert (explorer.drawn, tuple(explorer.figure.data[0].y), len(sent)) == ([None, "x"], (8,), 1)
    assert "x is 4" in explorer.status.value
    explorer.controls["x"].value = 4
    explorer.controls["kind"].value = "b"
    explorer.controls["on"].value = True
    assert explorer.drawn == [None, "x", "kind", "on"]


def test_a_control_that_drawing_sets_does_not_draw_again():
    explorer = Doubler()
    explorer.controls["x"].value = 7
    assert explorer.drawn == [None, "x"]
    assert explorer.figure.layout.xaxis.title.text == "t = 10"


def test_an_error_is_shown_in_place_and_the_figure_stays():
    explorer = Doubler()
    explorer.controls["x"].value = 13
    assert "13 is not drawn" in explorer.status.value
    assert tuple(explorer.figure.data[0].y) == (2,)
    explorer.controls["x"].value = 5
    assert tuple(explorer.figure.data[0].y) == (10,)
    assert "13" not in explorer.status.value


def test_controls_have_labels_and_classes():
    explorer = Doubler()
    for name, control in explorer.controls.items():
        assert control.description == name
        assert f"entropy-{name}" in control._dom_classes
    assert explorer.controls["x"].continuous_update
    assert explorer.controls["t"].min == -2
    assert explorer.controls["t"].value == 1


def test_figures_show_on_light_and_dark_pages():
    explorer = Doubler()
    layout = explorer.figure.layout.template.layout
    assert layout.paper_bgcolor == controls.CLEAR
    assert layout.font.color == layout.xaxis.linecolor == explorer.figure.data[0].line.color == controls.MID_INK
    for color in [figures.COLLAPSE, figures.OVERLOAD, figures.HEALTHY, *figures.VARIANT_COLORS.values()]:
        seen = controls.legible(color)
        luminance = controls._luminance([int(seen[i : i + 2], 16) for i in (1, 3, 5)])
        assert (luminance + 0.05) / (0.0056 + 0.05) >= 2.99, color
    still = explorer.still()
    assert not isinstance(still, controls.go.FigureWidget)
    assert tuple(still.data[0].y) == (2,)
    assert still == Doubler().still()  # nothing in it is random


def test_one_key_is_worth_zero_nats_without_a_sign():
    assert controls.keys_worth(-0.0) == controls.keys_worth(0.0) == "0 nats, 1 keys’ worth"


MOVED = {}


def plain(value):
    """What a figure holds, or what is sent of it, as lists."""
    if isinstance(value, dict) and set(value) == {"buffer", "dtype", "shape"}:
        return np.frombuffer(value["buffer"], value["dtype"]).tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", MOVED)
def test_a_page_that_is_loaded_anew_gets_the_figure_as_it_is(name, monkeypatch):
    from entropy_lib import explore

    explorer = getattr(explore, name)()
    figure, sent = explorer.figure, []
    control, value = MOVED[name]
    explorer.controls[control].value = value
    monkeypatch.setattr(figure, "_send", lambda message, buffers=None: sent.append((message, buffers)))
    figure._handle_msg({"content": {"data": {"method": "request_state"}}})
    [(message, buffers)] = sent
    _put_buffers(message["state"], message["buffer_paths"], buffers)
    for state in [message["state"], figure.get_state()]:  # ipywidgets 7 asks figure by figure, 8 for all at once
        data = next(state[name] for name in ("_widget_data", "_data") if name in state)  # plotly 5 has the second
        layout = next(state[name] for name in ("_widget_layout", "_layout") if name in state)
        assert plain(data) == plain(figure._data)
        assert plain(layout) == plain(figure._layout)
        assert {line["uid"]: line for line in plain(data)}[figure.data[0].uid] == plain(figure.data[0].to_plotly_json())
    explorer.close()


def test_a_redraw_takes_one_thread_from_nobody_else():
    """Two redraws that overlap in two threads, an exception, and a thread that starts in the middle of a redraw."""
    inside, outside, started = threading.Barrier(2, timeout=20), threading.Event(), []

    class Counter(Doubler):
        def draw(self, changed):
            if changed:
                started.append(("drawing", torch.get_num_threads()))
                inside.wait()
                outside.wait(20)
            super().draw(changed)
            if changed == "kind":
                raise RuntimeError("drawing fails")

    def count(name):
        started.append((name, torch.get_num_threads()))

    def redraw(explorer):
        torch.get_num_threads()
        explorer.redraw("x")
        count("after")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one, other = Counter(), Counter()
        threads = [threading.Thread(target=redraw, args=[one])]
        threads[0].start()
        threads.append(threading.Thread(target=lambda: (inside.wait(), count("new"), outside.set())))
        threads[1].start()
        for thread in threads:
            thread.join()
        inside = threading.Barrier(1)
        with pytest.raises(RuntimeError, match="drawing fails"):
            other.redraw("kind")
        count("here")
        newest = threading.Thread(target=count, args=["newest"])
        newest.start()
        newest.join()
    finally:
        torch.set_num_threads(before)
    counts = dict(started)
    assert counts.pop("drawing") in (1, 3)  # 3 where torch comes without OpenMP
    assert set(counts.values()) == {3}
    assert {"new", "after", "here", "newest"} == set(counts)
