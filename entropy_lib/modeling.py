"""GPT-2 with the paper's surgery: normalisation and activation removed, FFN scaled and fused, softmax tempered.

A variant is what `EntropyGPT2Config` says in plain fields, so that a saved model rebuilds itself. Everything not
mentioned here is transformers' own GPT-2: cache, generation, checkpointing, compilation, Trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, eager_attention_forward
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, install_output_capuring_hook

from entropy_lib.annealed_layer_norm import AnnealedLayerNorm
from entropy_lib.entropy import pad_heads
from entropy_lib.interface import attend, no_mask, visible_keys
from entropy_lib.static_heads import StaticHeads
from entropy_lib.variants import ATTENTIONS, NORM_PLACEMENTS, Variant, get_variant
from entropy_lib.weight_normalization import iterate_spectral_norms, normalize_weights

# Saved beside a model: what its config's auto_map names, for processes that have not imported entropy_lib.
LOADER = '''"""This model's classes, for from_pretrained(..., trust_remote_code=True)."""

try:
    from {module} import {config}, {model}  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("this model's classes are those of entropy_lib: install it, then load the model again") from error
'''


def save_loader(folder, module: str, config: str, model: str) -> dict[str, str]:
    """Write that file for classes of `module` into the folder; returns the auto_map."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    name = "modeling_" + config.removesuffix("Config").replace("Entropy", "entropy_").lower()
    text = LOADER.format(module=module, config=config, model=model)
    (Path(folder) / f"{name}.py").write_text(text, encoding="utf-8")
    return {"AutoConfig": f"{name}.{config}", "AutoModelForCausalLM": f"{name}.{model}"}


class EntropyGPT2Config(GPT2Config):
    """GPT-2's configuration plus the fields of `Variant`, and where its parameters start.

    Args (beside GPT-2's; dropout is 0 by default, since attention after dropout has no entropy):
        variant: the paper's name, a label; the fields below are what counts.
        layer_norm, fused_ffn, weight_normalization, norm_placement, ffn_scaling, learnable_temperature,
            entropy_regularization, dynamic_heads, attention, annealed_layer_norm, final_layer_norm, value_residual,
            ffn_multiple: see `Variant`. `activation_function` "linear" removes the activation.
        temperature_init: t of every head and position at the start (1e-2 for CodeParrot, 1e-1 for Languini).
        threshold_init: θ of every head at the start.
        scaled_residual_init: the projections into the residual stream (`c_proj` of attention and of the d→4d→d FFN)
            start at std 0.02/√(2L), as GPT-2's do; False: at 0.02, as every other matrix.
        folded: set by `fold_for_inference`; α is gone and the temperature is a constant.
    """

    model_type = "entropy_gpt2"

    variant: str = "SM+LN+G"
    layer_norm: bool = True
    fused_ffn: bool = False
    weight_normalization: str | None = None
    norm_placement: str | None = None
    ffn_scaling: bool = False
    learnable_temperature: bool = False
    entropy_regularization: bool = False
    dynamic_heads: tuple[int, ...] | list[int] | None = None
    attention: str = "softmax"
    annealed_layer_norm: bool = False
    final_layer_norm: bool = True
    value_residual: bool = False
    ffn_multiple: int = 4
    temperature_init: float = 1e-2
    threshold_init: float = 0.5
    scaled_residual_init: bool = True
    folded: bool = False
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.attn_pdrop:
            raise ValueError(f"attn_pdrop must be 0: attention after dropout has no entropy; got {self.attn_pdrop}")
        if self.weight_normalization not in (None, "weight", "spectral"):
            raise ValueError(
                f"weight_normalization must be None, 'weight' or 'spectral', got {self.weight_normalization!r}"
            )
        if self.weight_normalization and self.norm_placement not in NORM_PLACEMENTS:
            raise ValueError(f"norm_placement must be one of {NORM_PLACEMENTS}, got {self.norm_placement!r}")
        if self.weight_normalization and self.fused_ffn:
            raise ValueError(
                "weight and spectral normalisation are defined for the two FFN matrices, not the fused one"
            )
        if not self.temperature_init > 0:
            raise ValueError(f"temperature_init must be positive, got {self.temperature_init}")
        if self.add_cross_attention:
            raise ValueError("the paper's variants are decoder-only; add_cross_attention must be False")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")
        if self.attention != "softmax" and (self.learnable_temperature or self.entropy_regularization):
            raise ValueError(f"only a softmax has a temperature and an entropy, got attention {self.attention!r}")
        if self.annealed_layer_norm and not self.layer_norm:
            raise ValueError("annealed_layer_norm needs layer_norm: there is none to anneal")
        if self.ffn_multiple != 4 and self.fused_ffn:
            raise ValueError(f"a fused FFN has no width of its own, got ffn_multiple {self.ffn_multiple}")
        if self.n_inner is None and self.ffn_multiple != 4:
            self.n_inner = self.ffn_multiple * self.n_embd
        pattern = self.dynamic_heads
        if pattern is not None and (
            not isinstance(pattern, (tuple, list))
            or not pattern
            or not all(isinstance(n, int) and 0 <= n <= self.n_head for n in pattern)
        ):
            raise ValueError(
                f"dynamic_heads must be numbers from 0 to n_head = {self.n_head} by layer, got {pattern!r}"
            )

    def heads_of_layer(self, layer: int) -> int:
        """How many heads of a layer weigh keys by queries; the rest are static."""
        pattern = self.dynamic_heads
        return self.n_head if pattern is None else pattern[layer % len(pattern)]

    def entropy_heads(self) -> list[int]:
        """How many heads of each layer have an entropy: those with a softmax, the first of the layer."""
        if self.attention != "softmax":
            return [0] * self.n_layer
        return [self.heads_of_layer(layer) for layer in range(self.n_layer)]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and a file beside it with which `trust_remote_code=True` finds the classes."""
        self.auto_map = save_loader(
            save_directory, "entropy_lib.modeling", "EntropyGPT2Config", "EntropyGPT2LMHeadModel"
        )
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: saving would then copy this module, which is not a model's code without the rest of the package."""


class FusedFFN(nn.Module):
    """FFN(X) = X·W + b with W in R^{d×d}: the d→4d→d pair without a nonlinearity in between, as one matrix.

    W starts at std 0.02 without GPT-2's 1/√(2L) on residual projections: it stands for both matrices.
    """

    def __init__(self, config: EntropyGPT2Config):
        super().__init__()
        self.c_proj = Conv1D(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(hidden_states))


class EntropyGPT2Attention(GPT2Attention):
    """A(t) = softmax(QKᵀ/(t·√d_k) + M), row i of head h using t[h, i] (Appendix A); t = 1 without SM(t).

    t is stored as log t, so that it stays positive, and looked up by position id, so that it is right under a
    key-value cache and with left padding. θ is `reg_threshold_weights`, [H], the published code's name for it.

    With `dynamic_heads`, only the first so many heads have queries and keys; the rest are `static`. With attention
    "relu2" their weights are max(z, 0)²/(number of visible keys) (as ReLU attention, arXiv 2309.08586) and have no
    entropy. With `value_residual`, V ← a·V + b·V of layer 0, two scalars a layer (arXiv 2410.17897).
    """

    def __init__(self, config: EntropyGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.dynamic = config.heads_of_layer(layer_idx)
        self.static = None
        if self.dynamic < config.n_head:
            self.static = StaticHeads(config.n_head - self.dynamic, config.n_positions)
            self.c_attn = Conv1D(2 * self.dynamic * self.head_dim + self.embed_dim, self.embed_dim)
        if config.value_residual and layer_idx:
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))
        shape = (self.dynamic, config.n_positions)
        if config.learnable_temperature and config.folded:
            self.register_buffer("query_scale", torch.full(shape, 1 / config.temperature_init))
        elif config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.full(shape, math.log(config.temperature_init)))
        if config.entropy_regularization and not config.folded:
            self.reg_threshold_weights = nn.Parameter(torch.full((self.dynamic,), config.threshold_init))

    def _temper(self, query: Tensor, position_ids: Tensor | None) -> Tensor:
        """Q/t: dividing the queries is dividing their row of logits, whatever computes the attention."""
        if position_ids is None:
            raise ValueError("a learnable temperature is looked up by position: pass position_ids")
        scale = self.query_scale if self.config.folded else torch.exp(-self.log_temperature)  # [H, n_positions]
        scale = scale[:, position_ids].transpose(0, 1)[..., None]  # [1 or B, H, T, 1]
        return (query * scale).to(query.dtype)

    def _cached(self, cache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the cache's before them. Caches want as many of both: here [B, 1, T, heads·d_k]."""
        if self.static is None:
            return cache.update(key, value, self.layer_idx)
        key, value = (x.transpose(1, 2).flatten(2)[:, None] for x in (key, value))
        if not self.dynamic:  # an empty tensor would say that nothing is cached
            key = value[..., :1]
        key, value = cache.update(key, value, self.layer_idx)
        key = key[..., : self.dynamic * self.head_dim]
        return tuple(x[:, 0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (key, value))

    def _mix_values(self, value: Tensor, first_values: OfPass) -> Tensor:
        if self.layer_idx == 0:
            first_values.values = [value]
            return value
        own, first = self.value_mix.to(value.dtype)
        return own * value + first * first_values.values[0]

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        output_entropies: bool = False,
        first_values: OfPass | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, T, d] -> output [B, T, d], attention weights (eager only), entropy [B, H, T] in nats if asked for.

        H counts the softmax heads. `first_values` is the pass's own, where layer 0 leaves its values.
        """
        query_len, dynamic, implementation = hidden_states.shape[1], self.dynamic, self.config._attn_implementation
        sizes = [dynamic * self.head_dim, dynamic * self.head_dim, self.embed_dim]
        query, key, value = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.c_attn(hidden_states).split(sizes, 2)
        )
        if self.config.value_residual:
            value = self._mix_values(value, first_values)
        if self.config.learnable_temperature:
            query = self._temper(query, kwargs.get("position_ids"))
        if past_key_values is not None:
            key, value = self._cached(past_key_values, key, value)

        entropy = attention_weights = None
        if output_entropies and implementation not in ("entropy_on_request", "entropy", "sdpa", "eager"):
            raise ValueError(
                "output_entropies needs attn_implementation 'entropy', 'sdpa' or 'eager', whose masks it can "
                f"read; got {implementation!r}. Call model.set_attn_implementation('entropy')."
            )
        outputs = []
        softmax = dynamic if self.config.attention == "softmax" else 0
        if softmax and output_entropies:
            output, entropy = attend(self, query, key, value[:, :dynamic], attention_mask, scaling=self.scaling)
            outputs.append(output)
        elif softmax:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            output, attention_weights = attention(
                self, query, key, value[:, :dynamic], attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
            )
            outputs.append(output)
        elif output_entropies:
            entropy = query.new_zeros(query.shape[0], 0, query_len)
        if softmax < self.num_heads:
            visible = visible_keys(self, attention_mask, query, value.shape[2])
            if dynamic and not softmax:
                outputs.append(self._relu2(query, key, value[:, :dynamic], visible).transpose(1, 2))
            if self.static is not None:
                outputs.append(self.static(value[:, dynamic:], query_len, visible).transpose(1, 2))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)  # [B, T, H, d_k]
        output = self.c_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return self.resid_dropout(output), attention_weights, entropy

    def _relu2(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        if visible is None:
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            visible = visible.tril(key.shape[2] - query.shape[2])
        weights = nn.functional.relu(query @ key.transpose(-1, -2) * self.scaling).square()
        keys = visible.sum(-1, keepdim=True).clamp(min=1).to(weights.dtype)
        return weights.masked_fill(~visible, 0) / keys @ value


class EntropyGPT2Block(GPT2Block):
    """One layer (Table 1), LN and the activation σ inside FFN present or not as the variant says:

    X_SA  = X + MHA(LN(X))
    X_out = X_SA + FFN(LN(X_SA)),                FFN(X) = σ(X·W_in)·W_out
    X_out = β·X_SA + (1/α)·FFN(X_SA)             with scaling (Eq. 8), one α and β a layer

    Annealed LayerNorms leave their penalties in the pass's own `norm_penalties`.
    """

    def __init__(self, config: EntropyGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.attn = EntropyGPT2Attention(config, layer_idx=layer_idx)
        if not config.layer_norm or (config.annealed_layer_norm and config.folded):
            self.ln_1, self.ln_2 = nn.Identity(), nn.Identity()
        elif config.annealed_layer_norm:
            self.ln_1, self.ln_2 = (AnnealedLayerNorm(config.n_embd, config.layer_norm_epsilon) for _ in range(2))
        if config.fused_ffn:
            self.mlp = FusedFFN(config)
        if config.ffn_scaling:
            self.beta = nn.Parameter(torch.ones(()))
            if not config.folded:
                self.alpha = nn.Parameter(torch.ones(()))
        self.scaled = config.ffn_scaling

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        norm_penalties: OfPass | None = None,
        **kwargs,
    ) -> Tensor:
        attention_output = self.attn(
            _normed(self.ln_1, hidden_states, norm_penalties),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )[0]
        hidden_states = hidden_states + attention_output
        ffn_output = self.mlp(_normed(self.ln_2, hidden_states, norm_penalties))
        if not self.scaled:
            return hidden_states + ffn_output
        if not self.attn.config.folded:
            ffn_output = ffn_output / self.alpha
        return self.beta * hidden_states + ffn_output


class OfPass:
    """What blocks leave in one pass. No list: of a list among a block's arguments FSDP makes a copy."""

    def __init__(self):
        self.values: list[Tensor] = []

    def mean(self) -> Tensor | None:
        return torch.stack(self.values).mean() if self.values else None


def _normed(norm: nn.Module, x: Tensor, penalties: OfPass | None) -> Tensor:
    if not isinstance(norm, AnnealedLayerNorm):
        return norm(x)
    x, penalty = norm(x)
    if penalties is not None:
        penalties.values.append(penalty)
    return x


class _CapturingHook:
    """The forward hook with which transformers collects an output; its own is a closure, which cannot be pickled."""

    def __init__(self, key: str, index: int = 0):
        module = nn.Module()
        install_output_capuring_hook(module, key, index)
        (self.hook,) = module._forward_hooks.values()
        self.arguments = key, index

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        return self.hook(module, args, output)

    def __reduce__(self):
        return type(self), self.arguments


def _require_grad(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_(True)


class EntropyGPT2Model(GPT2Model):
    """GPT-2's body with `EntropyGPT2Block`s; without LayerNorm the final one is gone as well."""

    config: EntropyGPT2Config
    _no_split_modules = ["EntropyGPT2Block"]
    _can_record_outputs = {
        **GPT2Model._can_record_outputs,
        "hidden_states": EntropyGPT2Block,
        "entropies": OutputRecorder(EntropyGPT2Attention, index=2),
    }

    def __init__(self, config: EntropyGPT2Config):
        super().__init__(config)
        self.h = nn.ModuleList([EntropyGPT2Block(config, layer_idx=i) for i in range(config.n_layer)])
        if not config.layer_norm or not config.final_layer_norm:
            self.ln_f = nn.Identity()
        self.post_init()
        handles = []
        if config.weight_normalization and not config.folded:
            for block in self.h:  # after the initialisation, which writes plain weights
                normalize_weights(block, config)
            handles.append(self.register_forward_pre_hook(iterate_spectral_norms))
        for block in self.h:  # not at the first request, where it would break torch.compile's graph
            handles.append(block.register_forward_hook(_CapturingHook("hidden_states")))
            handles.append(block.attn.register_forward_hook(_CapturingHook("attentions", 1)))
            handles.append(block.attn.register_forward_hook(_CapturingHook("entropies", 2)))
        self._output_capturing_hooks_installed = True
        self._hook_handles = handles  # unpickled, they keep a later hook from getting the number of one of these

    def forward(self, *args, **kwargs):
        """As GPT2Model's, with what a pass's layers hand to each other."""
        if self.config.value_residual:
            kwargs["first_values"] = OfPass()
        return super().forward(*args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As transformers', which takes a custom model's modules for initialised if no parameter is directly theirs.

        So GPT-2's attention and FFN, which scale their projections, would be passed over. The blocks that GPT2Model
        makes are thrown away and stay so: their draws would shift those of the blocks that are kept.
        """
        kept = any(isinstance(block, EntropyGPT2Block) for block in self.h)
        super()._initialize_weights(module, is_custom_code and not kept)

    def _init_weights(self, module: nn.Module) -> None:
        if self.config.scaled_residual_init or not isinstance(module, (GPT2Attention, GPT2MLP)):
            super()._init_weights(module)


@dataclass
class EntropyCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """transformers' causal-LM output plus `entropies`: one [B, H, T] tensor a layer, nats, if asked for.

    H counts a layer's softmax heads. `norm_penalty`: the annealed LayerNorms' mean penalty, a scalar, in training.
    """

    entropies: tuple[Tensor, ...] | None = None
    norm_penalty: Tensor | None = None


class EntropyGPT2LMHeadModel(GPT2LMHeadModel):
    """A language model of any of the paper's variants, with its attention entropies on request.

    `model(input_ids, output_entropies=True).entropies` holds one differentiable [B, H, T] tensor a layer.
    """

    config: EntropyGPT2Config
    config_class = EntropyGPT2Config
    _no_split_modules = ["EntropyGPT2Block"]

    def __init__(self, config: EntropyGPT2Config):
        super(GPT2LMHeadModel, self).__init__(config)
        self.transformer = EntropyGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # labels are shifted: the Trainer counts T-1 targets a sequence, not T
        self.post_init()
        if config._attn_implementation == "sdpa":
            self.set_attn_implementation("entropy_on_request")  # sdpa, with masks that suit the fused kernel too

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_entropies: bool | None = None,
        **kwargs,
    ) -> EntropyCausalLMOutput:
        """As GPT2LMHeadModel.forward; `output_entropies=True` adds `entropies` to the output.

        Raises ValueError if the input is longer than the model's positions.
        """
        ids_or_embeds = input_ids if input_ids is not None else inputs_embeds
        length = ids_or_embeds.shape[1]
        if past_key_values is not None and not torch.compiler.is_compiling():
            length = length + int(past_key_values.get_seq_length())
        if length > self.config.n_positions:
            raise ValueError(f"input of {length} tokens exceeds the model's {self.config.n_positions} positions")
        plain = attention_mask is None and position_ids is None and past_key_values is None
        if plain and self.config._attn_implementation in ("entropy_on_request", "entropy"):
            attention_mask = no_mask(ids_or_embeds.device)
        penalties = OfPass()
        if self.config.annealed_layer_norm and self.training:
            kwargs["norm_penalties"] = penalties
        body = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_entropies=bool(output_entropies),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(body.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            kwargs.pop("norm_penalties", None)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return EntropyCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            entropies=body.get("entropies"),
            norm_penalty=penalties.mean(),
        )

    def generate(self, *args, output_entropies: bool | None = None, **kwargs):
        """As GenerationMixin.generate, which passes on no entropies: ValueError where they are asked for."""
        if output_entropies:
            raise ValueError(
                "generate returns no entropies: `with record_entropy(model) as recorder: model.generate(...)` keeps "
                "them in recorder.passes, one list a forward pass: the prompt's, then one a new token"
            )
        return super().generate(*args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """As transformers' (gradient checkpointing calls it), with a hook that can be pickled."""
        hooks = self.get_input_embeddings()._forward_hooks
        before = set(hooks)
        super().enable_input_require_grads()
        hooks.update(dict.fromkeys(hooks.keys() - before, _require_grad))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """As transformers'; ValueError for reentrant checkpoints where layers hand values to each other."""
        shares = self.config.value_residual or self.config.annealed_layer_norm
        if shares and (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("value residuals and annealed LayerNorm need use_reentrant=False: gradients would be lost")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def entropy_thresholds(self) -> Tensor | None:
        """θ, [L, H], with gradients; None if the variant is not regularised.

        H is the most softmax heads that a layer has; NaN fills the rows of layers that have fewer.
        """
        return self._stack_layers(lambda block: getattr(block.attn, "reg_threshold_weights", None))

    def temperatures(self) -> Tensor | None:
        """t, [L, H, n_positions], H as in `entropy_thresholds`; None if the variant has none."""
        logs = self._stack_layers(lambda block: getattr(block.attn, "log_temperature", None))
        return None if logs is None else logs.exp()

    def ffn_scales(self) -> tuple[Tensor, Tensor] | None:
        """α and β, [L] each; None if the variant has none."""
        blocks = self.transformer.h
        if not hasattr(blocks[0], "alpha"):
            return None
        return torch.stack([block.alpha for block in blocks]), torch.stack([block.beta for block in blocks])

    def _stack_layers(self, get) -> Tensor | None:
        values = [get(block) for block in self.transformer.h]
        if values[0] is None:
            return None
        most = max(self.config.entropy_heads())
        return torch.stack([pad_heads(value, most) for value in values])


AutoConfig.register(EntropyGPT2Config.model_type, EntropyGPT2Config)
AutoModelForCausalLM.register(EntropyGPT2Config, EntropyGPT2LMHeadModel)

MODEL_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 64, "n_positions": 128, "vocab_size": 2048},
    "small": {"n_layer": 6, "n_head": 8, "n_embd": 256, "n_positions": 128, "vocab_size": 8192},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-18l": {"n_layer": 18, "n_head": 12, "n_embd": 768},
    "350M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "1.3B": {"n_layer": 24, "n_head": 16, "n_embd": 2048},
    "1.9B": {"n_layer": 24, "n_head": 20, "n_embd": 2560},
    "3.2B": {"n_layer": 24, "n_head": 26, "n_embd": 3328},
}


def build_model(variant: str | Variant, size: str = "tiny", **config) -> EntropyGPT2LMHeadModel:
    """A freshly initialised model of one of the paper's variants.

    Args:
        variant: a name in `VARIANTS`, or a `Variant`.
        size: "tiny" (4 layers, 4 heads, d=64; seconds on a CPU), "small" (6/8/256), "gpt2" (12/12/768),
            "gpt2-18l" (18/12/768, Table 8), "350M" (24/16/1024), "1.3B" (24/16/2048), "1.9B" (24/20/2560) or "3.2B"
            (24/26/3328; with a fused FFN 1.4 billion parameters). Those four are called by SM+LN+G's parameters.
        **config: any field of `EntropyGPT2Config`, e.g. vocab_size, n_positions, norm_placement="QK+FFN".
    """
    variant = get_variant(variant)
    if size not in MODEL_SIZES:
        raise ValueError(f"unknown size {size!r}; choose from {', '.join(MODEL_SIZES)}")
    if placement := config.pop("norm_placement", None):
        variant = variant.placed(placement)
    fields = {"bos_token_id": None, "eos_token_id": None, **variant.config_fields(), **MODEL_SIZES[size], **config}
    return EntropyGPT2LMHeadModel(EntropyGPT2Config(**fields))
