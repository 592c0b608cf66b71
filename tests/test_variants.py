"""The paper's twelve names as data."""

from dataclasses import FrozenInstanceError

import pytest

from entropy_lib import VARIANTS, EntropyGPT2Config, Variant
from entropy_lib.variants import NORM_PLACEMENTS, get_variant


def test_names_and_order_are_the_papers():
    assert list(VARIANTS) == [
        *("SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM"),
        *("SM+WNorm", "SM+SNorm", "SM+ScFFN"),
        *("SM+ScFuFFN", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)"),
    ]
    assert all(variant.name == name for name, variant in VARIANTS.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_does_what_its_name_says(name):
    variant, parts = VARIANTS[name], name.removeprefix("EReg(").split("+")
    assert variant.layer_norm == ("LN" in parts)
    assert variant.ffn_activation == ("gelu_new" if "G" in parts else "relu" if "R" in parts else "linear")
    assert variant.fused_ffn == ("Fu" in name)
    assert variant.ffn_scaling == ("Sc" in name)
    assert variant.learnable_temperature == ("(t)" in name)
    assert variant.entropy_regularization == name.startswith("EReg")
    assert variant.weight_normalization == {"SM+WNorm": "weight", "SM+SNorm": "spectral"}.get(name)
    assert variant.norm_placement == ("FFN" if "Norm" in name else None)


@pytest.mark.parametrize("name", VARIANTS)
def test_config_fields_are_those_of_the_config(name):
    variant = VARIANTS[name]
    config = EntropyGPT2Config(**variant.config_fields())
    assert config.variant == name
    assert config.activation_function == variant.ffn_activation
    for field in set(variant.__dataclass_fields__) - {"name", "ffn_activation"}:
        assert getattr(config, field) == getattr(variant, field)


def test_placed():
    assert NORM_PLACEMENTS == ("QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN")
    for placement in NORM_PLACEMENTS:
        placed = VARIANTS["SM+WNorm"].placed(placement)
        assert (placed.name, placed.weight_normalization, placed.norm_placement) == ("SM+WNorm", "weight", placement)
    assert VARIANTS["SM+WNorm"].norm_placement == "FFN"
    with pytest.raises(ValueError, match=r"QKVO\+FFN.*'V'"):
        VARIANTS["SM+SNorm"].placed("V")
    with pytest.raises(ValueError, match="no weight or spectral"):
        VARIANTS["SM"].placed("FFN")


def test_get_variant():
    assert get_variant("SM") is VARIANTS["SM"]
    mine = Variant("mine", ffn_scaling=True)
    assert get_variant(mine) is mine
    with pytest.raises(ValueError, match="unknown variant 'SM\\+LN\\+X'") as error:
        get_variant("SM+LN+X")
    assert all(name in str(error.value) for name in VARIANTS)
    with pytest.raises(FrozenInstanceError):
        mine.ffn_scaling = False
