"""The kinds of blocks that were measured whole: the paper's, candidates beyond them, and the private family's."""

from __future__ import annotations

from dataclasses import replace

from entropy_lib.modeling import EntropyGPT2Config
from entropy_lib.private_inference.architecture import Architecture
from entropy_lib.variants import VARIANTS

_PAPER = ("SM+ScFuFFN", "SM+LN+R", "SM+LN+G", "SM+R", "SM+LN", "SM+ScFFN", "SM+G", "SM(t)+ScFuFFN")
_BEYOND = {
    "SM + ReLU²": {"activation": "relu2"},
    "SM + x²": {"activation": "square"},
    "SM + x⊙y": {"activation": "bilinear"},
    "ReLU attention + R": {"activation": "relu", "attention": "relu_attention"},
    "ReLU attention + ScFuFFN": {"activation": "linear", "fused": True, "attention": "relu_attention"},
    "x² attention + ScFuFFN": {"activation": "linear", "fused": True, "attention": "square_attention"},
    "SM+ScFuFFN, 6 heads": {"activation": "linear", "fused": True, "heads": 6},
    "Llama's": {"layer_norm": True, "norm": "rmsnorm", "activation": "silu", "gated": True, "ffn_width": 2 * 768},
}
_STATIC = {"layer_norm": False, "activation": "relu"}  # their LayerNorms are annealed
_PRIVATE = {  # the kinds of blocks of `PRIVATE_VARIANTS`
    "SM(3)+LN+G+V": {"dynamic_heads": (3,)},
    "SM(3)+LN(a)+R+V": {**_STATIC, "dynamic_heads": (3,)},
    "SM(1)+LN(a)+R+V": {**_STATIC, "dynamic_heads": (1,)},
    "SM(0)+LN(a)+R+V": {**_STATIC, "dynamic_heads": (0,)},
    "R2(1)+LN(a)+R(2d)+V": {
        **_STATIC, "dynamic_heads": (1,), "attention": "relu2_attention", "ffn_width": 2 * 768
    },
    "SM(0)+LN(a)+R(2d)+V": {**_STATIC, "dynamic_heads": (0,), "ffn_width": 2 * 768},
}  # fmt: skip


def private_architectures() -> dict[str, Architecture]:
    """One block of each kind of the private family."""
    return {name: Architecture(1, vocabulary=0, **change) for name, change in _PRIVATE.items()}


def block_architectures() -> dict[str, Architecture]:
    """One block of d = 768 and 12 heads for each of the paper's kinds, and for candidates beyond them."""
    configs = {name: EntropyGPT2Config(**VARIANTS[name].config_fields(), n_layer=1) for name in _PAPER}
    blocks = {name: replace(Architecture.of(config), vocabulary=0) for name, config in configs.items()}
    beyond = {name: {"layer_norm": False, **change} for name, change in _BEYOND.items()}
    return blocks | {name: Architecture(1, vocabulary=0, **change) for name, change in beyond.items()}
