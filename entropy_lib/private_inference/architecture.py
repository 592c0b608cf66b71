"""What a private forward pass computes: a decoder's sizes, and its operations one after the other."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

PARTS = (
    "embedding", "attention linear", "softmax", "LayerNorm", "RMSNorm", "activation", "FFN linear",
    "vocabulary projection",
)  # fmt: skip
ACTIVATIONS = ("gelu", "silu", "relu", "linear", "relu2", "square", "bilinear")
NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}  # and their parts
ATTENTIONS = ("softmax", "relu_attention", "relu2_attention", "square_attention")
_NAMES = {  # transformers'
    "gelu_new": "gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu", "swish": "silu", "relu": "relu",
    "linear": "linear", "relu2": "relu2",
}  # fmt: skip
_ATTENTIONS = {"softmax": "softmax", "relu2": "relu2_attention"}  # `Variant`'s
LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # RMSNorm, rotary positions, a gated FFN
MODEL_TYPES = ("entropy_gpt2", "gpt2", "opt", "gpt_neox", *LLAMA_TYPES)  # whose operations are known
_MAY_BE_NONE = ("positions", "key_value_heads", "head_size")
_UNPRICED = {  # operations that no price stands for, by the setting that asks for one
    "attn_logit_softcapping": "tanh of attention logits", "final_logit_softcapping": "tanh of the logits",
    "num_local_experts": "a choice of experts", "num_experts": "a choice of experts",
    "use_bidirectional_attention": "attention to later tokens", "clip_qkv": "clipped queries, keys and values",
}  # fmt: skip


def whole_number(name: str, value) -> int:
    """`value` as an int; ValueError for a fraction, a truth value or text."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be an integer, got {value!r}")


@dataclass(frozen=True)
class Architecture:
    """A decoder: GPT-2's kind, the paper's variants of it and some beyond, or Llama's kind.

    Attributes:
        layers, heads, width, vocabulary: L, H, d, V.
        layer_norm: Pre-LN, two a layer. An annealed LayerNorm is none: it is in the matrices.
        norm: what kind, "layernorm" or "rmsnorm"; an RMSNorm's gain is in the next matrix.
        final_layer_norm: before the vocabulary; None: as `layer_norm`.
        ffn_width: None is 4·d.
        activation: of the FFN, d→4d→d: one of ACTIVATIONS. "relu2" is max(x, 0)², "square" x², "bilinear" the product
            of two d→4d maps, (X·W₁ ⊙ X·W₂)·W₃.
        attention: one of ATTENTIONS; "relu_attention", "relu2_attention" and "square_attention" divide max(z, 0), its
            square and z² by the number of visible keys.
        dynamic_heads: how many heads of a layer have it, a pattern that repeats over the layers as in `Variant`; the
            others are static, matrices of the server's. None: all.
        value_residual: values of layer 0 are added, scaled in the weights already; it costs nothing.
        fused: one d×d matrix for the FFN.   scaled: Eq. 8's α and β.   tempered: SM(t).
        gated: the FFN is (activation(X·W₁) ⊙ X·W₂)·W₃, so that a gated "linear" one is "bilinear".
        key_value_heads: groups of heads that share key and value; None: as many as heads.
        head_size: None is d / heads.   query_key_norm: an RMSNorm of every query and key, with a gain of its own.
        positions: the longest input; None: any. It costs nothing.
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
    final_layer_norm: bool | None = None
    ffn_width: int | None = None
    dynamic_heads: tuple[int, ...] | None = None
    value_residual: bool = False
    positions: int | None = field(default=None, compare=False)
    norm: str = "layernorm"
    gated: bool = False
    key_value_heads: int | None = None
    head_size: int | None = None
    query_key_norm: bool = False

    def __post_init__(self):
        if self.final_layer_norm is None:
            object.__setattr__(self, "final_layer_norm", self.layer_norm)
        if self.ffn_width is None:
            object.__setattr__(self, "ffn_width", 4 * whole_number("width", self.width))
        for name in ("layers", "heads", "width", "ffn_width", "vocabulary", *_MAY_BE_NONE):
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                object.__setattr__(self, name, whole_number(name, value))
        if self.dynamic_heads is not None:
            pattern = tuple(whole_number("dynamic_heads", heads) for heads in self.dynamic_heads)
            if not pattern or not all(0 <= heads <= self.heads for heads in pattern):
                raise ValueError(f"dynamic_heads must be numbers from 0 to heads = {self.heads}, got {pattern}")
            object.__setattr__(self, "dynamic_heads", pattern)
        for name in ("layers", "heads", "width", "ffn_width", "key_value_heads", "head_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.vocabulary < 0:  # 0: blocks only
            raise ValueError(f"vocabulary must not be negative, got {self.vocabulary}")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.heads % self.groups:
            raise ValueError(f"heads must be a multiple of key_value_heads, got {self.heads} and {self.groups}")
        for name, usual in (("key_value_heads", self.heads), ("head_size", self.width / self.heads)):
            if getattr(self, name) == usual:  # so that what is the same compares as the same
                object.__setattr__(self, name, None)
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {tuple(NORMS)}, got {self.norm!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")
        if self.fused and (self.activation != "linear" or self.gated):
            raise ValueError(f"a fused FFN has no activation in between, got {self.activation!r}")
        if self.gated and self.activation == "bilinear":
            raise ValueError("a gated FFN without an activation is activation='linear', gated=True")

    @property
    def groups(self) -> int:
        """Keys and values, as many of each."""
        return self.key_value_heads or self.heads

    @property
    def size(self) -> int:
        """Of a head, d_k."""
        return self.head_size or self.width // self.heads

    @property
    def parts(self) -> list[str]:
        """Those of PARTS that a model with this kind of norm has."""
        return [part for part in PARTS if part == NORMS[self.norm] or part not in NORMS.values()]

    def heads_of_layer(self, layer: int) -> int:
        """How many heads of a layer weigh keys by queries; the rest are static."""
        return self.heads if self.dynamic_heads is None else self.dynamic_heads[layer % len(self.dynamic_heads)]

    def checked_length(self, context_length) -> int:
        """T as an int; ValueError if it is none, or not positive, or more than the positions."""
        length = whole_number("context_length", context_length)
        if length < 1:
            raise ValueError(f"context_length must be positive, got {length}")
        if self.positions is not None and length > self.positions:
            raise ValueError(f"context_length {length} exceeds the model's {self.positions} positions")
        return length

    @classmethod
    def of(cls, config) -> Architecture:
        """The architecture of the configuration of a model of one of MODEL_TYPES.

        Annealed LayerNorms count as the constants that they are after training.

        Rotary positions are public numbers and cost nothing, nor does a sliding window: what it hides is computed.

        Raises ValueError for what has no price: other model types, cross-attention, a tanh of the logits, an activation
        without a price, ... An `Architecture` made by hand can stand for a model whose operations are known to be the
        same.
        """

        def get(*names, default=None):
            return next((getattr(config, name) for name in names if hasattr(config, name)), default)

        if (kind := get("model_type")) is None:
            raise ValueError(f"a transformers configuration is needed; {type(config).__name__} lacks model_type")
        fused = get("fused_ffn", default=False)
        activation = "linear" if fused else get("activation_function", "hidden_activation", "hidden_act")
        activation = activation or get("hidden_act")  # of Gemma, whose first may be None
        if unpriced := [what for name, what in _UNPRICED.items() if get(name)]:
            raise ValueError(f"a model of type {kind!r} computes {unpriced[0]}, which has no price")
        kind = kind if kind in MODEL_TYPES else kind.removeprefix("entropy_")  # of `modeling_llama`
        if kind not in MODEL_TYPES:
            raise ValueError(
                f"a model of type {kind!r} with {activation!r} is not supported: known are the operations of "
                f"{', '.join(MODEL_TYPES)}; for another model pass an Architecture of the operations that it has"
            )
        if activation not in _NAMES:
            raise ValueError(f"activation {activation!r} is not supported; choose from {', '.join(_NAMES)}")
        width, heads = get("hidden_size"), get("num_attention_heads")
        inner = None if fused else get("n_inner", "ffn_dim", "intermediate_size")
        llama = kind in LLAMA_TYPES
        layer_norm, annealed = get("layer_norm", default=True), get("annealed_layer_norm", default=False)
        odd = {
            "cross-attention": (bool(get("add_cross_attention", default=False)), False),
            "attention scaled by layer": (bool(get("scale_attn_by_inverse_layer_idx", default=False)), False),
            "attention scaled by 1/√d": (bool(get("scale_attn_weights", default=True)), True),
            "causal attention": (get("is_causal", default=True), True),
            "LayerNorm before attention and FFN": (get("do_layer_norm_before", default=True), True),
            "a final LayerNorm": (not get("_remove_final_layer_norm", default=False), True),
            "LayerNorm with parameters": (get("layer_norm_elementwise_affine", default=True), True),
            "embedding width": (get("word_embed_proj_dim", default=width), width),
        }
        for name, (seen, wanted) in odd.items():
            if seen != wanted:
                raise ValueError(f"not supported: {name} {seen}; it must be {wanted}")
        return cls(
            layers=get("num_hidden_layers"), heads=heads, width=width, vocabulary=get("vocab_size"),
            layer_norm=layer_norm and not annealed,
            final_layer_norm=layer_norm and get("final_layer_norm", default=True), ffn_width=inner,
            activation=_NAMES[activation], attention=_ATTENTIONS[get("attention", default="softmax")], fused=fused,
            dynamic_heads=get("dynamic_heads"), value_residual=get("value_residual", default=False),
            scaled=get("ffn_scaling", default=False), tempered=get("learnable_temperature", default=False),
            positions=get("max_position_embeddings"), norm="rmsnorm" if llama else "layernorm", gated=llama,
            key_value_heads=get("num_key_value_heads"), head_size=get("head_dim"),
            query_key_norm=kind == "qwen3" and not annealed,
        )  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation of a pass: the part it belongs to, its name in `party` and in unit prices, its size.

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
        if self.name == "static":  # heads, T, d/heads
            return {"out": math.prod(self.shape)}
        elements = math.prod(self.shape)
        return {"element": elements, "row": elements // self.shape[-1]}


def operations(architecture: Architecture, context_length: int, logits_to_keep: int = 0) -> Iterator[Operation]:
    """The operations of one forward pass over T = context_length tokens, in order; copies and additions are free.

    `logits_to_keep` as in transformers: logits of the last so many tokens, 0 for all. A token that is generated needs
    one; after the layers, the rest of the pass is then of one row.

    FLOPs as in Tables 3, 4, 7 and 8, for which a multiplication and an addition are two: 16·T·d² (or 2·T·d² fused,
    plus T·d for β) and 8·T·d² + 3·T²·d, where QKᵀ is counted in full and AV for the visible half.

    Raises ValueError for a T that is no positive integer or is more than the architecture's positions.
    """
    length, kept = architecture.checked_length(context_length), whole_number("logits_to_keep", logits_to_keep)
    if not 0 <= kept <= length:
        raise ValueError(f"logits_to_keep must be from 0 to {length}, got {kept}")
    return _operations(architecture, length, kept or length)


def _operations(architecture: Architecture, context_length: int, kept: int) -> Iterator[Operation]:
    a, t, d = architecture, context_length, architecture.width
    size, norm = a.size, Operation(NORMS[a.norm], a.norm, (t, d))
    if a.vocabulary:
        yield Operation("embedding", "embed", (t, a.vocabulary, d))
    for layer in range(a.layers):

        def linear(part, inputs, outputs, flops=0, layer=layer):
            return Operation(part, "linear", (t, inputs, outputs), layer, 2 * t * inputs * outputs + flops)

        if a.layer_norm:
            yield replace(norm, layer=layer)
        dynamic = a.heads_of_layer(layer)
        keys = min(dynamic, a.groups)  # of groups without a dynamic head none are needed
        static, width = a.heads - dynamic, dynamic * size
        yield linear("attention linear", d, width + (keys + a.groups) * size)
        if a.query_key_norm and dynamic:
            yield Operation("RMSNorm", "rmsnorm", (dynamic + keys, t, size), layer)
            rows = (dynamic + keys) * t  # turned before they meet a matrix, so that their gain is one of its own
            yield Operation("attention linear", "linear", (rows, size, size), layer)
        if a.tempered and dynamic:
            yield Operation("attention linear", "multiply", (dynamic, t, size), layer)
        if dynamic:
            yield Operation("attention linear", "scores", (dynamic, t, size), layer, 2 * t * t * width)
            yield Operation("softmax", a.attention, (dynamic, t, t), layer)
            yield Operation("attention linear", "mix", (dynamic, t, size), layer, t * t * width)
        if static:
            yield Operation("attention linear", "static", (static, t, size), layer, t * t * static * size)
        yield linear("attention linear", a.heads * size, d)
        if a.layer_norm:
            yield replace(norm, layer=layer)
        scaling = t * d if a.scaled else 0
        if not a.fused:
            yield linear("FFN linear", d, 2 * a.ffn_width if a.gated or a.activation == "bilinear" else a.ffn_width)
            if a.activation != "linear":
                yield Operation("activation", a.activation, (t, a.ffn_width), layer)
            if a.gated:
                yield Operation("activation", "bilinear", (t, a.ffn_width), layer)
        yield linear("FFN linear", d if a.fused else a.ffn_width, d, scaling)
        if a.scaled and a.layer_norm:  # without LayerNorm β goes into the weights
            yield Operation("FFN linear", "multiply", (t, d), layer)
    if a.vocabulary:
        if a.final_layer_norm:
            yield replace(norm, shape=(kept, d))
        yield Operation("vocabulary projection", "linear", (kept, d, a.vocabulary))
