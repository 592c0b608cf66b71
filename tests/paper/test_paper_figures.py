"""Printed and recorded gaps land where they belong; layer curves of several runs share one scale."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

figures = pytest.importorskip("paper.figures", exc_type=ImportError)

GAPS = {"SM+LN+G": (0.0, 0.0), "SM+LN": (0.257, 0.3), "SM": (math.inf, math.inf), "SM+G": (0.19, math.nan)}


def dots(figure, name):
    (trace,) = [t for t in figure.data if t.name == name and t.x[0] is not None]
    return dict(zip(trace.y, zip(trace.x, trace.marker.symbol, strict=True), strict=True))


def test_gaps_are_per_cents_and_a_collapse_is_a_cross_at_the_edge():
    figure = figures.gap_dots(GAPS, "gaps")
    paper, here = dots(figure, "printed in the paper"), dots(figure, "recorded here")
    assert paper["SM+LN"] == (pytest.approx(25.7), "circle-open")
    assert here["SM+LN"] == (30.0, "circle")
    assert set(here) == set(GAPS) - {"SM+G"}
    assert (paper["SM"][1], here["SM"][1]) == ("x-open", "x")
    assert 30 < paper["SM"][0] < figure.layout.xaxis.range[1]
    assert figure.layout.xaxis.tickvals == (0, 5, 10, 15, 20, 25, 30)
    assert figure.layout.yaxis.categoryarray == ("SM+G", "SM", "SM+LN", "SM+LN+G")
    json.dumps(figure.to_plotly_json())


@pytest.mark.filterwarnings("error")  # a table's numbers are NumPy's, which warn of ∞ - ∞ where Python's do not
def test_the_title_says_how_far_the_two_are_apart():
    def title(gaps):
        gaps = {name: tuple(np.array(pair)) for name, pair in gaps.items()}
        return figures.gap_dots(gaps, "Table 2").layout.title.text

    assert "Table 2: our gaps are within 5 points of the paper's<" in title(GAPS) + "<"
    lost = {"SM+WNorm": (0.35, math.inf), "SM+SNorm": (0.34, -0.01)}
    assert "up to 35 points off the paper's; SM+WNorm collapsed here" in title(GAPS | lost)
    assert "Table 2: SM+WNorm collapsed here" in title({"SM+WNorm": lost["SM+WNorm"]})
    assert "no gap on record" in title({name: (paper, math.nan) for name, (paper, _) in GAPS.items()})


def test_gaps_without_records_or_collapse():
    figure = figures.gap_dots({"SM+LN+G": (0.0, math.nan), "SM+LN": (-0.1, math.nan)}, "gaps")
    assert not [a for a in figure.layout.annotations if "collapsed" in a.text]
    assert figure.layout.xaxis.range[0] < -10
    assert len(dots(figure, "printed in the paper")) == 2


def test_panels_hold_each_run_and_one_legend():
    runs = {"SM+LN+G": (range(5), torch.rand(5, 3, 2)), "SM": (range(2), torch.rand(2, 3, 2))}
    figure = figures.layer_entropy_panels(runs, 128, "layers")
    assert [len(trace.x) for trace in figure.data] == [5, 5, 5, 2, 2, 2]
    assert [trace.showlegend for trace in figure.data] == [True] * 3 + [False] * 3
    torch.testing.assert_close(torch.tensor(figure.data[4].y), runs["SM"][1][:, 1].mean(-1), atol=1e-5, rtol=1e-5)
    assert {tuple(axis.range) for axis in (figure.layout.yaxis, figure.layout.yaxis2)} == {(0, math.log(128))}
    assert len({trace.xaxis for trace in figure.data}) == 2
    deep = figures.layer_entropy_panels({"SM": (range(2), torch.rand(2, 18, 2))}, 128, "layers").layout
    assert deep.height - deep.margin.t - deep.margin.b >= 18 * 20  # the lines of the legend


def test_a_grid_of_results_says_what_has_none():
    perplexity = pd.DataFrame({0.001: [math.nan, 30.0], 0.0006: [46.1, math.nan]}, index=["QK", "FFN"])
    words = perplexity.map("{:.1f}".format).where(perplexity.notna(), "collapsed")
    (grid,) = figures.result_grid(perplexity, words, "t", "learning rate").data
    assert [list(row) for row in grid.z] == [[None, 46.1], [30.0, None]]
    assert [list(row) for row in grid.text] == [["collapsed", "46.1"], ["30.0", "collapsed"]]
    assert (list(grid.x), list(grid.y)) == (["0.001", "0.0006"], ["QK", "FFN"])
