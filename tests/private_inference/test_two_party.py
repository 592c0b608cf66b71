"""The forward pass on shares against the model itself, and what each party gets to see of it."""

import copy
import itertools
import json
import math
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CASES, tiny_model
from running import private_environment, started_processes  # noqa: F401
from test_parties import plan_of, values_of
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_lib import PRIVATE_VARIANTS, VARIANTS, build_model, fold_for_inference
from entropy_lib.clone import CLONE
from entropy_lib.modeling import EntropyGPT2Config, EntropyGPT2LMHeadModel
from entropy_lib.private_inference import two_party
from entropy_lib.private_inference.architecture import Architecture, operations
from entropy_lib.private_inference.blocks import block_architectures
from entropy_lib.private_inference.parties import run_plan
from entropy_lib.private_inference.two_party import forward_plan, generate_two_party, run_two_party, server_weights
from entropy_lib.variants import NORM_PLACEMENTS
from make.measure import operation_plan, weight_shapes

# In one worker of pytest-xdist, one after the other: these start processes of their own and mind how long they take.
pytestmark = pytest.mark.xdist_group("parties")

IDS = torch.tensor([3, 41, 5, 92, 65, 35, 8, 97 - 1])


def merged(plans):
    """Several plans as one, so that the engine starts once: every value's name gets its plan's number."""
    total = {"inputs": {}, "steps": [], "outputs": []}
    for index, plan in enumerate(plans):

        def rename(names, index=index):
            return [f"{index}:{name}" for name in names]

        total["inputs"] |= dict(zip(rename(plan["inputs"]), plan["inputs"].values(), strict=True))
        for step in plan["steps"]:
            total["steps"].append({**step, "inputs": rename(step["inputs"]), "outputs": rename(step["outputs"])})
        total["outputs"] += rename(plan["outputs"])
    return total


def simulate(plans, values):
    """The outputs of each plan, from one run of the simulator."""
    named = {f"{index}:{name}": array for index, own in enumerate(values) for name, array in own.items()}
    outputs, _ = run_plan(merged(plans), named, "SEMI2K")
    return [[outputs[f"{index}:{name}"] for name in plan["outputs"]] for index, plan in enumerate(plans)]


def forward(model, ids):
    architecture, weights, _ = server_weights(model, len(ids))
    plan = forward_plan(architecture, {name: list(array.shape) for name, array in weights.items()}, len(ids))
    return plan, {**weights, "one_hot": np.eye(architecture.vocabulary, dtype=np.float32)[ids]}


def test_every_variant_and_stock_gpt2_give_the_model_s_logits(private, started):
    models = [tiny_model(*case, dtype=torch.float32, initializer_range=0.1, temperature_init=0.02) for case in CASES]
    stock = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=97)).eval()
    models = [model for model, (name, place) in zip(models, CASES, strict=True) if place in (None, "FFN")]
    models += [tiny_model(name, dtype=torch.float32, initializer_range=0.1) for name in PRIVATE_VARIANTS]
    assert {model.config.variant for model in models} == {*VARIANTS, *PRIVATE_VARIANTS}
    models.append(stock)
    private_logits = simulate(*zip(*[forward(model, IDS) for model in models], strict=True))
    for model, (ours,) in zip(models, private_logits, strict=True):
        plain = model(IDS[None]).logits[0].detach().numpy()
        name = getattr(model.config, "variant", "stock")
        assert np.abs(ours - plain).max() < 0.01 * np.abs(plain).max(), name


def test_two_processes_under_cheetah(private, started, monkeypatch, tmp_path):
    """One run of the paper's protocol, looked at from all sides: logits, cost, sockets, files, and the wire."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model("EReg(SM(t)+ScFuFFN)", dtype=torch.float32, initializer_range=0.1, n_layer=1)
    listening, files, wire = set(), {}, []

    def look(done, total):
        if done == 2:
            ports = [
                int(a.split(":")[1])
                for a in json.loads(next(tmp_path.glob("*/0/job.json")).read_text())["addresses"][:1]
            ]
            listening.update(listeners(ports))
            files.update({path.relative_to(path.parents[1]): path.read_bytes() for path in tmp_path.glob("*/*/*")})

    result = run_two_party(model, IDS, "CHEETAH", record=wire, progress=look)
    assert result.logits.shape == (1, len(IDS), 97)
    plain = model(IDS[None]).logits
    assert result.max_error == pytest.approx((result.logits - plain).abs().max().item())
    assert result.max_error < 0.01 * plain.abs().max()
    assert result.bytes == sum(step["bytes"] for step in result.steps) > 1e6
    assert result.seconds > 0
    frame = result.to_frame()
    assert frame["bytes"].sum() == result.bytes
    assert frame["bytes"].idxmax() == "softmax"

    assert listening == {"127.0.0.1"}
    assert {path.parts[0] for path in files} == {"0", "1"}
    _, weights, _ = server_weights(model, len(IDS))
    one_hot = np.eye(97, dtype=np.float32)[IDS]
    given = dict(np.load(tempfile_copy(tmp_path, files[Path("1/inputs.npz")])))
    assert set(given) == set(weights)
    assert "one_hot" not in given
    assert set(np.load(tempfile_copy(tmp_path, files[Path("0/inputs.npz")]))) == {"one_hot"}
    server_files = [data for path, data in files.items() if path.parts[0] == "1"]
    assert not any(holds(data, array) for data in server_files for array in secret_ids(one_hot))

    to_client, to_server = wire
    assert min(len(to_client), len(to_server)) > 1e5
    assert len(to_client) + len(to_server) > result.bytes  # everything that was counted went by, and the set-up
    assert not any(holds(to_server, array) for array in secret_ids(one_hot))
    assert not [name for name, array in weights.items() if holds(to_client, array)]


def test_the_search_on_the_wire_finds_a_weight_that_is_sent(private, started):
    """The control: a plan that hands a weight to the client, and the same search."""
    plan = plan_of("relu", (4, 4))
    weight = np.random.default_rng(1).standard_normal((8, 8)).astype("float32")
    plan["inputs"]["weight"] = {"owner": "server", "shape": [8, 8], "dtype": "float32"}
    plan["outputs"], wire = ["weight"], []
    outputs, _ = run_plan(plan, {**values_of(plan), "weight": weight}, "CHEETAH", record=wire)
    assert np.abs(outputs["weight"] - weight).max() < 1e-5
    assert holds(wire[0], weight)
    assert not holds(wire[1], weight)


def secret_ids(one_hot):
    """The ids as numbers of any width, and as the rows that go into the engine."""
    ids = one_hot.argmax(1)
    rows = [row[max(0, index - 3) :][:6] for row, index in zip(one_hot, ids, strict=True)]
    return [*(ids.astype(kind) for kind in ("int16", "int32", "int64", "float32")), *rows]


def holds(data: bytes, array) -> bool:
    """Whether four neighbours, at eight places of the array, appear in the bytes, as they are or in fixed point."""
    flat = np.ascontiguousarray(array).reshape(-1)
    encodings = [flat]
    if flat.dtype == np.float32:
        scaled = flat.astype(np.float64) * 2**18
        encodings += [np.round(scaled).astype(np.int64), np.trunc(scaled).astype(np.int64)]
    for encoded in encodings:
        for start in range(0, len(encoded) - 3, max(1, len(encoded) // 8)):
            window = encoded[start : start + 4]
            if len(set(window.tolist())) > 1 and window.tobytes() in data:  # a run of zeros says nothing
                return True
    return False


def listeners(ports):
    """The local addresses on which something listens at these ports."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and int(address.split(":")[1], 16) in ports:
            found.add(".".join(str(byte) for byte in bytes.fromhex(address.split(":")[0])[::-1]))
    return found


def tempfile_copy(folder, data):
    path = folder / "copy.npz"
    path.write_bytes(data)
    return path


# ---- the functions of the parties


def test_functions_of_the_parties(private, started):
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.standard_normal(shape).astype("float32")

    visible = np.tril(np.ones((6, 6)))

    def softmax(z):
        z = np.where(visible, z, -np.inf)
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    scores, x = draw(2, 6, 6), 2 * draw(4, 8)
    extreme = scores.copy()
    extreme[0, 3] -= 300  # every visible score far below what a masked one would have
    extreme[1, 4] += 200
    extreme[1, 5, 2] = 90
    erf = np.vectorize(__import__("math").erf)
    cases = [
        ("softmax", [scores], softmax(scores), 0.02),  # (1 + z/64)^64 for exp(z)
        ("softmax", [extreme], softmax(extreme), 0.02),
        ("relu_attention", [scores], visible * np.maximum(scores, 0) / np.arange(1, 7)[:, None], 1e-4),
        ("square_attention", [scores], visible * scores**2 / np.arange(1, 7)[:, None], 1e-3),
        ("layernorm", [x, draw(8), draw(8)], None, 0.01),
        ("gelu", [x], 0.5 * x * (1 + erf(x / np.sqrt(2))), 0.01),
        ("relu", [x], np.maximum(x, 0), 1e-4),
        ("relu2", [x], np.maximum(x, 0) ** 2, 1e-3),
        ("square", [x], x**2, 1e-3),
        ("bilinear", [x], x[:, :4] * x[:, 4:], 1e-3),
        ("multiply", [x, x], x * x, 1e-3),
    ]
    plans = [plan_of(name, *(array.shape for array in inputs)) for name, inputs, _, _ in cases]
    values = [dict(zip(plan["inputs"], case[1], strict=True)) for plan, case in zip(plans, cases, strict=True)]
    for (name, inputs, expected, tolerance), (ours,) in zip(cases, simulate(plans, values), strict=True):
        if name == "layernorm":
            expected = torch.nn.functional.layer_norm(*map(torch.from_numpy, inputs[:1]), (8,),
                                                      *map(torch.from_numpy, inputs[1:])).numpy()  # fmt: skip
        assert np.abs(ours - expected).max() < tolerance, name


def test_generation_gives_the_plain_tokens(private, started):
    """A tiny model that has learned a cycle of tokens goes on with it, privately as in plain."""
    torch.manual_seed(0)
    model = build_model("SM+ScFuFFN", n_layer=1, n_head=2, n_embd=32, vocab_size=11, n_positions=16)
    cycle = torch.tensor([1, 7, 3, 9, 2]).repeat(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        batch = torch.stack([cycle[(step + row) % 5 :][:12] for row in range(5)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompt = cycle[None, :4]
    plain = model.eval().generate(prompt, max_new_tokens=3, do_sample=False)
    assert plain[0, 4:].tolist() == [2, 1, 7]
    assert torch.equal(generate_two_party(model, prompt, 3), plain)


# ---- without the engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_runs_what_is_priced(variant):
    model = tiny_model(variant)
    plan, values = forward(model, IDS)
    priced = [(o.part, o.name) for o in operations(Architecture.of(model.config), len(IDS))]
    assert [(s["part"], s["operation"]) for s in plan["steps"] if s["operation"] not in ("heads", "add")] == priced
    assert set(values) == set(plan["inputs"])
    assert {name for name, spec in plan["inputs"].items() if spec["owner"] == "client"} == {"one_hot"}
    assert plan["outputs"] == ["logits"]


@pytest.mark.parametrize("name", block_architectures())
def test_blocks_to_measure_have_all_their_values_and_the_operations_that_are_priced(name):
    architecture = block_architectures()[name]
    plan = forward_plan(architecture, weight_shapes(architecture, 16), 16)
    known = set(plan["inputs"])
    for step in plan["steps"]:
        assert set(step["inputs"]) <= known
        known |= set(step["outputs"])
    assert {source for step in plan["steps"] for source in step["inputs"]} >= set(plan["inputs"])
    for operation in operations(architecture, 16):
        assert operation_plan(operation)["steps"][0]["operation"] == operation.name


class Strange(torch.nn.Module):
    def __init__(self, **change):
        super().__init__()
        self.config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=97, **change)


@pytest.mark.parametrize(
    ("model", "ids", "words"),
    [
        (Strange(activation_function="tanh"), IDS, "activation 'tanh' is not supported"),
        (Strange(layer_norm_epsilon=1e-3), IDS, "layer_norm_epsilon must be 1e-5, got 0.001"),
        (Strange(scale_attn_by_inverse_layer_idx=True), IDS, "attention scaled by layer"),
        (Strange(), IDS.repeat(2, 1), r"one sequence of two or more token ids, got shape \[2, 8\]"),
        (Strange(), IDS[:1], r"got shape \[1\]"),
        (Strange(), IDS + 1, r"in \[0, 97\), got 4 to 97"),
        (Strange(), IDS.repeat(3), "24 tokens exceeds the model's 16 positions"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(monkeypatch, model, ids, words):
    monkeypatch.setattr(two_party, "run_plan", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match=words):
        run_two_party(model, ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.to(torch.float32).transformer.wte.weight.data.fill_(math.nan), "not finite.*tokens"),
        (lambda model: [block.beta.data.fill_(1e-30) for block in model.transformer.h], "not finite.*ffn_out"),
        (lambda model: setattr(model.config, "is_causal", False), "causal attention False"),
    ],
)
def test_weights_that_the_parties_cannot_hold_are_refused(change, words):
    model = tiny_model("SM+ScFFN")
    change(model)
    with pytest.raises(ValueError, match=words):
        server_weights(model, 4)


def test_parameters_that_a_gpt2_has_not_are_refused():
    model = GPT2LMHeadModel(Strange().config)
    model.transformer.h[0].mlp.c_fc.adapter = torch.nn.Linear(2, 2)
    ours = tiny_model("SM")
    ours.transformer.h[0].mlp.c_fc.adapter = torch.nn.Linear(2, 2)
    for adapted in (model, ours):
        with pytest.raises(ValueError, match=r"parameters other than[^\n]*(\n.*)*adapter"):
            server_weights(adapted, 4)
    with pytest.raises(ValueError, match="got GPT2Model"):
        server_weights(model.transformer, 4)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], r"got shape \[0\]"),
        (IDS.float(), "must be integers, got torch.float32"),
        (IDS > 5, "must be integers, got torch.bool"),
        ("abc", "expected token ids"),
        (None, "got NoneType"),
        (IDS - 4, r"in \[0, 97\), got -1"),
    ],
)
def test_odd_ids_are_refused(monkeypatch, ids, words):
    monkeypatch.setattr(two_party, "run_plan", lambda *_, **__: pytest.fail("started"))
    for call in (run_two_party, lambda model, ids: generate_two_party(model, ids, 1)):
        with pytest.raises(ValueError, match=words):
            call(Strange(), ids)


@pytest.mark.parametrize("count", [-1, 10, 2.0, True])
def test_a_continuation_beyond_the_positions_is_refused_before_its_first_pass(monkeypatch, count):
    monkeypatch.setattr(two_party, "run_two_party", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match="max_new_tokens must be"):
        generate_two_party(Strange(), IDS, count)


def test_a_model_in_training_stays_as_it_is(monkeypatch):
    """Each module in its own mode, and no random number drawn."""
    model = tiny_model("SM+SNorm").train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    plain = copy.deepcopy(model).eval()(IDS[None]).logits
    monkeypatch.setattr(
        two_party, "run_plan", lambda plan, values, *_, **__: ({"logits": evaluate(plan, values)[0]}, [])
    )
    monkeypatch.setattr(torch.nn.Module, "train", watched(model))
    result = run_two_party(model, IDS)
    assert result.max_error < 1e-4
    torch.testing.assert_close(result.logits, plain.float(), rtol=1e-4, atol=1e-4)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())


def watched(model, train=torch.nn.Module.train):
    """`Module.train` that fails on any module of `model`: another thread may be using it."""
    own = set(map(id, model.modules()))

    def switch(module, mode=True):
        assert id(module) not in own
        return train(module, mode)

    return switch


def test_beta_zero_cannot_be_moved():
    model = tiny_model("SM+ScFFN")
    with torch.no_grad():
        model.transformer.h[1].beta.zero_()
    with pytest.raises(ValueError, match="β of layer 1 is 0"):
        server_weights(model, 4)


# ---- every model that a configuration can describe, without the engine


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def causal_softmax(scores):
    z = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def relu2_attention(scores):
    rows = [[[max(z, 0) ** 2 / (i + 1) if j <= i else 0 for j, z in enumerate(row)] for i, row in enumerate(head)]
            for head in scores]  # fmt: skip
    return np.array(rows)


def split_heads(x, count, dynamic):
    """[T, 2·dynamic·size + count·size] -> queries and keys, if there are any, and values."""
    size = x.shape[1] // (2 * dynamic + count)
    heads = np.stack([x[:, start : start + size] for start in range(0, x.shape[1], size)])
    return [part for part in np.split(heads, [dynamic, 2 * dynamic]) if len(part)]


def layernorm(x, gain, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias


MEANING = {  # of a plan's operations, written down a second time
    "embed": lambda one_hot, tokens, positions: one_hot @ tokens + positions,
    "linear": lambda x, weight, bias=0: x @ weight + bias,
    "heads": split_heads,
    "multiply": np.multiply,
    "scores": lambda query, key: query @ key.swapaxes(1, 2),
    "softmax": causal_softmax,
    "relu2_attention": relu2_attention,
    "mix": lambda weights, value: np.concatenate([w @ value[i] for i, w in enumerate(weights)], axis=1),
    "static": lambda value, filters: np.concatenate(
        [f @ value[i - len(filters)] for i, f in enumerate(filters)], axis=1
    ),
    "join": lambda x, y: np.concatenate([x, y], axis=1),
    "last": lambda x, count: x[-count:],
    "add": np.add,
    "layernorm": layernorm,
    "gelu": gelu,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def evaluate(plan, values):
    """The outputs of a plan in double precision, in one place and without shares."""
    named = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    for step in plan["steps"]:
        inputs = [named[name] for name in step["inputs"]]
        result = MEANING[step["operation"]](*inputs, **step.get("constants", {}))
        named.update(zip(step["outputs"], result if isinstance(result, list) else [result], strict=True))
    return [named[name] for name in plan["outputs"]]


FIELDS = {  # of EntropyGPT2Config, those that change what is computed or stored; several values each
    "layer_norm": [True, False],
    "activation_function": ["gelu_new", "relu", "linear", "relu2", "gelu", "silu", "tanh", "gelu_pytorch_tanh"],
    "fused_ffn": [False, True],
    "ffn_scaling": [True, False],
    "learnable_temperature": [False, True],
    "entropy_regularization": [False, True],
    "weight_normalization": [None, None, "weight", "spectral"],
    "norm_placement": NORM_PLACEMENTS,
    "folded": [False, False, False, True],
    "tie_word_embeddings": [True, False],
    "n_inner": [None, None, None, 128, 48],
    "layer_norm_epsilon": [1e-5, 1e-5, 1e-5, 1e-3, 1e-12],
    "scale_attn_weights": [True, True, True, True, False],
    "scale_attn_by_inverse_layer_idx": [False, False, False, False, True],
    "reorder_and_upcast_attn": [False, True],
    "resid_pdrop": [0.0, 0.1],
    "embd_pdrop": [0.0, 0.1],
    "dynamic_heads": [None, None, [1], [0], [0, 1]],
    "attention": ["softmax", "softmax", "relu2"],
    "annealed_layer_norm": [False, True],
    "final_layer_norm": [True, True, False],
    "value_residual": [False, True],
}
BEYOND = ["dynamic_heads", "attention", "annealed_layer_norm", "value_residual", "n_inner", "final_layer_norm"]
MAIN = ["layer_norm", "activation_function", "fused_ffn", "ffn_scaling", "learnable_temperature"]


def combinations():
    """All of MAIN's values with the other fields at their first, then draws of all fields."""
    for values in itertools.product(*(FIELDS[name][:3] for name in MAIN)):
        yield dict(zip(MAIN, values, strict=True))
    for values in itertools.product(*(FIELDS[name][1:] for name in BEYOND)):
        yield {**dict(zip(BEYOND, values, strict=True)), "activation_function": "relu"}
    draw = random.Random(0)
    for _ in range(70):
        yield {name: draw.choice(values) for name, values in FIELDS.items()}


def strange_model(fields):
    """A model whose every parameter, gain, bias, α, β and t is far from where it starts; None if there is none."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 97, "initializer_range": 0.15}
    try:
        config = EntropyGPT2Config(**sizes, **fields, temperature_init=0.7, bos_token_id=None, eos_token_id=None)
    except ValueError:
        return None
    model = EntropyGPT2LMHeadModel(config)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if (value.dim() < 2 and not name.endswith(("left", "right"))) or "log_temperature" in name:
                value += 0.3 * torch.randn_like(value)
            if name.endswith("beta"):
                value.mul_(2 if "h.0" in name else -0.6)
            if name.endswith("query_scale"):
                value.mul_(torch.rand_like(value) + 0.5)
            if name.endswith(("blend", "seen")):  # as at the end of training
                value.fill_(1)
    return model.double().eval()


def test_every_combination_of_fields_is_right_or_refused(monkeypatch):
    right, refused = [], []
    for fields in combinations():
        if (model := strange_model(fields)) is None:
            continue
        expected = model(IDS[None]).logits
        folded = fold_for_inference(model)
        monkeypatch.setattr(two_party, "fold_for_inference", lambda _, folded=folded: folded)
        again = folded(IDS[None]).logits
        torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9, msg=lambda m, f=fields: f"{f}: {m}")
        try:
            plan, values = forward(model, IDS)
        except ValueError as error:
            refused.append(str(error))
            continue
        (ours,) = evaluate(plan, values)
        assert np.abs(ours - expected[0].detach().numpy()).max() < 1e-4 * expected.abs().max(), fields
        right.append(fields)
    for name in ("weight_normalization", "tie_word_embeddings", "folded", *MAIN, *BEYOND):
        seen = {str(fields[name]) for fields in right if name in fields}
        assert len(seen) > 1, f"nothing but {seen} of {name} was tried"
    assert any(fields["layer_norm"] and fields["ffn_scaling"] for fields in right)
    causes = ["activation", "layer_norm_epsilon", "attention scaled"]
    assert all(sum(cause in sentence for cause in causes) == 1 and "\n" not in sentence for sentence in refused)
    assert all(any(cause in sentence for sentence in refused) for cause in causes)


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"activation_function": "relu"}])
def test_stock_gpt2_is_the_same_function(change):
    model = GPT2LMHeadModel(Strange(initializer_range=0.2, **change).config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    (ours,) = evaluate(*forward(model, IDS))
    assert np.abs(ours - model(IDS[None]).logits[0].detach().numpy()).max() < 1e-4


def test_the_docstring_states_the_threat_model():
    assert re.search(r"semi-honest.*not protect real secrets", run_two_party.__doc__, re.DOTALL)


def test_other_protocols_send_what_the_readme_says():
    folder = CLONE / "data" / "private_inference"
    table = {}
    section = (folder / "README.md").read_text().partition("## Another protocol")[2].partition("\n## ")[0]
    for line in section.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|")) if line.startswith("| ") else [""]
        table[name] = dict(zip(("CHEETAH", "SEMI2K", "ABY3"), cells, strict=False))
    for path in folder.glob("protocols/*.json"):
        variant, protocol = path.stem.rsplit(" ", 1)
        steps = json.loads(path.read_text())["steps"]
        blocks = sum(s["bytes"] for s in steps if s["part"] not in ("embedding", "vocabulary projection"))
        assert table[variant][protocol].replace(",", "") == f"{blocks / 1e6:.0f}", path.name
