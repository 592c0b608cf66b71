"""Bars of parts and the frontier of perplexity against bytes: what is drawn is what was given."""

import math

import pytest

pytest.importorskip("plotly")
from entropy_lib.explore.cost_figures import PART_COLORS, part_bars, quality_against_cost
from entropy_lib.private_inference.architecture import PARTS

COSTS = {"a": {"softmax": 2.0, "activation": 3.0}, "b": {"softmax": 2.0, "LayerNorm": 0.5}}


def test_every_part_has_a_colour():
    assert set(PART_COLORS) == set(PARTS)


def test_bars_hold_the_parts_and_totals():
    figure = part_bars(COSTS, title="A title", x_title="GB")
    assert {trace.name: list(trace.x) for trace in figure.data} == {
        "softmax or its stand-in": [2.0, 2.0],
        "LayerNorm": [0.0, 0.5],
        "activation": [3.0, 0.0],
    }
    assert [note.text for note in figure.layout.annotations] == ["5", "2.5"]
    assert figure.layout.xaxis.title.text == "GB"


def test_marks_are_at_the_printed_values_and_inside_the_axis():
    figure = part_bars(COSTS, title="", x_title="GB", marks={"b": 7.0})
    cross = figure.data[-1]
    assert (list(cross.x), list(cross.y), cross.marker.symbol) == ([7.0], ["b"], "x")
    assert figure.layout.xaxis.range[1] > 7.0


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"'lookup'.*the parts are softmax"):
        part_bars({"a": {"lookup": 1.0}}, title="", x_title="")


def test_the_line_joins_what_nothing_beats():
    points = {"cheap": (1.0, 9.0), "good": (5.0, 3.0), "beaten": (6.0, 4.0), "middle": (2.0, 6.0)}
    figure = quality_against_cost(points, title="", x_title="GB", y_title="perplexity")
    assert list(zip(figure.data[0].x, figure.data[0].y, strict=True)) == [(1.0, 9.0), (2.0, 6.0), (5.0, 3.0)]
    assert {trace.name: (trace.x[0], trace.y[0]) for trace in figure.data[1:]} == points
    assert [note.text for note in figure.layout.annotations] == list(points)


def test_names_that_move_apart_stay_above_the_axis():
    points = {"dear": (1.0, 9.0)} | {f"alike {n}": (2.0 + n, 3.0 + n / 100) for n in range(5)}
    figure = quality_against_cost(points, title="", x_title="GB", y_title="perplexity")
    low, high = figure.layout.yaxis.range
    pixels = 300 / (high - low)
    assert min((note.y - low) * pixels - note.ay for note in figure.layout.annotations) > 6


def test_spreads_are_bars_and_a_logarithmic_axis_keeps_names_at_their_dots():
    points = {"cheap": (10.0, 9.0), "dear": (1000.0, 3.0)}
    spread = {"cheap": 0.5, "dear": math.nan}
    figure = quality_against_cost(points, title="", x_title="MB", y_title="", spread=spread, log_x=True)
    cheap, dear = figure.data[1:]
    assert (cheap.error_y.array[0], dear.error_y.array) == (0.5, None)
    assert [note.x for note in figure.layout.annotations] == [1.0, 3.0]
    low, high = figure.layout.xaxis.range
    assert (figure.layout.xaxis.type, low < 1.0, high > 3.0) == ("log", True, True)
