"""The penalty explorer shows the library's own penalty, gradient and counts, whatever its controls say."""

import math
import warnings

import numpy as np
import pytest
import torch
from traitlets import TraitError

from entropy_lib import EntropyRegularization, max_entropy

pytest.importorskip("anywidget")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore import penalty  # noqa: E402
from entropy_lib.explore.recorded_runs import RUNS, recorded  # noqa: E402
from entropy_lib.training.records import RunRecord, load_runs  # noqa: E402


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
def test_heads_have_the_library_s_penalty_and_gradient(explorer, gamma, per, reduction, ceiling, context):
    explorer.theta = 0.4
    explorer.gamma, explorer.weight, explorer.context = gamma, 0.01, context
    explorer.per, explorer.reduction, explorer.ceiling = per, reduction, ceiling
    regularization = EntropyRegularization(0.01, gamma, context, reduction, per, ceiling)
    penalty, gradient = head_by_head(explorer.entropy, regularization, 0.4)
    heads = explorer.heads()
    np.testing.assert_allclose(heads["entropy"], explorer.entropy.flatten())
    np.testing.assert_allclose(heads["penalty"], penalty, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(heads["gradient"], gradient / 12, rtol=1e-6, atol=1e-12)
    assert penalty.max() > 0
    assert explorer.loss() == pytest.approx(penalty.mean())
    assert f"{penalty.mean():.3g}" in explorer.words()


def test_counts_agree_with_where_the_penalty_is_not_zero():
    ceiling = math.log(128)
    explorer = explore.penalty_explorer(record([[0.1 * ceiling, 0.3 * ceiling, 0.5 * ceiling, 0.78 * ceiling]]))
    explorer.gamma = 0.25
    heads = explorer.heads()
    assert [penalty > 0 for penalty in heads["penalty"].tolist()] == [True, False, False, True]
    assert heads["state"].tolist() == [0, 1, 1, 2]
    assert explorer.words().startswith("1 below · 2 inside · 1 above")
    explorer.gamma = 0.5
    assert explorer.words().startswith("0 below · 4 inside · 0 above · penalty 0")
    explorer.gamma = 0.0
    assert "4 inside" not in explorer.words()


@pytest.mark.parametrize("entropy", [[[0.0]], [[0.0, 3.87], [3.87, 0.0]]])
@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_edge_values_give_finite_numbers(entropy, theta):
    explorer = explore.penalty_explorer(record(entropy, eval_loss=None, status="collapsed"))
    explorer.theta, explorer.gamma, explorer.per, explorer.ceiling, explorer.weight = theta, 0.0, "query", "causal", 1.0
    for values in explorer.heads().values():
        assert values.isfinite().all()
    assert "loss of" not in explorer.words()


def test_each_head_can_have_the_threshold_that_it_learned():
    found = next(r for r in recorded(None) if r.variant.startswith("EReg") and r.status == "finished")
    explorer = explore.penalty_explorer(found)
    theta = torch.tensor(np.stack(found.history["thresholds"].iloc[-1]), dtype=torch.float64)
    regularization = explorer.regularization()
    rows = explorer.entropy[:, None, :, None] * explorer._shares
    assert not torch.equal(explorer.thresholds(), theta)
    explorer.own = True
    assert torch.equal(explorer.thresholds(), theta)
    assert explorer.loss() == pytest.approx(regularization(list(rows), theta).item())
    inside = ((explorer.entropy - theta * math.log(128)).abs() <= explorer.gamma * math.log(128)).sum()
    assert f"{inside} inside" in explorer.words()
    plain = explore.penalty_explorer(next(r for r in recorded(None) if r.variant == "SM+ScFuFFN"))
    before = plain.words()
    plain.own = True  # it learned none
    assert plain.words() == before


def test_static_heads_have_no_share_in_the_penalty():
    some, own = [[0.5, None, None], [3.5, 2.0, None], [None] * 3], [[0.5], [3.5, 2.0]]
    explorer = explore.penalty_explorer(record(some))
    regularization = explorer.regularization()
    penalties = [head_by_head(layer, regularization, 0.5)[0] for layer in own]
    assert explorer.loss() == pytest.approx(np.mean([layer.mean() for layer in penalties]))  # over layers with heads
    assert explorer.heads()["entropy"].tolist() == [0.5, 3.5, 2.0]
    np.testing.assert_allclose(explorer.heads()["penalty"], np.concatenate(penalties))
    assert explorer.words().startswith("1 below · 1 inside · 1 above")
    with pytest.raises(ValueError, match="no head of these records has a softmax"):
        explore.penalty_explorer(record([[None, None]]))


def test_every_committed_record_can_be_chosen():
    records = recorded(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a mean of nothing, say
        for variant in {found.variant: found for found in records}.values():
            explore.run_explorer([records[0], variant])
            if any(entropy is not None for layer in variant.entropy for entropy in layer):
                explorer = explore.penalty_explorer([records[0], variant])
                explorer.run, explorer.own = 1, True
                assert "inside" in explorer.words()


def test_recorded_runs_are_there_by_default_and_can_be_changed():
    explorer = explore.penalty_explorer()
    records = [r for r in recorded(None) if any(E is not None for layer in r.entropy for E in layer)]
    assert len(explorer.runs) == len(records)
    explorer.run = 1
    np.testing.assert_allclose(explorer.entropy, records[1].entropy)
    with pytest.raises(ValueError, match="no run records"):
        explore.penalty_explorer([])
    with pytest.raises(TraitError, match="index of"):
        explorer.run = len(records)


def test_the_still_has_every_head_on_its_curve(explorer):
    figure, heads = explorer.still(), explorer.heads()
    for dots, name in zip(figure.data[2:], ("penalty", "gradient"), strict=True):
        np.testing.assert_allclose(dots.x, heads["entropy"])
        np.testing.assert_allclose(dots.y, heads[name])


def test_without_a_kernel_the_page_has_the_run_that_is_shown_first_seeds_and_others(monkeypatch):
    explorer = explore.penalty_explorer()
    explorer.run = next(n for n, run in enumerate(explorer.runs) if "seed 2" in run["name"])
    kept = explorer.state()
    assert kept["runs"][kept["run"]] == explorer.runs[explorer.run]
    firsts = {(run["group"], record.variant) for run, record in zip(explorer.runs, explorer.records, strict=True)}
    assert firsts <= {(run["group"], run["name"].split(", seed")[0]) for run in kept["runs"]}
    assert len(firsts) + 1 < len(kept["runs"]) < len(explorer.runs)
    assert len(explorer.html()) < 190_000
    monkeypatch.setattr(penalty, "ROOM", 10)
    kept = explorer.state()
    assert (kept["runs"], kept["run"]) == ([explorer.runs[explorer.run]], 0)
