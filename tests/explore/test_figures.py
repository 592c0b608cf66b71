"""The figures carry the data they were given, in the companion's look, and stay small."""

import builtins
import importlib
import itertools
import json
import math
import sys

import pytest
import torch

from entropy_lib import PRIVATE_VARIANTS, VARIANTS, entropy_bands, max_entropy

figures = pytest.importorskip("entropy_lib.explore.figures", exc_type=ImportError)


def history(last, n=20):
    return {"step": list(range(n)), "loss": [last + 5 * math.exp(-i / 4) for i in range(n)]}


def texts(figure):
    return [annotation.text for annotation in figure.layout.annotations]


def test_every_variant_has_a_colour_of_its_own():
    assert set(VARIANTS) <= set(figures.VARIANT_COLORS) <= {*VARIANTS, *PRIVATE_VARIANTS}
    assert figures.VARIANT_COLORS["SM+LN+G"] == "#000000"
    rgb = {name: [int(color[i : i + 2], 16) for i in (1, 3, 5)] for name, color in figures.VARIANT_COLORS.items()}
    assert min(math.dist(rgb[a], rgb[b]) for a, b in itertools.combinations(rgb, 2)) > 40


def test_few_lines_are_labelled_and_many_get_a_legend():
    few = figures.loss_curves({name: history(3) for name in list(VARIANTS)[:4]}, reference={"unigram": 6.1})
    assert not few.layout.showlegend
    assert {"unigram", *list(VARIANTS)[:4]} <= set(texts(few))
    many = figures.loss_curves({name: history(3) for name in VARIANTS})
    assert many.layout.showlegend
    assert [trace.line.color for trace in many.data] == [figures.VARIANT_COLORS[name] for name in VARIANTS]


def test_labels_of_equal_lines_do_not_overlap():
    figure = figures.loss_curves({str(n): history(3) for n in range(6)})
    heights = sorted(annotation.ay for annotation in figure.layout.annotations)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 16.9


def test_spread_moves_only_crowds():
    assert figures.moved_apart([0, 100], gap=10) == [0, 100]
    assert figures.moved_apart([50, 50, 0], gap=10) == [45, 55, 0]


def test_a_run_that_diverged_is_cut_at_its_last_finite_point():
    bad = history(3)
    bad["loss"][10:] = [1e6, float("inf")] + [float("nan")] * 8
    figure = figures.loss_curves({"SM": bad, "SM+LN": history(3)}, stopped={"SM"})
    assert "SM ✕" in texts(figure)
    assert len(figure.data[0].y) == 11
    assert figure.layout.yaxis.range[1] < 10
    with pytest.raises(ValueError, match="nothing finite"):
        figures.loss_curves({"SM": {"step": [0], "loss": [float("nan")]}})


def test_heatmap_is_cividis_from_zero_to_log_t_with_layer_0_on_top():
    entropy = torch.rand(3, 5)
    figure = figures.entropy_heatmap(entropy, 128)
    heat, scale = figure.data[0], figure.layout.coloraxis
    assert (heat.xgap, heat.ygap, scale.cmin, scale.cmax) == (2, 2, 0, math.log(128))
    assert scale.colorscale[0][1] == "#00224e"
    torch.testing.assert_close(torch.tensor(heat.z), entropy)
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    several = figures.entropy_heatmaps({name: entropy for name in VARIANTS}, 128)
    assert {trace.coloraxis for trace in several.data} == {"coloraxis"}
    with pytest.raises(ValueError, match="dimension"):
        figures.entropy_heatmap(torch.rand(3), 128)


def test_bands_stack_to_one_hundred_per_cent():
    figure = figures.entropy_band_bars({"a": entropy_bands(torch.rand(4, 4)), "b": [0, 0, 0, 1.0]})
    assert [sum(trace.x[bar] for trace in figure.data) for bar in (0, 1)] == pytest.approx([100, 100])
    with pytest.raises(ValueError, match="four fractions"):
        figures.entropy_band_bars({"a": [0.5, 0.5]})


def test_layer_curves_average_the_heads_and_mark_uniform_attention():
    entropy = torch.rand(7, 3, 4)
    figure = figures.layer_entropy_curves(range(7), entropy, 128)
    torch.testing.assert_close(torch.tensor(figure.data[2].y), entropy[:, 2].mean(-1), atol=1e-5, rtol=1e-5)
    dashed = next(shape for shape in figure.layout.shapes if shape.line.dash == "dash")
    assert dashed.y0 == pytest.approx(max_entropy(128, causal=True).mean().item(), abs=1e-5)


def test_the_figures_of_the_mathematics():
    row = torch.full((8,), 1 / 8)
    assert len(figures.attention_rows({"a": row, "b": row}, "rows", {"a": "x", "b": "y"}).data) == 2
    sweep = figures.temperature_curves(torch.logspace(-2, 2, 9), torch.rand(9, 3), 4.85, "sweep")
    assert len(sweep.data) == 3
    assert "t = 1" in texts(sweep)
    grid = torch.linspace(0, 4, 9)
    penalty = figures.penalty_curve(grid, grid, grid, threshold=0.5, margin=0.2, ceiling=4.0, title="penalty")
    assert [round(shape.x1, 6) for shape in penalty.layout.shapes[:3]] == [1.2, 4.0, 2.0]
    reach = max_entropy(128, causal=True)
    rows = figures.ceilings_by_row(reach, lower=0.7 * 4.852, upper=5.3, context_ceiling=4.852, title="rows")
    assert "<b>29 rows cannot reach it</b>" in texts(rows)


def test_json_is_plain_and_small():
    figure = figures.lines({"x": (torch.arange(500), torch.rand(500))}, title="t", x_title="x", y_title="y")
    text = json.dumps(figure.to_plotly_json())  # fails on arrays
    assert "bdata" not in text
    assert len(text) < 15_000


def test_long_titles_wrap():
    figure = figures.lines({"x": ([0, 1], [0, 1])}, title="word " * 30, x_title="x", y_title="y")
    assert figure.layout.title.text.count("<br>") == 1


def test_show_displays_the_figure_alone_and_names_what_is_saved(monkeypatch):
    renderers = pytest.importorskip("plotly.io._renderers")
    shown = []
    monkeypatch.setattr(renderers.ipython_display, "display", lambda bundle, **options: shown.append(bundle))
    figures.show(figures.entropy_heatmap(torch.rand(2, 2), 128, "A finding"), "00_maps")
    (bundle,) = shown
    (figure,) = bundle.values()
    assert list(bundle) == ["application/vnd.plotly.v1+json"]
    assert figure["layout"]["title"]["text"] == "<b>A finding</b>"
    assert figure["config"]["toImageButtonOptions"] == {"filename": "00_maps"}


def test_missing_plotly_names_the_extra(monkeypatch):
    real = builtins.__import__

    def no_plotly(name, *args, **kwargs):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "entropy_lib.explore.figures")
    monkeypatch.setattr(builtins, "__import__", no_plotly)
    with pytest.raises(ImportError, match=r"entropy_lib\[notebooks\]"):
        importlib.import_module("entropy_lib.explore.figures")


@pytest.mark.parametrize("color", [figures.COLLAPSE, figures.OVERLOAD, *figures.VARIANT_COLORS.values()])
def test_a_color_shows_on_a_dark_page(color):
    """At 3 to 1 against JupyterLab's #111111, by the luminance of WCAG 2; black is the page's own ink."""

    def luminance(color):
        shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    seen = figures.page_color(color)
    assert seen == ("currentColor" if color == "#000000" else color)
    assert seen == "currentColor" or luminance(color) + 0.05 > 3 * (luminance("#111111") + 0.05)
