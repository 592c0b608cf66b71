"""The parts of the explorers: one redraw per change, classes to select by, colours for light and dark pages."""

import pytest

pytest.importorskip("ipywidgets")
controls = pytest.importorskip("entropy_lib.explore.controls", exc_type=ImportError)
figures = pytest.importorskip("entropy_lib.explore.figures", exc_type=ImportError)


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
            "on": controls.toggle("on", "on"),
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


def test_words():
    assert controls.keys_worth(0.0) == "0 nats, 1 keys’ worth"
    words = controls.below_inside_above(3, 4, 5)
    assert all(part in words for part in ("3 below", "4 inside", "5 above", figures.COLLAPSE, figures.OVERLOAD))


def test_one_key_is_worth_zero_nats_without_a_sign():
    assert controls.keys_worth(-0.0) == "0 nats, 1 keys’ worth"
