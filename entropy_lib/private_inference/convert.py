"""A pretrained decoder changed for private inference by a plan: constant norms, ReLU, static heads; then fine-tune."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from entropy_lib import modeling_llama
from entropy_lib.modeling import EntropyGPT2Config, EntropyGPT2LMHeadModel
from entropy_lib.private_inference.plan import HeadPlan

# What a converted model has beside the weights it takes over.
_OWN = re.compile(r"\.(static\.filter|blend|log_scale|seen|reg_threshold_weights)$")


def convert_for_private_inference(
    model: PreTrainedModel, plan: HeadPlan, *, entropy_regularization: bool = False
) -> PreTrainedModel:
    """A changed copy of a stock GPT-2, Llama, Mistral, Qwen2, Qwen3 or Gemma, to be fine-tuned by `fine_tune`.

    Heads that lose their softmax become `StaticHeads` and start from their own mean attention by distance, which the
    plan measured; distances beyond it start at 0, or are refused (Llama's kind). Norms but the last start as they are
    and become constants during training (`Recipe.anneal_start`, `anneal_end`). The activation is ReLU at once. All else
    is untouched: with nothing to change the logits are the same.

    The copy is an `EntropyGPT2LMHeadModel` (softmax heads first in each layer) or a class of `modeling_llama`, saved
    and loaded like any model, on the same device and in the same precision. With `entropy_regularization` each softmax
    head gets a threshold θ.

    Raises ValueError for other models, a plan of another shape, and a plan longer than a sliding window.
    """
    config, kind = model.config, model.config.model_type
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if len(plan.keep) != layers or any(len(layer) != heads for layer in plan.keep):
        shape = f"{len(plan.keep)} layers of {len(plan.keep[0])} heads"
        raise ValueError(f"the plan is for {shape}, the model has {layers} of {heads}")
    with torch.random.fork_rng(devices=[]):  # what is drawn for new weights is replaced
        if kind in modeling_llama.KINDS and type(model).__name__ == f"{modeling_llama.KINDS[kind]}ForCausalLM":
            converted = _llama(model, plan, entropy_regularization)
        elif type(model) in (GPT2LMHeadModel, EntropyGPT2LMHeadModel):
            converted = _gpt2(model, plan, entropy_regularization)
        else:
            known = ", ".join(["GPT2LMHeadModel", *(f"{name}ForCausalLM" for name in modeling_llama.KINDS.values())])
            raise ValueError(f"{type(model).__name__} cannot be converted; these can: {known}")
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.to(model.device).train(model.training)


def _llama(model: PreTrainedModel, plan: HeadPlan, regularized: bool) -> PreTrainedModel:
    name, length = modeling_llama.KINDS[model.config.model_type], plan.statistics.by_distance[0].shape[-1]
    window = getattr(model.config, "sliding_window", None)
    if window and window < length and "full_attention" not in set(getattr(model.config, "layer_types", None) or ["?"]):
        raise ValueError(f"the plan is for {length} tokens, more than the model's sliding window of {window}")
    static = not all(map(all, plan.keep))
    kept = [[head for head, keep in enumerate(layer) if keep] for layer in plan.keep]
    fields = {
        **_plain(model.config),
        "softmax_heads": kept if static else None,
        "static_positions": length if static else 0,
        "annealed_layer_norm": plan.constant_norms,
        "entropy_regularization": regularized,
    }
    if plan.relu:
        fields |= {field: "relu" for field in ("hidden_act", "hidden_activation") if field in fields}
    config = getattr(modeling_llama, f"Entropy{name}Config")(**fields)
    converted = getattr(modeling_llama, f"Entropy{name}ForCausalLM")(config)
    _take_over(converted, model.state_dict())
    for layer, keep, filters in zip(converted.model.layers, plan.keep, plan.statistics.by_distance, strict=True):
        _start_filter(layer.self_attn.static, filters, keep)
    return converted


def _gpt2(model: PreTrainedModel, plan: HeadPlan, regularized: bool) -> EntropyGPT2LMHeadModel:
    config, size = model.config, model.config.n_embd // model.config.n_head
    counts = [sum(layer) for layer in plan.keep]
    fields = {name: value for name, value in _plain(config).items() if not name.endswith("_pdrop")}
    static = min(counts) < config.n_head
    fields |= {"dynamic_heads": tuple(counts) if static else None, "annealed_layer_norm": plan.constant_norms}
    fields |= {"entropy_regularization": regularized, "variant": "converted"}
    if plan.relu:
        fields["activation_function"] = "relu"
    converted = EntropyGPT2LMHeadModel(EntropyGPT2Config(**fields))
    state = model.state_dict()
    for index, keep in enumerate(plan.keep):
        order = sorted(range(config.n_head), key=lambda head, keep=keep: not keep[head])  # those that are kept, first
        columns = (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten().to(model.device)
        kept, here = columns[: counts[index] * size], f"transformer.h.{index}.attn."
        for part in ("weight", "bias"):
            query, key, value = state[f"{here}c_attn.{part}"].chunk(3, -1)
            state[f"{here}c_attn.{part}"] = torch.cat([query[..., kept], key[..., kept], value[..., columns]], -1)
        state[f"{here}c_proj.weight"] = state[f"{here}c_proj.weight"][columns]
    _take_over(converted, state)
    for block, keep, filters in zip(converted.transformer.h, plan.keep, plan.statistics.by_distance, strict=True):
        _start_filter(block.attn.static, filters, keep)
    return converted


def _plain(config) -> dict:
    """The fields of a configuration that another of its family takes."""
    fields = config.to_dict()
    return {name: value for name, value in fields.items() if name not in ("model_type", "architectures", "auto_map")}


def _take_over(converted: PreTrainedModel, state: dict[str, Tensor]) -> None:
    converted.to(next(value.dtype for value in state.values() if value.is_floating_point()))
    missing, unexpected = converted.load_state_dict(state, strict=False)
    missing = [name for name in missing if not _OWN.search(name)]
    if missing or unexpected:
        name = [*unexpected, *missing][0]
        raise ValueError(f"parameters other than the model's own ({name}, ...): merge adapters into its weights")
    for name, buffer in converted.named_buffers():
        if name.endswith((".blend", ".log_scale")):
            buffer.data = buffer.float()  # a constant in half precision would move by steps


@torch.no_grad()
def _start_filter(static, filters: Tensor, keep: tuple[bool, ...]) -> None:
    if static is not None:
        static.filter.zero_()
        length = min(static.filter.shape[1], filters.shape[1])
        static.filter[:, :length] = filters[~torch.tensor(keep), :length]
