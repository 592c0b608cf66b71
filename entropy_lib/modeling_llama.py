"""Llama, Mistral, Qwen2, Qwen3 and Gemma with static heads and norms that become constants; else transformers' own.

What is changed is in plain fields of the configuration, so that a saved model rebuilds itself.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy_lib.annealed_layer_norm import AnnealedRMSNorm
from entropy_lib.entropy import pad_heads
from entropy_lib.interface import attend, visible_keys
from entropy_lib.modeling import EntropyCausalLMOutput, OfPass, save_loader
from entropy_lib.static_heads import StaticHeads

KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}


class _EntropyLlamaConfig:
    """beside the stock fields `softmax_heads`, by layer the numbers of the heads that weigh keys by queries (None: all;
    the rest are static, with filters of `static_positions` distances), `annealed_layer_norm` (all norms but the last
    become constants in training), `entropy_regularization` (a threshold θ a softmax head, which starts at
    `threshold_init`)."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        heads = self.softmax_heads
        if heads is not None and (
            len(heads) != self.num_hidden_layers
            or not all(sorted(set(layer)) == list(layer) for layer in heads)
            or not all(0 <= head < self.num_attention_heads for layer in heads for head in layer)
        ):
            raise ValueError(
                f"softmax_heads must be, for each of {self.num_hidden_layers} layers, ascending numbers from 0 to "
                f"{self.num_attention_heads - 1}, got {heads!r}"
            )
        if self.attention_dropout:
            raise ValueError(f"attention_dropout must be 0: attention after dropout has no entropy; got "
                             f"{self.attention_dropout}")  # fmt: skip

    def heads_of_layer(self, layer: int) -> list[int]:
        return list(range(self.num_attention_heads)) if self.softmax_heads is None else list(self.softmax_heads[layer])

    def entropy_heads(self) -> list[int]:
        """How many heads of each layer have an entropy: those with a softmax."""
        return [len(self.heads_of_layer(layer)) for layer in range(self.num_hidden_layers)]

    @property
    def dynamic_heads(self) -> tuple[int, ...]:
        return tuple(self.entropy_heads())

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and a file beside it with which `trust_remote_code=True` finds the classes."""
        model = type(self).__name__.removesuffix("Config") + "ForCausalLM"
        self.auto_map = save_loader(save_directory, "entropy_lib.modeling_llama", type(self).__name__, model)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: saving would then copy this module, which is not a model's code without the rest of the package."""


class _EntropyLlamaAttention:
    """Stock attention for the softmax heads, `StaticHeads` for the others, which have values but no queries or keys.

    The projections keep the stock shapes; the rows of static heads' queries are not used.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, group = config.heads_of_layer(layer_idx), self.num_key_value_groups
        static = [head for head in range(config.num_attention_heads) if head not in heads]
        self.softmax, self.static_numbers = heads, static
        self.keys = [head // group for head in heads]
        self.values = [head // group for head in static]
        order = sorted(range(len(heads + static)), key=(heads + static).__getitem__)
        self.order = order if static and heads else None  # back to the order of the output's projection
        self.static = StaticHeads(len(static), config.static_positions) if static else None
        if static:
            self.num_key_value_groups = 1  # keys and values are handed over by head
        if config.entropy_regularization:
            self.reg_threshold_weights = nn.Parameter(torch.full((len(heads),), config.threshold_init))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
        past_key_values=None, entropies: OfPass | None = None, nothing_hidden: bool = False, **kwargs,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As the stock layer's; the pass's `entropies` are given this layer's, [B, h, T] in nats.

        `nothing_hidden` promises a mask that is plainly causal but for a sliding window.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part(hidden_states).view(shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self.stock.apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        outputs, weights, entropy = [], None, None
        if self.softmax:
            of_heads = (query, key, value)
            if self.static is not None:
                of_heads = query[:, self.softmax], key[:, self.keys], value[:, self.keys]
            if entropies is not None:
                output, entropy = attend(self, *of_heads, attention_mask, scaling=self.scaling)
            else:
                implementation = self.config._attn_implementation
                attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.stock.eager_attention_forward)
                if getattr(self, "sliding_window", None):
                    kwargs["sliding_window"] = self.sliding_window
                output, weights = attention(
                    self, *of_heads, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
                )
            outputs.append(output)
        elif entropies is not None:
            entropy = query.new_zeros(query.shape[0], 0, query.shape[2])
        if self.static is not None:
            window, visible = getattr(self, "sliding_window", None), None
            if not nothing_hidden or (window and value.shape[2] > window):
                visible = visible_keys(self, attention_mask, query, value.shape[2])
            outputs.append(self.static(value[:, self.values], query.shape[2], visible).transpose(1, 2))
        if entropies is not None:
            entropies.values.append(entropy)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)  # [B, T, H, d_k]
        if self.order is not None:
            output = output[:, :, self.order]
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class _EntropyLlama:
    """A stock causal model whose layers are changed as its configuration says, with entropies on request.

    `model(input_ids, output_entropies=True).entropies` holds one differentiable [B, h, T] tensor a layer, h being its
    softmax heads in ascending order. Raises ValueError for inputs longer than the static heads' filters.
    """

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = self.attention_class(config, index)
            if config.annealed_layer_norm:
                places = [(layer, "input_layernorm"), (layer, "post_attention_layernorm")]
                if hasattr(layer.self_attn, "q_norm"):
                    places += [(layer.self_attn, "q_norm"), (layer.self_attn, "k_norm")]
                for holder, name in places:
                    width = getattr(holder, name).weight.shape[0]
                    norm = AnnealedRMSNorm(width, config.rms_norm_eps, one_plus=config.model_type == "entropy_gemma")
                    setattr(holder, name, norm)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values=None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, output_entropies: bool | None = None, **kwargs,
    ) -> EntropyCausalLMOutput:  # fmt: skip
        """As the stock model's; `output_entropies=True` adds `entropies`, training of annealed norms `norm_penalty`."""
        entropies = OfPass()
        if output_entropies:
            kwargs["entropies"] = entropies
        # Under torch.compile transformers builds the whole mask, and static heads would gather weights by it.
        kwargs["nothing_hidden"] = attention_mask is None and position_ids is None and past_key_values is None
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        penalties = []
        if self.training:
            penalties = [module.take_penalty() for module in self.modules() if isinstance(module, AnnealedRMSNorm)]
        return EntropyCausalLMOutput(
            **output,
            entropies=tuple(entropies.values) if output_entropies else None,
            norm_penalty=torch.stack(penalties).mean() if penalties else None,
        )

    def entropy_thresholds(self) -> Tensor | None:
        """θ, [L, H], with gradients; None if there are none. NaN fills the rows of layers with fewer softmax heads."""
        if not self.config.entropy_regularization:
            return None
        most = max(self.config.entropy_heads())
        return torch.stack([pad_heads(layer.self_attn.reg_threshold_weights, most) for layer in self.model.layers])

    def temperatures(self) -> None:
        """None: these models have no learnable temperature."""

    def ffn_scales(self) -> None:
        """None: these models have no α and β."""


def _of_kind(kind: str, name: str) -> dict[str, type]:
    """The classes of one family, by name."""
    stock = import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = getattr(import_module(f"transformers.models.{kind}.configuration_{kind}"), f"{name}Config")
    fields = {
        "softmax_heads": (list | None, None), "static_positions": (int, 0), "annealed_layer_norm": (bool, False),
        "entropy_regularization": (bool, False), "threshold_init": (float, 0.5),
    }  # fmt: skip
    sizes = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
             "n_positions": "max_position_embeddings"}  # fmt: skip
    described = {
        "__module__": __name__, "__doc__": f"{name}'s configuration, {_EntropyLlamaConfig.__doc__}",
        "__annotations__": {field: kind_ for field, (kind_, _) in fields.items()},
        **{field: default for field, (_, default) in fields.items()},
        "model_type": f"entropy_{kind}", "attribute_map": {**config.attribute_map, **sizes},
    }  # fmt: skip
    changed_config = type(f"Entropy{name}Config", (_EntropyLlamaConfig, config), described)
    attention = type(
        f"Entropy{name}Attention", (_EntropyLlamaAttention, getattr(stock, f"{name}Attention")),
        {"__module__": __name__, "stock": stock},
    )  # fmt: skip
    model = type(
        f"Entropy{name}ForCausalLM", (_EntropyLlama, getattr(stock, f"{name}ForCausalLM")),
        {"__module__": __name__, "__doc__": _EntropyLlama.__doc__, "config_class": changed_config,
         "attention_class": attention},
    )  # fmt: skip
    AutoConfig.register(changed_config.model_type, changed_config)
    AutoModelForCausalLM.register(changed_config, model)
    return {made.__name__: made for made in (changed_config, attention, model)}


for _kind, _name in KINDS.items():
    globals().update(_of_kind(_kind, _name))
