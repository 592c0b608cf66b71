"""The cost explorer holds the numbers of `inference_cost`, and the paper's where the setting is the paper's."""

import math

import pytest
from traitlets import TraitError

from entropy_lib import PRIVATE_VARIANTS, VARIANTS, EntropyGPT2Config, build_model
from entropy_lib.private_inference.costs import inference_cost, price_names, unit_prices
from entropy_lib.variants import get_variant

pytest.importorskip("anywidget")
pricing = pytest.importorskip("entropy_lib.explore.pricing", exc_type=ImportError)


def test_costs_are_the_library_s_after_every_trait_is_changed():
    explorer = pricing.cost_explorer()
    changes = {
        "prices": "spu-0.9.5-cheetah", "variant": "SM+R", "layers": 3, "heads": 4, "width": 64, "context": 32,
        "vocabulary": 2048, "network": "LAN",
    }  # fmt: skip
    for name, value in changes.items():
        before = [(cost.bytes, cost.minutes) for cost in explorer.costs]
        setattr(explorer, name, value)
        assert [(cost.bytes, cost.minutes) for cost in explorer.costs] != before, name
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 2048}
    for cost, variant in zip(explorer.costs, ("SM+R", "SM+LN+G"), strict=True):
        config = build_model(variant, "tiny", n_positions=32, **sizes).config
        expected = inference_cost(config, 32, "spu-0.9.5-cheetah", "LAN")
        assert (cost.bytes, cost.minutes) == (expected.bytes, expected.minutes)
        assert f"{expected.latency_min:.3g}" in explorer.words()


def test_the_paper_s_points_are_marked_where_the_setting_is_printed():
    explorer = pricing.cost_explorer()

    def both():
        found = map(explorer.printed, (explorer.variant, "SM+LN+G"))
        return [cell and cell[1]["communication_gb"] for cell in found]

    assert both() == [6.43, 25.32]
    assert explorer.printed("SM+LN+G")[1]["latency_min"] == 8.21
    assert "Table 3" in explorer.words()
    assert tuple(explorer.still().data[-1].x) == (6.43, 25.32)
    explorer.context = 256
    assert both() == [20.72, 58.51]
    explorer.variant = "SM+G"  # not in the tables
    assert both() == [None, 58.51]
    explorer.layers = 11
    assert both() == [None, None]
    assert "Table" not in explorer.words()


def test_every_price_has_a_name_that_a_reader_knows():
    assert set(pricing.PRICE_LABELS) == set(price_names())


def test_networks_belong_to_prices_with_measured_computation():
    explorer = pricing.cost_explorer(network="WAN")
    assert not explorer.paid
    assert explorer.costs[0].network == "included"
    explorer.prices = "spu-0.9.5-cheetah"
    assert explorer.paid
    assert explorer.costs[0].network == "WAN"
    explorer.prices = "spu-0.9.2b0-cheetah"  # bytes only, and no price for SM(t)'s product
    assert "no price for 'multiply'" in explorer.words()
    explorer.variant = "SM+ScFuFFN"
    assert math.isnan(explorer.costs[0].latency_min)
    assert "min" not in explorer.words()


def test_models_beyond_the_paper_have_a_price_where_their_operations_do():
    explorer = pricing.cost_explorer(prices="optimized")
    shares = []
    for variant in PRIVATE_VARIANTS:
        explorer.variant = variant
        assert variant in explorer.still().layout.title.text
        config = EntropyGPT2Config(**get_variant(variant).config_fields(), n_positions=128)  # of GPT-2 small
        cost = inference_cost(config, 128, "optimized", "WAN")
        assert explorer.costs[0].communication_gb == pytest.approx(cost.communication_gb)
        shares.append(explorer.costs[0].communication_gb / explorer.costs[1].communication_gb)
    assert max(shares) < 0.8
    explorer.prices = "paper"
    assert "no price for 'static'" in explorer.words()
    explorer.prices = unit_prices("optimized").name
    explorer.variant, explorer.heads = "SM(3)+LN(a)+R+V", 2
    assert "3" in explorer.words()  # softmax heads of two: said, not priced


def test_every_variant_can_be_priced_and_blocks_alone_and_long_contexts_too():
    explorer = pricing.cost_explorer()
    for variant in VARIANTS:
        explorer.variant = variant
        assert explorer.costs[0].architecture.layer_norm == VARIANTS[variant].layer_norm
    explorer.vocabulary, explorer.context = 0, 2048  # more than GPT-2's positions
    assert explorer.costs[0].bytes["embedding"] == explorer.costs[0].bytes["vocabulary projection"] == 0
    assert len(explorer.html()) < 20_000


def test_sizes_that_do_not_fit_are_said_and_what_there_is_not_is_refused():
    explorer = pricing.cost_explorer()
    explorer.heads = 20
    assert "multiple of heads" in explorer.words()
    with pytest.raises(TraitError):
        explorer.width = 100
    with pytest.raises(ValueError, match="unknown network 'DSL'"):
        pricing.cost_explorer(network="DSL")
    with pytest.raises(ValueError, match="unknown variant"):
        pricing.cost_explorer("SM+XX")
    with pytest.raises(ValueError, match="unknown prices"):
        pricing.cost_explorer(prices="cheap")
    with pytest.raises(ValueError, match="context_length must be one of"):
        pricing.cost_explorer(context_length=100)
