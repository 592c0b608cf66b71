"""The penalty explorer shows the library's own penalty, gradient and counts, whatever its controls say."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

from entropy_lib import EntropyRegularization, max_entropy

pytest.importorskip("ipywidgets")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore.recorded_runs import RUNS, recorded  # noqa: E402
from entropy_lib.training.records import RunRecord, load_runs  # noqa: E402

PENALTY, GRADIENT = 3, 7  # traces: curves, each followed by its heads below, inside and above


def dots(explorer, curve):
    """x and y of all heads in a panel, and their state's symbol, in the order of layers and heads."""
    found = []
    for trace in explorer.figure.data[curve + 1 : curve + 4]:
        if trace.x is not None:  # plotly drops empty lists
            places = zip(trace.customdata, trace.x, trace.y, strict=True)
            found += [(*place, x, y, trace.marker.symbol) for place, x, y in places]
    return [list(column) for column in zip(*sorted(found), strict=True)][2:]


def record(entropy, context_length=128, **changes):
    """A run record with these head entropies, everything else from a recorded run."""
    summary = load_runs(RUNS)[0].summary()
    summary |= {"entropy": entropy, "context_length": context_length, **changes}
    return RunRecord(**summary, history=None)


def head_by_head(entropy, regularization, theta, context_length=128):
    """Penalty and gradient of every head on its own, [n] and [n], one call of the library for each."""
    reach = max_entropy(context_length, causal=True, dtype=torch.float64)
    penalties, gradients = [], []
    for mean in torch.tensor(np.ravel(entropy).tolist(), dtype=torch.float64).flatten():
        mean = mean.clone().requires_grad_()
        loss = regularization([(mean * reach / reach.mean())[None, None]], torch.tensor([theta], dtype=torch.float64))
        (gradient,) = torch.autograd.grad(loss, mean)
        penalties.append(loss.item())
        gradients.append(gradient.item())
    return np.array(penalties), np.array(gradients)


@pytest.fixture(scope="module")
def explorer():
    torch.manual_seed(0)
    return explore.penalty_explorer(record((3.8 * torch.rand(3, 4)).tolist()))


@pytest.mark.parametrize(
    ("gamma", "per", "reduction", "ceiling", "context"),
    [
        (0.2, "head", "mean", "context", 128),
        (0.1, "query", "sum", "context", 128),
        (0.0, "query", "mean", "causal", 128),
        (0.3, "head", "sum", "causal", 128),
        (0.15, "query", "mean", "context", 1024),
    ],
)
def test_dots_are_the_library_s_penalty_and_gradient(explorer, gamma, per, reduction, ceiling, context):
    changes = {"gamma": gamma, "per": per, "reduction": reduction, "ceiling": ceiling, "T": context}
    changes |= {"theta": 0.4, "lambda": 0.01}
    for name, value in changes.items():
        explorer.controls[name].value = value
    regularization = EntropyRegularization(0.01, gamma, context, reduction, per, ceiling)
    penalty, gradient = head_by_head(explorer.entropy, regularization, 0.4)
    data = explorer.figure.data
    for curve, expected in ((PENALTY, penalty), (GRADIENT, gradient / 12)):
        x, y, _ = dots(explorer, curve)
        np.testing.assert_allclose(x, explorer.entropy.flatten(), rtol=1e-6)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-12)
    assert penalty.max() > 0
    assert explorer.loss(explorer.entropy).item() == pytest.approx(penalty.mean())
    assert f"{penalty.mean():.3g}" in explorer.status.value
    some = slice(0, None, 20)
    curve, _ = head_by_head(data[PENALTY].x[some], regularization, 0.4)
    np.testing.assert_allclose(data[PENALTY].y[some], curve, rtol=1e-6, atol=1e-12)


def test_bands_and_counts_agree_with_where_the_penalty_is_not_zero():
    ceiling = math.log(128)
    explorer = explore.penalty_explorer(record([[0.1 * ceiling, 0.3 * ceiling, 0.5 * ceiling, 0.78 * ceiling]]))
    for name, value in {"theta": 0.5, "gamma": 0.25, "per": "head"}.items():
        explorer.controls[name].value = value
    (_, penalty, symbols), shapes = dots(explorer, PENALTY), explorer.figure.layout.shapes
    assert [y > 0 for y in penalty] == [True, False, False, True]
    assert symbols == ["triangle-down", "circle", "circle", "triangle-up"]
    assert all(words in explorer.status.value for words in ("1 below", "2 inside", "1 above"))
    assert (shapes[0].x0, shapes[0].x1) == pytest.approx((0, 0.25 * ceiling))
    assert shapes[1].x0 == pytest.approx(0.75 * ceiling)
    assert shapes[2].x0 == shapes[2].x1 == pytest.approx(0.5 * ceiling)
    below, above = explorer.figure.data[1:3]
    assert (list(below.x), list(below.y), list(above.x), list(above.y)) == ([0], [0], [3], [0])
    explorer.controls["gamma"].value = 0.5
    assert all(words in explorer.status.value for words in ("0 below", "4 inside", "0 above"))
    assert len(explorer.figure.data[1].x) == len(explorer.figure.data[2].x) == 0
    explorer.controls["gamma"].value = 0.0
    assert "4 inside" not in explorer.status.value


@pytest.mark.parametrize("entropy", [[[0.0]], [[0.0, 3.87], [3.87, 0.0]]])
@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_edge_values_draw_finite_numbers(entropy, theta):
    explorer = explore.penalty_explorer(record(entropy, eval_loss=None, status="collapsed"))
    for name, value in {"theta": theta, "gamma": 0.0, "per": "query", "ceiling": "causal", "lambda": 1.0}.items():
        explorer.controls[name].value = value
    for curve in (PENALTY, GRADIENT):
        assert np.isfinite(explorer.figure.data[curve].y).all()
        assert np.isfinite(dots(explorer, curve)[1]).all()
    assert "loss of" not in explorer.status.value


def test_static_heads_have_no_share_in_the_penalty():
    some, own = [[0.5, None, None], [3.5, 2.0, None], [None] * 3], [[0.5], [3.5, 2.0]]
    explorer = explore.penalty_explorer(record(some))
    regularization, theta = explorer.regularization(), torch.tensor([0.5], dtype=torch.float64)
    penalties = [head_by_head(layer, regularization, theta.item())[0] for layer in own]
    total = np.mean([layer.mean() for layer in penalties])  # over the layers that have heads
    assert explorer.loss(explorer.entropy).item() == pytest.approx(total)
    assert dots(explorer, PENALTY)[0] == pytest.approx([0.5, 3.5, 2.0])
    np.testing.assert_allclose(dots(explorer, PENALTY)[1], np.concatenate(penalties))
    assert list(explorer.figure.data[1].x) == [0]  # the head below the band, at its place on the map
    assert list(explorer.figure.data[1].y) == [0]
    assert "1 below · 1 inside · 1 above" in re.sub("<[^>]*>", "", explorer.status.value)
    with pytest.raises(ValueError, match="no head of these records has a softmax"):
        explore.penalty_explorer(record([[None, None]]))


def test_every_committed_record_can_be_chosen():
    records = recorded(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a mean of nothing, say
        for variant in {found.variant: found for found in records}.values():
            explore.run_explorer([records[0], variant])
            if any(entropy is not None for layer in variant.entropy for entropy in layer):
                explore.penalty_explorer([records[0], variant]).controls["run"].value = 1


def test_a_control_that_does_nothing_is_off():
    explorer = explore.penalty_explorer(record([[1.0, 2.0]]))
    assert explorer.controls["reduction"].disabled
    explorer.controls["per"].value = "query"
    explorer.controls["ceiling"].value = "causal"
    assert not explorer.controls["reduction"].disabled
    assert explorer.controls["T"].disabled


def test_recorded_runs_are_there_by_default_and_can_be_changed():
    explorer = explore.penalty_explorer()
    records = [r for r in recorded(None) if any(E is not None for layer in r.entropy for E in layer)]
    assert len(explorer.controls["run"].options) == len(records)
    explorer.controls["run"].value = 1
    np.testing.assert_allclose(explorer.figure.data[0].z, records[1].entropy)
    np.testing.assert_allclose(dots(explorer, PENALTY)[0], np.ravel(records[1].entropy))
    with pytest.raises(ValueError, match="no run records"):
        explore.penalty_explorer([])
