"""What a private forward pass computes: a decoder's sizes, and its operations one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PARTS = (
    "embedding", "attention linear", "softmax", "LayerNorm", "activation", "FFN linear", "vocabulary projection",
)  # fmt: skip
ACTIVATIONS = ("gelu", "relu", "linear", "relu2", "square", "bilinear")
ATTENTIONS = ("softmax", "relu_attention", "square_attention")
_NAMES = {"gelu_new": "gelu", "gelu": "gelu", "relu": "relu", "linear": "linear", "relu2": "relu2"}  # transformers'


@dataclass(frozen=True)
class Architecture:
    """A GPT-2-like decoder, the paper's and some beyond.

    Attributes:
        layers, heads, width, vocabulary: L, H, d, V.
        layer_norm: Pre-LN, and the final one.
        activation: of the FFN, d→4d→d: one of ACTIVATIONS. "relu2" is max(x, 0)², "square" x², "bilinear" the product
            of two d→4d maps, (X·W₁ ⊙ X·W₂)·W₃.
        attention: one of ATTENTIONS; "relu_attention" and "square_attention" divide max(z, 0) and z² by the number of
            visible keys.
        fused: one d×d matrix for the FFN.   scaled: Eq. 8's α and β.   tempered: SM(t).
    """

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50257
    layer_norm: bool = True
    activation: str = "gelu"
    attention: str = "softmax"
    fused: bool = False
    scaled: bool = False
    tempered: bool = False

    def __post_init__(self):
        for name in ("layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.vocabulary < 0:  # 0: blocks only
            raise ValueError(f"vocabulary must not be negative, got {self.vocabulary}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")
        if self.fused and self.activation != "linear":
            raise ValueError(f"a fused FFN has no activation in between, got {self.activation!r}")

    @classmethod
    def of(cls, config) -> Architecture:
        """The architecture of an `EntropyGPT2Config` or of a transformers configuration with GPT-2's names.

        Raises ValueError for what neither the prices nor the two-party run know: another FFN width than 4d,
        cross-attention, fewer key-value heads, an activation without a price.
        """

        def get(*names, default=None):
            return next((getattr(config, name) for name in names if hasattr(config, name)), default)

        sizes = {
            "layers": get("n_layer", "num_hidden_layers"),
            "heads": get("n_head", "num_attention_heads"),
            "width": get("n_embd", "hidden_size"),
            "vocabulary": get("vocab_size"),
        }
        if missing := [name for name, value in sizes.items() if value is None]:
            raise ValueError(f"a configuration like GPT-2's is needed; {type(config).__name__} lacks {missing}")
        activation = get("activation_function", "hidden_act")
        if activation not in _NAMES:
            raise ValueError(f"activation {activation!r} is not supported; choose from {', '.join(_NAMES)}")
        width = sizes["width"]
        inner = get("n_inner", "intermediate_size")
        odd = {
            "FFN width": (inner or 4 * width, 4 * width),
            "key-value heads": (get("num_key_value_heads", default=sizes["heads"]), sizes["heads"]),
            "cross-attention": (bool(get("add_cross_attention", default=False)), False),
            "attention scaled by layer": (bool(get("scale_attn_by_inverse_layer_idx", default=False)), False),
            "attention scaled by 1/√d": (bool(get("scale_attn_weights", default=True)), True),
        }
        for name, (seen, wanted) in odd.items():
            if seen != wanted:
                raise ValueError(f"not supported: {name} {seen}; it must be {wanted}")
        return cls(
            **sizes, layer_norm=get("layer_norm", default=True), activation=_NAMES[activation],
            fused=get("fused_ffn", default=False), scaled=get("ffn_scaling", default=False),
            tempered=get("learnable_temperature", default=False),
        )  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation of a pass: the part it belongs to, its name in `party` and in price books, its size.

    `shape` is that of the nonlinear operation, or (rows, inputs, outputs) of a linear one; `flops` as the paper counts.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    flops: int = 0

    def units(self) -> dict[str, int]:
        """What a price is per: "in" and "out" elements of linear operations, "element" and "row" of the others."""
        if self.name in ("linear", "embed"):
            rows, inputs, outputs = self.shape
            return {"in": rows * inputs, "out": rows * outputs}
        if self.name in ("scores", "mix"):  # heads, T, d/heads
            heads, length, size = self.shape
            square, thin = heads * length * length, heads * length * size
            return {"in": 2 * thin, "out": square} if self.name == "scores" else {"in": square + thin, "out": thin}
        elements = 1
        for size in self.shape:
            elements *= size
        return {"element": elements, "row": elements // self.shape[-1]}


def operations(architecture: Architecture, context_length: int) -> Iterator[Operation]:
    """The operations of one forward pass over T = context_length tokens, in order; copies and additions are free.

    FLOPs as in Tables 3, 4, 7 and 8, for which a multiplication and an addition are two: 16·T·d² (or 2·T·d² fused,
    plus T·d for β) and 8·T·d² + 3·T²·d, where QKᵀ is counted in full and AV for the visible half.
    """
    a, t, d = architecture, context_length, architecture.width
    if t < 1:
        raise ValueError(f"context_length must be positive, got {t}")
    size = d // a.heads
    if a.vocabulary:
        yield Operation("embedding", "embed", (t, a.vocabulary, d))
    for layer in range(a.layers):

        def linear(part, inputs, outputs, flops=0, layer=layer):
            return Operation(part, "linear", (t, inputs, outputs), layer, 2 * t * inputs * outputs + flops)

        if a.layer_norm:
            yield Operation("LayerNorm", "layernorm", (t, d), layer)
        yield linear("attention linear", d, 3 * d)
        if a.tempered:
            yield Operation("attention linear", "multiply", (a.heads, t, size), layer)
        yield Operation("attention linear", "scores", (a.heads, t, size), layer, 2 * t * t * d)
        yield Operation("softmax", a.attention, (a.heads, t, t), layer)
        yield Operation("attention linear", "mix", (a.heads, t, size), layer, t * t * d)
        yield linear("attention linear", d, d)
        if a.layer_norm:
            yield Operation("LayerNorm", "layernorm", (t, d), layer)
        scaling = t * d if a.scaled else 0
        if a.fused:
            yield linear("FFN linear", d, d, scaling)
            continue
        yield linear("FFN linear", d, 8 * d if a.activation == "bilinear" else 4 * d)
        if a.activation != "linear":
            yield Operation("activation", a.activation, (t, 4 * d), layer)
        yield linear("FFN linear", 4 * d, d, scaling)
    if a.vocabulary:
        if a.layer_norm:
            yield Operation("LayerNorm", "layernorm", (t, d))
        yield Operation("vocabulary projection", "linear", (t, d, a.vocabulary))
