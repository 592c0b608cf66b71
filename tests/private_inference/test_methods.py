"""Every way to compute an operation against double precision, at the inputs that are hardest for it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from running import private_environment, started_processes  # noqa: F401
from test_parties import plan_of
from test_two_party import IDS, MEANING, causal_softmax, evaluate, forward, gelu, layernorm, merged

from entropy_lib import VARIANTS
from entropy_lib.private_inference import two_party
from entropy_lib.private_inference.blocks import block_architectures, private_architectures
from entropy_lib.private_inference.costs import inference_cost, unit_prices
from entropy_lib.private_inference.methods import METHODS, apply_method, own_operations, prices_name
from entropy_lib.private_inference.parties import run_plan
from entropy_lib.private_inference.two_party import run_two_party
from make import measure
from make.prices import DATA, fit_methods, fit_quartic

# In one worker of pytest-xdist, one after the other: these start processes of their own and mind how long they take.
pytestmark = pytest.mark.xdist_group("parties")


def silu(x):
    return x / (1 + np.exp(-x))


def scale(x):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)


def centre_and_scale(x):
    return layernorm(x, 1.0, 0.0)


def over_visible(weights):
    return np.tril(weights) / np.arange(1, weights.shape[-1] + 1)[:, None]


def rows(length, seed=0, spread=1.0):
    return spread * np.random.default_rng(seed).standard_normal((2, length, length))


def hard_scores(length):
    """Any scores: uniform rows, one far above, all far below zero, one far below, many at the polynomial's floor."""
    z = rows(length, spread=3.0)
    z[:, length // 2] = 0.0
    z[0, -1] = -300.0
    z[0, -1, length // 3] = 90.0
    z[1, -1] = -10.0
    z[1, -1, 0] = 0.0
    z[1, length - 2] = -2000.0
    return z


def bounded_scores(length):
    """As far from the mean of their row as they may be: half above and half below, one above, one below."""
    z, limit = rows(length, spread=2.0), METHODS["bounded logits"].spread
    z[0, 1, :2] = limit, -limit
    z[0, 3, :4] = limit, limit - 1, -limit + 1, -limit
    for row, sign in ((-1, 1), (-2, -1)):
        visible = range(length)[row] + 1
        z[0, row, :visible] = -sign * limit / max(visible - 1, 1)
        z[0, row, visible // 2] = sign * limit
    return z - np.where(np.arange(length) == 0, 5.0, 0.0)[:, None]  # the mean itself is anything


WIDE = np.linspace(-10, 10, 128 * 160).reshape(128, 160)  # more than a pair of ciphertexts, and a rest
FLAT = np.repeat(np.array([[0.0], [7.0], [-30.0]]), 48, axis=1)  # rows without variance
MANY = np.random.default_rng(1).standard_normal((256, 12))  # of which 128 at a time
NORMAL = 3 * np.random.default_rng(0).standard_normal((5, 48)) + np.arange(5)[:, None]

# method, operation, inputs, what it should be, largest error
CASES = [
    *(("optimized", "softmax", [hard_scores(t)], causal_softmax, 1e-2) for t in (128, 7, 6, 2)),
    *(("optimized", "softmax", [z], causal_softmax, 1e-3) for z in (np.full((2, 1, 1), -30.0), np.zeros((1, 9, 9)))),
    *(("bounded logits", "softmax", [bounded_scores(t)], causal_softmax, 6e-3) for t in (128, 7, 6)),
    *(("bounded logits", "softmax", [z], causal_softmax, 1e-3) for z in (np.full((2, 1, 1), 9.0), np.zeros((1, 9, 9)))),
    ("optimized", "gelu", [WIDE], gelu, 1.8e-3),
    ("optimized", "silu", [WIDE], silu, 7.6e-3),
    ("optimized", "relu2", [WIDE], lambda x: np.maximum(x, 0) ** 2, 1e-3),
    ("optimized", "square", [WIDE], np.square, 1e-3),
    ("optimized", "relu_attention", [rows(7)], lambda z: over_visible(np.maximum(z, 0)), 1e-4),
    ("optimized", "square_attention", [rows(7)], lambda z: over_visible(z**2), 1e-4),
    ("optimized", "multiply", [rows(7), rows(7)[..., :1]], np.multiply, 1e-3),
    *(("optimized", "layernorm", [x], centre_and_scale, 2e-3) for x in (NORMAL, MANY)),
    *(("optimized", "rmsnorm", [x], scale, 2e-3) for x in (NORMAL, MANY)),
    # Nearly as far as the engine can: a unit of 1/std, 2^-18 of 1/300, is 1.5e-3 of what comes out, and up to three
    # are off, at random.
    ("optimized", "layernorm", [100 * NORMAL], centre_and_scale, 6e-3),
    ("optimized", "rmsnorm", [70 * NORMAL], scale, 6e-3),
    ("optimized", "layernorm", [FLAT], centre_and_scale, 2e-2),
]


def test_functions_against_double_precision(private, started):
    """The engine computes all of them, with its fixed point, in its simulator."""
    plans, values = [], {}
    for index, (method, operation, inputs, _, _) in enumerate(CASES):
        function, constants = METHODS[method].functions[operation]
        plans.append(plan_of(operation, *(x.shape for x in inputs), **constants))
        plans[-1]["steps"][0]["function"] = function
        values |= {f"{index}:{name}": x.astype("float32") for name, x in zip("ab", inputs, strict=False)}
    outputs, _ = run_plan({**merged(plans), "engine": METHODS["optimized"].engine}, values, "SEMI2K")
    for index, (method, operation, inputs, exact, tolerance) in enumerate(CASES):
        error = np.abs(outputs[f"{index}:out"] - exact(*inputs)).max()
        assert error < tolerance, (method, operation, inputs[0].shape)


def test_a_private_pass_gives_the_model_s_logits(private, started):
    model = tiny_model("SM+LN+G", dtype=torch.float32, initializer_range=0.1, n_layer=1)
    result = run_two_party(model, IDS[:7], "CHEETAH", method="optimized")
    assert result.max_error < 2e-2
    assert {step["operation"] for step in result.steps} >= {"softmax", "gelu", "layernorm"}


def test_without_norms_and_with_a_temperature(private, started):
    model = tiny_model("EReg(SM(t)+ScFuFFN)", dtype=torch.float32, initializer_range=0.1)
    result = run_two_party(model, IDS, method="bounded logits")
    assert result.max_error < 0.01 * model(IDS[None]).logits.abs().max()


# ---- without the engine


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_s_plan_is_the_same_function(variant, method, monkeypatch):
    """Exactly: only how an operation is computed may change, and where the gains of LayerNorm are."""
    model = tiny_model(variant)
    plan, values = apply_method(*forward(model, IDS), method)
    assert set(values) == set(plan["inputs"])
    assert all(list(values[name].shape) == spec["shape"] for name, spec in plan["inputs"].items())
    functions = {step["operation"]: step["function"] for step in plan["steps"] if "function" in step}
    changed = METHODS[method].functions
    assert functions == {step["operation"]: changed[step["operation"]][0] for step in plan["steps"]
                         if step["operation"] in changed}  # fmt: skip
    monkeypatch.setitem(MEANING, "layernorm", lambda x, gain=1.0, bias=0.0: layernorm(x, gain, bias))
    kept = [{k: v for k, v in step.items() if k != "constants" or "function" not in step} for step in plan["steps"]]
    (ours,) = evaluate({**plan, "steps": kept}, values)
    plain = model(IDS[None]).logits[0].detach().numpy()
    assert np.abs(ours - plain).max() < 1e-4 * np.abs(plain).max()


def test_a_norm_that_something_else_reads_is_refused():
    plan, values = forward(tiny_model("SM+LN+G"), IDS)
    plan["steps"].insert(2, {"part": "FFN linear", "operation": "add", "inputs": ["h", "x"], "outputs": ["x"]})
    with pytest.raises(ValueError, match="add reads a LayerNorm, whose gain only a matrix can take in"):
        apply_method(plan, values, "optimized")


def quartic(x, quartic, power=1, **_):
    q, h, k, m, c = quartic
    return (q * ((x + h) ** 2 + k) ** 2 + m * x + c) ** power


def test_polynomials_have_the_stated_error_and_none_has_less():
    """GELU and SiLU beside the ramp max(x, 0); the exponential from the floor to 0, and to both sides of the mean."""
    t = np.linspace(0, 12, 1500)
    for name, exact, stated in (("gelu", gelu, 1.7e-3), ("silu", silu, 7.5e-3)):
        constants = METHODS["optimized"].functions[name][1]
        clipped, wanted = np.minimum(t, constants["bound"]), t - exact(t)
        error = np.abs(quartic(clipped, **constants) - wanted).max()
        assert error < stated
        assert error < 1.05 * fit_quartic(clipped, wanted)[1]
    limit = METHODS["bounded logits"].spread
    for method, span, stated in (("optimized", (-10, 0), 8.1e-5), ("bounded logits", (-limit, limit), 4.3e-3)):
        constants = METHODS[method].functions["softmax"][1]
        z, halved = np.linspace(*span, 1500), 2 ** constants["squarings"]
        scale = np.exp(-np.maximum(z, 0))
        values = quartic(z / halved, constants["quartic"], halved) * (64 if method == "bounded logits" else 1)
        error = np.abs((values - np.exp(z)) * scale).max()
        assert error < stated
        assert error < 1.05 * fit_quartic(z / halved, np.exp(z), halved, scale)[1]


def test_logits_that_reach_too_far_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(two_party, "run_plan", lambda *_, **__: pytest.fail("started"))
    model = tiny_model("SM(t)+ScFuFFN", temperature_init=1e-3)
    for spread in (None, 12.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"bears logits up to 12 from the mean.*use method 'optimized'"):
            run_two_party(model, IDS, method="bounded logits", spread=spread)
    assert not model.training
    assert model.config._attn_implementation == tiny_model("SM(t)+ScFuFFN").config._attn_implementation
    with pytest.raises(ValueError, match="unknown method 'fast'; choose from as given, optimized, bounded logits"):
        run_two_party(model, IDS, method="fast")


# ---- what they cost


@pytest.fixture(scope="module", name="records")
def measured_records():
    folder = DATA / "private_inference"
    return {name: json.loads((folder / f"measured-{prices_name(name)}.json").read_text()) for name in METHODS}


def test_committed_books_are_what_the_fit_gives(records):
    for method, fitted in fit_methods(records).items():
        priced = unit_prices(prices_name(method))
        assert priced.method == method
        assert (priced.bytes, priced.seconds, priced.rounds) == (fitted["bytes"], fitted["seconds"], fitted["rounds"])
    assert unit_prices("optimized").method == "optimized"
    assert unit_prices("paper").method == "as given"


def test_every_operation_that_a_method_changes_was_measured_and_costs_less(records):
    for method in ("optimized", "bounded logits"):
        found = {entry["operation"] for entry in records[method]["operations"].values()}
        assert found == set(own_operations(method))
        for name, entry in records[method]["operations"].items():
            if given := records["as given"]["operations"].get(name):
                assert entry["bytes"] < given["bytes"], (method, name)
    ours, before = (records[m]["operations"]["softmax 12×128×128"] for m in ("bounded logits", "optimized"))
    assert ours["bytes"] < before["bytes"]


def test_prices_reproduce_the_measured_blocks(records):
    blocks = block_architectures() | private_architectures()
    for method, record in records.items():
        assert record["blocks"]
        for name, measured in record["blocks"].items():
            variant, _, length = name.rpartition(", T=")
            cost = inference_cost(blocks[variant], int(length), prices_name(method))
            assert cost.communication_gb * 1e9 == pytest.approx(measured["bytes"], rel=0.03), (method, name)


def test_own_operations_are_measured_under_a_method_only():
    for method in ("optimized", "bounded logits"):
        todo = list(measure.tasks(128, method))
        kinds = {plan["steps"][0]["operation"] for section, _, plan, _ in todo if section == "operations"}
        rounds = {step["operation"] for section, _, plan, _ in todo if section == "rounds" for step in plan["steps"]}
        assert kinds == rounds == set(own_operations(method))
