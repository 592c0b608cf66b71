"""The paper's architectures by name (Table 1 and Sections 4-5) as plain data."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

ATTENTIONS = ("softmax", "relu2")
NORM_PLACEMENTS = ("QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN")  # Table 5


@dataclass(frozen=True)
class Variant:
    """What a named architecture changes in GPT-2. Every field but `name` becomes a field of the model's config.

    Attributes:
        layer_norm: keep the three kinds of LayerNorm (before attention, before the FFN, before the vocabulary).
        ffn_activation: "gelu_new" (G), "relu" (R) or "linear" (none).
        fused_ffn: one d×d matrix instead of d→4d→d (Fu).
        weight_normalization: None, "weight" (WNorm) or "spectral" (SNorm).
        norm_placement: the linear layers it applies to, one of NORM_PLACEMENTS; None without normalisation.
        ffn_scaling: learnable α, β of Eq. 8 (Sc).
        learnable_temperature: softmax temperature t in R^{H×T} in every layer (SM(t), Appendix A).
        entropy_regularization: learnable thresholds θ, and the penalty of Algorithm 1 in training (EReg).
        dynamic_heads: how many heads of a layer weigh keys by queries, a pattern that repeats over the layers: (3,) is
            three in every layer, (0, 0, 1) one in every third; the others are static, see `StaticHeads`. None: all.
        attention: of the dynamic heads, "softmax" (SM) or "relu2" (R2), max(z, 0)² over the number of visible keys.
        annealed_layer_norm: LayerNorm that becomes a constant during training (LN(a)), see `AnnealedLayerNorm`.
        final_layer_norm: keep the LayerNorm before the vocabulary, which is not annealed.
        value_residual: every layer's values mixed with layer 0's (V).
        ffn_multiple: width of the FFN, in units of d.
    """

    name: str
    layer_norm: bool = False
    ffn_activation: str = "linear"
    fused_ffn: bool = False
    weight_normalization: str | None = None
    norm_placement: str | None = None
    ffn_scaling: bool = False
    learnable_temperature: bool = False
    entropy_regularization: bool = False
    dynamic_heads: tuple[int, ...] | None = None
    attention: str = "softmax"
    annealed_layer_norm: bool = False
    final_layer_norm: bool = True
    value_residual: bool = False
    ffn_multiple: int = 4

    def __post_init__(self):
        if isinstance(self.dynamic_heads, list):  # from JSON
            object.__setattr__(self, "dynamic_heads", tuple(self.dynamic_heads))

    def placed(self, norm_placement: str) -> Variant:
        """The same variant with its weight or spectral normalisation placed elsewhere (Table 5)."""
        if self.weight_normalization is None:
            raise ValueError(f"{self.name} has no weight or spectral normalisation to place at {norm_placement!r}")
        if norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement must be one of {NORM_PLACEMENTS}, got {norm_placement!r}")
        return replace(self, norm_placement=norm_placement)

    def config_fields(self) -> dict:
        """The fields of `EntropyGPT2Config` that make this variant."""
        fields = asdict(self)
        return {"variant": fields.pop("name"), "activation_function": fields.pop("ffn_activation"), **fields}


_SCALED_FUSED = {"ffn_scaling": True, "fused_ffn": True}

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        # Table 1: nonlinearities removed one after the other
        Variant("SM+LN+G", layer_norm=True, ffn_activation="gelu_new"),
        Variant("SM+LN+R", layer_norm=True, ffn_activation="relu"),
        Variant("SM+LN", layer_norm=True),
        Variant("SM+G", ffn_activation="gelu_new"),
        Variant("SM+R", ffn_activation="relu"),
        Variant("SM"),
        # Tables 5 and 6: what keeps the softmax-only model trainable
        Variant("SM+WNorm", weight_normalization="weight", norm_placement="FFN"),
        Variant("SM+SNorm", weight_normalization="spectral", norm_placement="FFN"),
        Variant("SM+ScFFN", ffn_scaling=True),
        # Table 3: the road to the final model
        Variant("SM+ScFuFFN", **_SCALED_FUSED),
        Variant("SM(t)+ScFuFFN", **_SCALED_FUSED, learnable_temperature=True),
        Variant("EReg(SM(t)+ScFuFFN)", **_SCALED_FUSED, learnable_temperature=True, entropy_regularization=True),
    )
}


_PRIVATE = {"layer_norm": True, "annealed_layer_norm": True, "ffn_activation": "relu", "value_residual": True}

# Beyond the paper. SM(n): n softmax heads a layer, or by layer, the rest static; LN(a): annealed to a constant, but for
# the last; V: value residual; R2(n): ReLU² attention instead of a softmax.
PRIVATE_VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("SM+LN(a)+R", layer_norm=True, annealed_layer_norm=True, ffn_activation="relu"),
        Variant("SM(3)+LN+G+V", dynamic_heads=(3,), layer_norm=True, ffn_activation="gelu_new", value_residual=True),
        Variant("SM(3)+LN(a)+R+V", **_PRIVATE, dynamic_heads=(3,)),
        Variant("SM(2)+LN(a)+R+V", **_PRIVATE, dynamic_heads=(2,)),
        Variant("SM(1)+LN(a)+R+V", **_PRIVATE, dynamic_heads=(1,)),
        Variant("SM(0,0,1)+LN(a)+R+V", **_PRIVATE, dynamic_heads=(0, 0, 1)),
        Variant("SM(0,0,1)+LN(a)+R(2d)+V", **_PRIVATE, dynamic_heads=(0, 0, 1), ffn_multiple=2),
        Variant("R2(0,0,1)+LN(a)+R+V", **_PRIVATE, dynamic_heads=(0, 0, 1), attention="relu2"),
        Variant("R2(0,0,1)+LN(a)+R(2d)+V", **_PRIVATE, dynamic_heads=(0, 0, 1), attention="relu2", ffn_multiple=2),
        Variant("SM(0)+LN(a)+R+V", **_PRIVATE, dynamic_heads=(0,)),
        Variant("EReg(SM(3)+LN(a)+R+V)", **_PRIVATE, dynamic_heads=(3,), entropy_regularization=True),
    )
}


def get_variant(variant: str | Variant) -> Variant:
    """Look a variant up by its name, the paper's or ours beyond it; ValueError lists the names if there is none.

    SM(...)+LN(a)+R+V takes any numbers of softmax heads by layer.
    """
    if isinstance(variant, Variant):
        return variant
    known = VARIANTS | PRIVATE_VARIANTS
    if variant not in known and (counts := re.fullmatch(r"SM\((\d+(?:,\d+)*)\)\+LN\(a\)\+R\+V", str(variant))):
        return Variant(variant, **_PRIVATE, dynamic_heads=tuple(map(int, counts[1].split(","))))
    if variant not in known:
        raise ValueError(
            f"unknown variant {variant!r}; the paper's names are {', '.join(VARIANTS)}; beyond it there are "
            f"{', '.join(PRIVATE_VARIANTS)}"
        )
    return known[variant]
