"""The penalty explorer shows the library's own penalty, gradient and counts, whatever its controls say."""

import math
import warnings

import numpy as np
import pytest
import torch
from traitlets import TraitError

from entropy_lib import EntropyRegularization, attention_entropy, max_entropy

pytest.importorskip("anywidget")
explore = pytest.importorskip("entropy_lib.explore")
from entropy_lib.explore import penalty  # noqa: E402
from entropy_lib.explore.attention_logits import AttentionLogits, read_logits  # noqa: E402
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


def causal_logits(layers=2, heads=3, size=9):
    """Random ones, the last head with all of its weight on one key."""
    logits = 3 * torch.randn(layers, heads, size, size, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = 1e6 * torch.eye(size)
    logits = logits.masked_fill(~torch.ones(size, size).tril().bool(), -math.inf)
    return AttentionLogits(logits, tuple("abcdefghi"[:size]), "made up")


@pytest.mark.parametrize(
    ("per", "gamma", "ceiling"), [("query", 0.0, "context"), ("query", 0.2, "causal"), ("head", 0.1, "context")]
)
def test_logits_have_their_real_rows(per, gamma, ceiling):
    logits = causal_logits()
    rows = attention_entropy(torch.softmax(logits.logits.double(), -1))
    explorer = explore.penalty_explorer(logits)
    assert (explorer.context, explorer.length) == (9, 9)
    explorer.theta, explorer.gamma, explorer.weight, explorer.per, explorer.ceiling = 0.3, gamma, 1.0, per, ceiling
    torch.testing.assert_close(explorer.rows, rows, rtol=1e-6, atol=1e-7)
    regularization = EntropyRegularization(1.0, gamma, 9, "mean", per, ceiling)
    assert explorer.loss() == pytest.approx(regularization(list(rows[:, None]), torch.full((2, 3), 0.3)).item())
    heads = explorer.heads()
    reach = max_entropy(9, causal=True, dtype=torch.float64)
    for own, entropy, penalty_, gradient in zip(
        rows.flatten(0, 1), heads["entropy"], heads["penalty"], heads["gradient"], strict=True
    ):
        assert entropy == pytest.approx(own.mean().item(), abs=1e-6)
        direction = own / own.mean() if own.mean() else reach / reach.mean()  # of rows, by their head's mean
        nats = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = regularization([(own + nats * direction)[None, None]], torch.tensor([0.3], dtype=torch.float64))
        (slope,) = torch.autograd.grad(loss, nats)
        assert penalty_ == pytest.approx(loss.item(), rel=1e-5, abs=1e-9)
        assert gradient == pytest.approx(slope.item() / 6, rel=1e-5, abs=1e-9)
    assert heads["penalty"].max() > 0
    before = explorer.words()
    explorer.own = True  # none was learned
    assert explorer.words() == before
    assert "loss of" not in before
    assert len(explorer.still().data[0].x) == (1 if per == "query" else penalty.POINTS)  # a curve of all heads, or none


def test_logits_that_are_not_causal_are_refused():
    full = AttentionLogits(torch.zeros(1, 1, 4, 4), tuple("abcd"), "full")
    wide = AttentionLogits(torch.zeros(1, 1, 1, 4), tuple("abcd"), "one query")
    alone = AttentionLogits(torch.zeros(1, 1, 1, 1), ("a",), "one token")
    for logits in (full, wide, alone):
        with pytest.raises(ValueError, match="causal attention to two tokens or more"):
            explore.penalty_explorer(logits)


def test_a_head_is_selected_and_told_of():
    explorer = explore.penalty_explorer([record([[0.5, 3.5], [2.0, None]]), record([[1.0]])])
    before = explorer.words()
    explorer.selected = [1, 0]
    assert explorer.words() == f"{before}\nlayer 1, head 0: 2 nats, penalty 0 nats, slope 0 nats per nat"
    explorer.weight, explorer.selected = 1.0, [0, 0]
    deviation = 0.5 - 0.5 * math.log(128)
    told = f"penalty {deviation**2:.3g} nats, slope {2 * deviation / 3:.3g} nats per nat"
    assert explorer.words().endswith(f"\nlayer 0, head 0: 0.5 nats, {told}")
    for wrong in ([1, 1], [2, 0], [0], [0, -1]):  # a static head, and what is no head
        with pytest.raises(TraitError, match="head with a softmax"):
            explorer.selected = wrong
    explorer.run = 1
    assert explorer.selected == [0, 0]
    explorer.run, explorer.selected = 0, [0, 1]
    explorer.run = 1  # which has no such head
    assert explorer.selected == []


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
    assert len(explorer.runs) == len(records) + 1
    assert [run["name"] for run in explorer.runs if run["group"] == "real rows"] == [explorer.runs[-1]["name"]]
    assert torch.equal(explorer.records[-1].logits, read_logits().logits)
    explorer.run = 1
    np.testing.assert_allclose(explorer.entropy, records[1].entropy)
    with pytest.raises(ValueError, match="no run records"):
        explore.penalty_explorer([])
    with pytest.raises(TraitError, match="index of"):
        explorer.run = len(records) + 1


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
    assert explorer.runs[-1] == kept["runs"][-1]  # real rows
    pairs = [*zip(explorer.runs, explorer.records, strict=True)][:-1]
    firsts = {(run["group"], record.variant) for run, record in pairs}
    assert firsts <= {(run["group"], run["name"].split(", seed")[0]) for run in kept["runs"]}
    assert len(firsts) + 1 < len(kept["runs"]) < len(explorer.runs)
    assert len(explorer.html()) < 225_000
    monkeypatch.setattr(penalty, "ROOM", 10)
    kept = explorer.state()
    assert (kept["runs"], kept["run"]) == ([explorer.runs[explorer.run]], 0)
