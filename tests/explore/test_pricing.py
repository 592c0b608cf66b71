"""The cost explorer draws the numbers of `inference_cost`, and the paper's where the setting is the paper's."""

import math

import pytest

from entropy_lib import PRIVATE_VARIANTS, VARIANTS, EntropyGPT2Config, build_model
from entropy_lib.private_inference.costs import inference_cost, unit_prices
from entropy_lib.variants import get_variant

pytest.importorskip("ipywidgets")
pricing = pytest.importorskip("entropy_lib.explore.pricing", exc_type=ImportError)

PARTS = list(pricing.PART_COLORS)


def drawn(explorer, column):
    """{part: [variant, baseline]}, totals' texts, crosses of a column."""
    data = explorer.figure.data
    bars = data[column * len(PARTS) : (column + 1) * len(PARTS)]
    totals, crosses = data[2 * len(PARTS) + 2 * column :][:2]
    return {bar.name: tuple(bar.x) for bar in bars}, tuple(totals.text), tuple(crosses.x)


def expected(variant, length, prices, network=None, **config):
    return inference_cost(build_model(variant, "tiny", n_positions=length, **config).config, length, prices, network)


def test_bars_are_the_library_s_after_every_control_is_changed():
    explorer = pricing.cost_explorer()
    changes = {
        "prices": "spu-0.9.5-cheetah", "variant": "SM+R", "layers": 3, "heads": 4, "width": 64, "context": 32,
        "vocabulary": 2048, "network": "LAN",
    }  # fmt: skip
    for name, value in changes.items():
        before = [bar.x for bar in explorer.figure.data]
        explorer.controls[name].value = value
        assert [bar.x for bar in explorer.figure.data] != before, name
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 2048}
    for row, variant in enumerate(("SM+R", "SM+LN+G")):
        cost = expected(variant, 32, "spu-0.9.5-cheetah", "LAN", **sizes)
        for part in PARTS:
            assert drawn(explorer, 0)[0][part][row] == pytest.approx(cost.bytes[part] / 1e9, rel=1e-5)
            assert drawn(explorer, 1)[0][part][row] == pytest.approx(cost.minutes[part], rel=1e-5)
        assert drawn(explorer, 1)[1][row] == f" {cost.latency_min:.3g}"


def test_the_paper_s_points_are_marked_where_the_setting_is_printed():
    explorer = pricing.cost_explorer()
    assert drawn(explorer, 0)[2] == (6.43, 25.32)
    assert drawn(explorer, 1)[2] == (4.76, 8.21)
    assert "Table 3" in explorer.status.value
    explorer.controls["context"].value = 256
    assert drawn(explorer, 0)[2] == (20.72, 58.51)
    explorer.controls["variant"].value = "SM+G"  # not in the tables
    assert drawn(explorer, 0)[2] == (None, 58.51)
    explorer.controls["layers"].value = 11
    assert drawn(explorer, 0)[2] == (None, None)
    assert "Table" not in explorer.status.value


def test_networks_belong_to_prices_with_measured_computation():
    explorer = pricing.cost_explorer(network="WAN")
    assert explorer.controls["network"].disabled
    assert explorer.costs[0].network == "included"
    explorer.controls["prices"].value = "spu-0.9.5-cheetah"
    assert not explorer.controls["network"].disabled
    assert explorer.costs[0].network == "WAN"
    explorer.controls["prices"].value = "spu-0.9.2b0-cheetah"  # bytes only, and no price for SM(t)'s product
    assert "no price for 'multiply'" in explorer.status.value
    explorer.controls["variant"].value = "SM+ScFuFFN"
    assert math.isnan(explorer.costs[0].latency_min)
    assert drawn(explorer, 1)[1][0] == " not measured on this engine"
    assert "min" not in explorer.status.value


def test_models_beyond_the_paper_have_a_price_where_their_operations_do():
    explorer = pricing.cost_explorer(prices="optimized")
    shares = []
    for variant in PRIVATE_VARIANTS:
        explorer.controls["variant"].value = variant
        assert variant in explorer.figure.layout.title.text
        config = EntropyGPT2Config(**get_variant(variant).config_fields(), n_positions=128)  # of GPT-2 small
        cost = inference_cost(config, 128, "optimized", "WAN")
        assert explorer.costs[0].communication_gb == pytest.approx(cost.communication_gb)
        shares.append(explorer.costs[0].communication_gb / explorer.costs[1].communication_gb)
    assert max(shares) < 0.8
    explorer.controls["prices"].value = "paper"
    assert "no price for 'static'" in explorer.status.value
    explorer.controls["prices"].value = unit_prices("optimized").name
    explorer.controls["variant"].value = "SM(3)+LN(a)+R+V"
    explorer.controls["heads"].value = 2
    assert "3" in explorer.status.value  # softmax heads of two: said, not drawn


def test_every_variant_can_be_priced_and_blocks_alone_too():
    explorer = pricing.cost_explorer()
    for variant in VARIANTS:
        explorer.controls["variant"].value = variant
        assert explorer.costs[0].architecture.layer_norm == VARIANTS[variant].layer_norm
    explorer.controls["vocabulary"].value = 0
    assert explorer.costs[0].bytes["embedding"] == explorer.costs[0].bytes["vocabulary projection"] == 0


def test_sizes_that_do_not_fit_are_refused_in_place():
    explorer = pricing.cost_explorer()
    before = explorer.figure.data[0].x
    explorer.controls["heads"].value = 20
    assert "multiple of heads" in explorer.status.value
    assert explorer.figure.data[0].x == before
    with pytest.raises(ValueError, match="unknown network 'DSL'"):
        pricing.cost_explorer(network="DSL")
    with pytest.raises(ValueError, match="unknown variant"):
        pricing.cost_explorer("SM+XX")
