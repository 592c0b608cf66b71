"""Every printed cell of Tables 3, 4, 7 and 8; prices beyond them; the network."""

import dataclasses
import json
import math
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from entropy_lib import EntropyGPT2Config, build_model, inference_cost
from entropy_lib.private_inference import costs
from entropy_lib.private_inference.architecture import MODEL_TYPES, PARTS, Architecture, operations
from entropy_lib.private_inference.blocks import block_architectures
from entropy_lib.private_inference.network import NETWORKS, Network
from entropy_lib.variants import VARIANTS
from make.prices import DATA, fit_measured, fit_paper, printed_cells

CELLS = [pytest.param(a, t, v, id=f"{table}-{variant}") for table, variant, a, t, v in printed_cells()]
MEASURED = "spu-0.9.5-cheetah"
SMALL = Architecture(layers=2, heads=4, width=64, vocabulary=500)


def test_all_sixteen_rows_are_read():
    assert len(CELLS) == 16


@pytest.mark.parametrize(("architecture", "length", "printed"), CELLS)
@pytest.mark.parametrize("part", ["flops_ffn", "flops_attention"])
def test_flops_to_the_printed_digit(architecture, length, printed, part):
    ours = getattr(inference_cost(architecture, length), part)
    assert f"{ours / 1e9:.1f}" == f"{printed[part] / 1e9:.1f}"


@pytest.mark.parametrize(("architecture", "length", "printed"), CELLS)
def test_nonlinear_counts(architecture, length, printed):
    layers = architecture.layers
    expected = {"softmax": [12 * layers, length, length]}
    if architecture.layer_norm:
        expected["layernorm"] = [2 * layers, length, 768]
        expected[architecture.activation] = [layers, length, 3072]
    ours = inference_cost(architecture, length).nonlinear_ops
    assert ours == expected
    if "nonlinear_ops" in printed:
        assert ours == printed["nonlinear_ops"]


@pytest.mark.parametrize(("architecture", "length", "printed"), CELLS)
def test_communication_within_five_percent(architecture, length, printed):
    assert inference_cost(architecture, length).communication_gb == pytest.approx(printed["communication_gb"], rel=0.05)


@pytest.mark.parametrize(("architecture", "length", "printed"), CELLS)
def test_minutes_within_ten_percent(architecture, length, printed):
    assert inference_cost(architecture, length).latency_min == pytest.approx(printed["latency_min"], rel=0.10)


@pytest.mark.parametrize(("architecture", "length", "printed"), CELLS)
def test_the_printed_network_cannot_carry_the_printed_bytes_in_the_printed_minutes(architecture, length, printed):
    """Why the paper's minutes are fitted as they are and not split into computation and network."""
    wan = NETWORKS["WAN"]
    assert wan.bandwidth == 100e6
    assert wan.seconds(printed["communication_gb"] * 1e9, rounds=0) / 60 > 1.5 * printed["latency_min"]


def test_committed_books_are_what_the_fit_gives():
    record = json.loads((DATA / "private_inference" / f"measured-{MEASURED}.json").read_text())
    fitted, priced = fit_measured(record), costs.unit_prices(MEASURED)
    assert (priced.bytes, priced.seconds, priced.rounds) == (fitted["bytes"], fitted["seconds"], fitted["rounds"])
    paper = fit_paper(costs.unit_prices("spu-0.9.2b0-cheetah").bytes)
    for quantity in ("bytes", "seconds"):
        committed = getattr(costs.unit_prices("paper"), quantity)
        assert committed.keys() == paper[quantity].keys()
        for operation, prices in committed.items():
            assert prices == pytest.approx(paper[quantity][operation], rel=1e-3), operation


def test_the_old_engine_s_measured_prices_alone_explain_the_gelu_of_the_paper():
    """15.88 GB between SM+LN+G and SM+LN+R in Table 3; nothing is fitted here."""
    old = [inference_cost(Architecture(activation=name), 128, "spu-0.9.2b0") for name in ("gelu", "relu")]
    assert old[0].communication_gb - old[1].communication_gb == pytest.approx(25.32 - 9.44, rel=0.01)
    assert math.isnan(old[0].latency_min)


def test_books_say_where_they_come_from():
    for path in costs.PRICE_FILES.glob("*.json"):
        assert len(costs.unit_prices(path.stem).source) > 20


def test_measured_prices_reproduce_the_measured_blocks():
    """Unit prices come from operations alone; whole blocks are an independent check of them and of the sums."""

    blocks = json.loads((DATA / "private_inference" / f"measured-{MEASURED}.json").read_text())["blocks"]
    assert blocks
    for name, measured in blocks.items():
        variant, _, length = name.rpartition(", T=")
        cost = inference_cost(block_architectures()[variant], int(length), MEASURED)
        assert cost.communication_gb * 1e9 == pytest.approx(measured["bytes"], rel=0.03), name


def test_parts_add_up_and_are_in_the_table():
    cost = inference_cost(SMALL, 16)
    frame = cost.to_frame()
    assert list(frame.index) == [*(part for part in PARTS if part != "RMSNorm"), "total"]
    assert frame.loc["total", "GB"] == pytest.approx(cost.communication_gb)
    assert frame.loc["total", "minutes"] == pytest.approx(cost.latency_min)
    assert frame.loc["total", "share"] == pytest.approx(1)
    html = cost._repr_html_()
    assert "vocabulary projection" in html
    assert "prices paper" in html


def test_layers_cost_the_same_and_the_ends_once():
    two, five = (inference_cost(Architecture(layers=n), 128) for n in (2, 5))
    assert two.per_layer_gb == pytest.approx(five.per_layer_gb)
    per_layer = five.communication_gb - two.communication_gb
    assert per_layer == pytest.approx(3 * two.per_layer_gb)
    assert two.bytes["embedding"] == five.bytes["embedding"] > 0
    ends = two.bytes["embedding"] + two.bytes["vocabulary projection"] + two.bytes["LayerNorm"] / 5
    assert two.communication_gb == pytest.approx(2 * two.per_layer_gb + ends / 1e9)


def test_a_variants_config_is_enough():
    for name in VARIANTS:
        config = build_model(name, "tiny").config
        counts = inference_cost(config, 32).nonlinear_ops
        assert counts["softmax"] == [16, 32, 32]
        assert ("layernorm" in counts) == config.layer_norm
        assert ("gelu" in counts, "relu" in counts) == ("G" in name.split("+"), "R" in name.split("+"))
    published = inference_cost(GPT2Config(), 128)
    assert published.communication_gb == pytest.approx(25.32, rel=0.05)


def test_temperature_costs_one_product_a_query_and_scaling_nothing_in_bytes():
    plain, scaled, tempered = (
        inference_cost(build_model(name, "tiny").config, 32, MEASURED) for name in ("SM", "SM+ScFFN", "SM(t)+ScFuFFN")
    )
    assert scaled.bytes == plain.bytes
    assert scaled.flops_ffn - plain.flops_ffn == 4 * 32 * 64
    names = [operation.name for operation in operations(tempered.architecture, 32)]
    assert names.count("multiply") == 4


@pytest.mark.parametrize("change", [{"activation": "relu2"}, {"activation": "square"}, {"activation": "bilinear"},
                                    {"activation": "relu", "attention": "relu_attention"}])  # fmt: skip
def test_candidates_beyond_the_paper_have_today_s_prices_only(change):
    architecture = Architecture(layer_norm=False, **change)
    assert inference_cost(architecture, 128, MEASURED).communication_gb > 0
    with pytest.raises(ValueError, match="no price for"):
        inference_cost(architecture, 128, "paper")


def test_network_adds_bytes_over_bandwidth_and_rounds_times_latency():
    fast, slow = Network("fast", 1e9, 0.0), Network("slow", 1e9, 0.01)
    base = inference_cost(SMALL, 16, MEASURED)
    quick = inference_cost(SMALL, 16, MEASURED, fast)
    assert 60 * (quick.latency_min - base.latency_min) == pytest.approx(base.communication_gb * 8)
    rounds = costs.unit_prices(MEASURED).rounds
    expected = sum(rounds[operation.name] for operation in operations(SMALL, 16))
    late = inference_cost(SMALL, 16, MEASURED, slow)
    assert 60 * (late.latency_min - quick.latency_min) == pytest.approx(expected * 0.01)
    assert (
        inference_cost(SMALL, 16, MEASURED, "LAN").latency_min < inference_cost(SMALL, 16, MEASURED, "WAN").latency_min
    )
    assert late.network == "slow"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inference_cost(SMALL, 16, "gold"), "paper, spu-0.9.2b0-cheetah, spu-0.9.5-cheetah"),
        (lambda: inference_cost(SMALL, 16, "spu"), "paper, spu-0.9.2b0-cheetah, spu-0.9.5-cheetah"),
        (lambda: inference_cost(SMALL, 16, MEASURED, "moon"), "LAN, WAN"),
        (lambda: inference_cost(SMALL, 16, "paper", "LAN"), "include the network"),
        (lambda: inference_cost(SMALL, 0), "context_length must be positive, got 0"),
        (lambda: Architecture(heads=7), "multiple of heads, got 768 and 7"),
        (lambda: Architecture(activation="swish"), "swish"),
        (lambda: Architecture(attention="tanh"), "tanh"),
        (lambda: Architecture(layers=0), "layers must be positive, got 0"),
        (lambda: Architecture(fused=True), "no activation in between, got 'gelu'"),
        (lambda: Architecture(ffn_width=0), "ffn_width must be positive, got 0"),
        (lambda: Architecture(dynamic_heads=(13,)), "dynamic_heads must be numbers from 0 to heads = 12, got"),
        (lambda: Architecture(dynamic_heads=()), "dynamic_heads must be numbers"),
        (lambda: inference_cost(SMALL, 16, logits_to_keep=17), "logits_to_keep must be from 0 to 16, got 17"),
        (lambda: inference_cost(GPT2Config(activation_function="tanh"), 16), "'tanh' is not supported"),
        (lambda: inference_cost(GPT2Config(add_cross_attention=True), 16), "cross-attention"),
        (lambda: inference_cost(BloomConfig(), 16), "type 'bloom' .* is not supported.*pass an Architecture"),
        (lambda: Architecture(key_value_heads=5), "multiple of key_value_heads, got 12 and 5"),
        (lambda: Architecture(key_value_heads=0), "key_value_heads must be positive, got 0"),
        (lambda: Architecture(head_size=0), "head_size must be positive, got 0"),
        (lambda: Architecture(norm="batchnorm"), "norm must be one of .*, got 'batchnorm'"),
        (lambda: Architecture(gated=True, activation="bilinear"), "is activation='linear', gated=True"),
        (lambda: inference_cost(object(), 16), "object lacks model_type"),
        (lambda: inference_cost(GPT2Config(is_causal=False), 16), "causal attention False"),
        (lambda: inference_cost(OPTConfig(do_layer_norm_before=False), 16), "LayerNorm before attention and FFN False"),
        (lambda: inference_cost(OPTConfig(word_embed_proj_dim=64), 16), "embedding width 64; it must be 768"),
        (lambda: inference_cost(SMALL, 16, None), "unknown prices None"),
        (lambda: inference_cost(SMALL, 16, MEASURED, ("LAN",)), "must be a Network, one of LAN, WAN or None"),
        (lambda: inference_cost(SMALL, 16, "spu-0.9.2b0", "LAN"), "no minutes that a network could add to"),
        (lambda: Network("n", 0, 0.0), "bandwidth must be a number, positive, got 0"),
        (lambda: Network("n", -1e9, 0.0), "bandwidth must be a number, positive, got -1"),
        (lambda: Network("n", math.nan, 0.0), "bandwidth must be a number, positive, got nan"),
        (lambda: Network("n", "1e9", 0.0), "bandwidth must be a number, positive, got '1e9'"),
        (lambda: Network("n", 1e9, -0.1), "latency must be a number, not negative and finite, got -0.1"),
        (lambda: Network("n", 1e9, math.nan), "latency must be a number, not negative and finite, got nan"),
        (lambda: Architecture(layers=2.5), "layers must be an integer, got 2.5"),
        (lambda: Architecture(heads=True), "heads must be an integer, got True"),
        (lambda: Architecture(vocabulary="500"), "vocabulary must be an integer, got '500'"),
    ],
)
def test_errors_say_what_was_seen_and_what_is_wanted(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("length", [16.0, 2.5, math.nan, True, "16", None, [16], np.float64(16), np.True_, -1, 0])
@pytest.mark.parametrize("of", [inference_cost, operations], ids=["inference_cost", "operations"])
def test_a_length_that_is_no_positive_integer_is_refused(of, length):
    with pytest.raises(ValueError, match=r"context_length must be (an integer|positive), got"):
        of(SMALL, length)


@pytest.mark.parametrize("length", [16, np.int64(16), np.uint8(16), torch.tensor(16)])
def test_any_integer_is_a_length(length):
    cost = inference_cost(SMALL, length)
    assert cost == inference_cost(SMALL, 16)
    assert type(cost.context_length) is int


@pytest.mark.parametrize(
    "config", [GPT2Config(n_positions=64), EntropyGPT2Config(n_positions=64), OPTConfig(max_position_embeddings=64)]
)
def test_a_length_beyond_the_positions_is_refused(config):
    assert inference_cost(config, 64).context_length == 64
    for call in (lambda: inference_cost(config, 65), lambda: operations(Architecture.of(config), 65)):
        with pytest.raises(ValueError, match="context_length 65 exceeds the model's 64 positions"):
            call()


def test_every_other_model_type_is_refused_whatever_names_it_shares_with_gpt2():
    """Relative positions, experts, Post-LN, gates of other kinds: none has a price."""
    names = {"activation_function": "gelu_new", "hidden_act": "gelu_new", "num_hidden_layers": 2, "n_layer": 2}
    names |= {"num_attention_heads": 4, "n_head": 4, "hidden_size": 64, "n_embd": 64, "vocab_size": 500}
    others = set(CONFIG_MAPPING_NAMES) - set(MODEL_TYPES)
    assert len(others) > 100
    for kind in others:
        config = SimpleNamespace(model_type=kind, max_position_embeddings=64, n_positions=64, **names)
        with pytest.raises(ValueError, match=f"type '{kind}' with 'gelu_new' is not supported.*pass an Architecture"):
            inference_cost(config, 16)


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(),
        BertConfig(),
        BloomConfig(),
        GPTBigCodeConfig(),
        GPTJConfig(),
    ],
)
def test_real_configurations_of_other_types_are_refused(config):
    with pytest.raises(ValueError, match=f"type '{config.model_type}'"):
        inference_cost(config, 16)


def test_opt_has_the_operations_of_gpt2():
    config = OPTConfig(num_hidden_layers=2, hidden_size=64, ffn_dim=256, num_attention_heads=4, vocab_size=500)
    assert Architecture.of(config) == dataclasses.replace(SMALL, activation="relu")
    model = OPTForCausalLM(config)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    ours = list(operations(Architecture.of(config), 1))
    weights = sum(module.weight.numel() for module in linear)
    assert weights == sum(o.shape[1] * o.shape[2] for o in ours if o.name == "linear")
    assert len(norms) == sum(o.name == "layernorm" for o in ours)


def test_what_costs_nothing_is_priced_the_same():
    """Normalised and folded weights are plain ones; a fused FFN has neither an inner width nor an activation."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500}
    free = [
        {"weight_normalization": "spectral", "norm_placement": "FFN"},
        {"folded": True},
        {"entropy_regularization": True},
        {"tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
    ]
    assert all(Architecture.of(EntropyGPT2Config(**sizes, **fields)) == SMALL for fields in free)
    fused = Architecture.of(EntropyGPT2Config(**sizes, fused_ffn=True, activation_function="linear"))
    assert fused == Architecture.of(EntropyGPT2Config(**sizes, fused_ffn=True, n_inner=100))


def test_scaling_costs_a_product_where_layernorm_keeps_it_out_of_the_weights():
    free, paid = (Architecture(layer_norm=norm, activation="relu", scaled=True) for norm in (False, True))
    count = [[o.name for o in operations(a, 16)].count("multiply") for a in (free, paid)]
    assert count == [0, 12]
    assert (
        inference_cost(paid, 16, MEASURED).bytes["FFN linear"] > inference_cost(free, 16, MEASURED).bytes["FFN linear"]
    )


def test_a_short_name_is_enough_if_it_is_one_book():
    assert inference_cost(SMALL, 16, "spu-0.9.5").prices == MEASURED


def test_config_of_the_library_and_of_transformers_agree():
    config = EntropyGPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500)
    assert (
        Architecture.of(config) == SMALL == Architecture.of(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500))
    )


def test_decimal_rounding_of_the_closest_printed_cell():
    """7.25 of Table 4's 7.3 GFLOP: without β's T·d products a layer it would print 7.2."""
    exact = Decimal(2 * 512 * 768**2 * 12) / 10**9
    assert round(exact, 1) == Decimal("7.2")
    assert round(exact + Decimal(12 * 512 * 768) / 10**9, 1) == Decimal("7.3")


@pytest.mark.parametrize("name", costs.price_names())
def test_whatever_has_a_price_in_seconds_has_rounds_too(name):
    priced = costs.unit_prices(name)
    if priced.seconds and not priced.includes_network:
        assert set(priced.bytes) == set(priced.seconds) == set(priced.rounds)
