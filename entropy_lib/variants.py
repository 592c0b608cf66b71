"""The paper's architectures by name (Table 1 and Sections 4-5) as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

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


def get_variant(variant: str | Variant) -> Variant:
    """Look a variant up by its name in the paper; ValueError lists the names if there is none."""
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; the paper's names are {', '.join(VARIANTS)}")
    return VARIANTS[variant]
