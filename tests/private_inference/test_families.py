"""Stock decoders: what is priced against what their exported graph computes, and the private pass against the plain."""

import math
from collections import Counter

import pytest
import torch
from running import private_environment, started_processes  # noqa: F401
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from entropy_lib.private_inference.architecture import LLAMA_TYPES, Architecture, operations
from entropy_lib.private_inference.costs import inference_cost, savings, unit_prices
from entropy_lib.private_inference.two_party import run_two_party

T = 12
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 32,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32),
    "opt": OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=96),
    "llama": LlamaConfig(**GATED, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**GATED, sliding_window=T),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=32),
    "gemma": GemmaConfig(**{**GATED, "num_key_value_heads": 1}, head_dim=16),
}
ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "relu": "relu"}  # aten's name: ours


def tiny(name):
    """A random model whose activations are about as large as a trained one's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "layers" in key:
                parameter.mul_(3)
            elif "embed" in key and name != "gemma":  # which scales them itself
                parameter.mul_(20)
    return model.requires_grad_(False)


def counted_in_graph(model):
    """What the exported graph multiplies and what it computes that is not linear."""
    graph = torch.export.export(model, (torch.arange(T)[None],), {"use_cache": False}, strict=False).graph
    counts = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or "aten." not in str(node.target):
            continue
        name, shapes = str(node.target).split(".")[1], [tuple(x.meta["val"].shape) for x in node.all_input_nodes]
        result = node.meta["val"]
        if name in ("linear", "addmm", "mm"):
            first = shapes[0 if name != "addmm" else 1]
            counts["linear"] += math.prod(result.shape) * first[-1]
        elif name in ("matmul", "bmm", "baddbmm") and len(result.shape) > 2:
            counts["attention"] += math.prod(result.shape) * shapes[0][-1]
        elif name in ("softmax", "_softmax"):
            counts["softmax"] += result.numel()
        elif name in ("layer_norm", "native_layer_norm"):
            counts["layernorm"] += result.numel()
        elif name in ("rsqrt", "reciprocal"):
            counts["rows of rmsnorm"] += result.numel()
        elif name in (*ACTIVATIONS, "tanh", "sigmoid", "exp", "pow"):
            counts[name] += result.numel()
    return counts


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_priced_is_what_the_graph_computes(name):
    seen = counted_in_graph(tiny(name))
    ours = Counter()
    for operation in operations(Architecture.of(CONFIGS[name]), T):
        elements = math.prod(operation.shape)
        if operation.name == "linear" and operation.shape[1] == operation.shape[2] == 32:
            continue  # the gain of Qwen3's queries and keys, a product of its own in the graph
        if operation.name == "linear":
            ours["linear"] += elements
        elif operation.name in ("scores", "mix"):
            ours["attention"] += elements * T
        elif operation.name == "rmsnorm":
            ours["rows of rmsnorm"] += elements // operation.shape[-1]
        elif operation.name in ("softmax", "layernorm", *ACTIVATIONS.values()):
            ours[operation.name] += elements
    seen["gelu"] += seen.pop("tanh", 0)  # of transformers' own form
    squares = seen.pop("pow", 0)  # of RMSNorms, and cubes of that form
    assert +seen == +ours
    assert squares == {"gpt2": T * 256 * 2}.get(name, squares)


def test_gates_are_priced_as_products():
    for name, config in CONFIGS.items():
        products = [o.shape for o in operations(Architecture.of(config), T) if o.name == "bilinear"]
        assert products == [(T, 96)] * 2 * (name in LLAMA_TYPES), name


def test_a_model_is_as_good_as_its_configuration():
    assert inference_cost(tiny("llama"), T, "spu-0.9.5") == inference_cost(CONFIGS["llama"], T, "spu-0.9.5")


def test_grouping_shrinks_the_linear_layer_alone():
    whole, grouped = (Architecture(key_value_heads=groups) for groups in (12, 3))
    costs = [inference_cost(a, 128, "spu-0.9.5").bytes for a in (whole, grouped)]
    assert {part for part in costs[0] if costs[0][part] != costs[1][part]} == {"attention linear"}


def test_a_window_is_priced_as_what_it_hides_too():
    short, long = (Architecture.of(MistralConfig(**GATED, sliding_window=w)) for w in (4, None))
    assert inference_cost(short, T, "spu-0.9.5") == inference_cost(long, T, "spu-0.9.5")


@pytest.mark.parametrize(
    ("config", "operation"),
    [
        (Gemma2Config(), "tanh of attention logits"),
        (MixtralConfig(), "a choice of experts"),
        (LlamaConfig(hidden_act="tanh"), "'tanh'"),
        (GemmaConfig(use_bidirectional_attention=True), "attention to later tokens"),
    ],
)
def test_what_has_no_price_is_named(config, operation):
    with pytest.raises(ValueError, match=operation):
        inference_cost(config, T, "spu-0.9.5")


@pytest.mark.parametrize("method", ["as given", "optimized"])
def test_a_row_beyond_what_norms_bear_is_carried_smaller_or_refused(method, private, started):
    """As SmolLM2-135M's first token: one row a thousand times the others, RMS 2,000."""
    model = tiny("qwen3")
    row = model.model.embed_tokens.weight[0]
    row.mul_(2000 / row.square().mean().sqrt())
    result = run_two_party(model, torch.arange(T), "SEMI2K", method=method)
    assert result.max_error < 2e-2 * max(1, result.logits.std())
    gpt2 = GPT2LMHeadModel(CONFIGS["gpt2"]).eval().requires_grad_(False)
    gpt2.transformer.wte.weight[0, 0] = 20_000
    with pytest.raises(ValueError, match=r"root mean square of up to 248\d, and the parties' arithmetic bears 256"):
        run_two_party(gpt2, torch.arange(T), "SEMI2K", method=method)
    with pytest.raises(ValueError, match="up to nan"):
        run_two_party(model, torch.arange(T), "SEMI2K", method=method, largest_row=math.nan)


@pytest.mark.parametrize("method", ["as given", "optimized"])
@pytest.mark.parametrize("name", LLAMA_TYPES)
def test_private_pass_of_llamas_kind(name, method, private, started):
    result = run_two_party(tiny(name), torch.arange(T), "SEMI2K", method=method)
    spread = result.logits.std()  # 0.2, and 3 of the one whose vocabulary is its embedding
    assert result.max_error < 2e-2 * max(1, spread)
    assert spread > 0.1  # not because there is nothing to err about


def test_private_pass_of_a_llama_by_two_processes(private, started):
    model = tiny("llama")
    result = run_two_party(model, torch.arange(T), "CHEETAH", method="optimized", logits_to_keep=1, timeout=300)
    assert result.max_error < 2e-2 * max(1, result.logits.std())
    priced = inference_cost(model, T, "optimized-spu-0.9.5", logits_to_keep=1)
    assert [s["operation"] for s in result.steps if s["operation"] in ("rmsnorm", "silu", "softmax")] == [
        o.name for o in operations(priced.architecture, T, 1) if o.name in ("rmsnorm", "silu", "softmax")
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary positions"),
        ({"model_type": "mistral", "sliding_window": 4}, "sliding window of 4"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "sliding window of 4",  # of the second layer
        ),
        ({"hidden_act": "gelu"}, "its tanh form: load the model with hidden_act='gelu_new'"),
    ],
)
def test_what_the_parties_cannot_compute_says_so(change, words):
    make = {"mistral": MistralConfig, "qwen2": Qwen2Config}.get(change.get("model_type"), LlamaConfig)
    model = AutoModelForCausalLM.from_config(
        make(**GATED, **{name: value for name, value in change.items() if name != "model_type"})
    )
    with pytest.raises(ValueError, match=words):
        run_two_party(model, torch.arange(T))


@pytest.mark.parametrize(
    ("prices", "whole", "parts", "left"),
    [
        ("spu-0.9.5", 27.1, {"silu": 18.0, "bilinear": 0.99, "softmax": 4.6, "rmsnorm": 1.5}, [25.6, 9.7, 22.5, 3.5]),
        ("optimized", 8.15, {"silu": 2.51, "bilinear": 0.99, "softmax": 2.1, "rmsnorm": 0.62}, [7.5, 6.2, 5.8, 3.2]),
    ],
)
def test_smollm2_costs_what_the_readmes_say(prices, whole, parts, left):
    """data/private_inference/README.md's table, and README.md's 67%: the first row's 18.0 of 27.1."""
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, intermediate_size=1536, vocab_size=49152)
    unit, sent = unit_prices(prices), Counter()
    for operation in operations(Architecture.of(config), 128):
        sent[operation.name] += unit.price(operation, unit.bytes) / 1e9
    table = savings(config, 128, prices)
    assert table["GB"].iloc[0] == pytest.approx(whole, abs=0.05)
    assert {name: sent[name] for name in parts} == pytest.approx(parts, rel=0.02)
    assert table["GB"].iloc[1:].tolist() == pytest.approx(left, abs=0.05)
    if prices == "spu-0.9.5":
        assert f"{sent['silu'] / whole:.0%}" == "67%"


def test_savings_are_those_of_the_model_without_it():
    table = savings(CONFIGS["llama"], T)
    silu, relu = (unit_prices("spu-0.9.5-cheetah").bytes[name]["element"] for name in ("silu", "relu"))
    whole = inference_cost(CONFIGS["llama"], T, "spu-0.9.5").communication_gb
    assert table.loc["as it is", "GB"] == whole
    assert table.loc["silu becomes relu", "saved"] * whole * 1e9 == pytest.approx((silu - relu) * 2 * T * 96)
    last = inference_cost(CONFIGS["llama"], T, "spu-0.9.5").bytes["RMSNorm"] / 5
    assert table.loc["norms become constants", "saved"] * whole * 1e9 == pytest.approx(4 * last)
    assert table["saved"].idxmax() == "all of these"
    assert list(savings(Architecture(activation="relu", layer_norm=False, heads=1), T).index) == ["as it is"]
