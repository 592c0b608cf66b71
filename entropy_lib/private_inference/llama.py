"""What the server brings of a model of Llama's kind, stock or converted: its weights, with what is linear moved in."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor

from entropy_lib.private_inference.architecture import LLAMA_TYPES, Architecture

_ROTARY = ("default", "linear", "llama3")  # whose frequencies do not depend on the input


def llama_weights(model: torch.nn.Module, context_length: int) -> tuple[Architecture, dict[str, np.ndarray], dict]:
    """(architecture, the server's arrays by the names of `two_party.forward_plan`, the public numbers).

    Gains of RMSNorms go into the next matrix, 1/√d_k into W_Q, gate and up projection are one matrix. The norms of
    queries and keys of Qwen3 are turned before they meet a matrix: their gains are matrices of their own. Rotary
    frequencies are public. Of a converted model (`modeling_llama`) constant norms go into the next matrix, softmax
    heads come first, static ones have no queries and are T×T matrices.

    ValueError for norms that are not constant yet, parameters other than the model's own (adapters), rotary positions
    that depend on the input, and an input longer than a sliding window.
    """
    config, architecture = model.config, Architecture.of(model.config)
    context_length = architecture.checked_length(context_length)
    if type(model).__name__.lower() != f"{config.model_type}forcausallm".replace("_", ""):
        raise ValueError(f"expected transformers' own {config.model_type} model, got {type(model).__name__}")
    with torch.device("meta"):
        known = type(model)(copy.deepcopy(config)).state_dict().keys()
    if strange := sorted(known ^ model.state_dict().keys()):
        raise ValueError(f"parameters other than the model's own ({strange[0]}, ...): merge adapters into its weights")
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window and context_length > window and (kinds is None or "sliding_attention" in kinds):
        raise ValueError(f"input of {context_length} tokens exceeds the model's sliding window of {window}")
    rotary = model.get_decoder().rotary_emb
    kind = getattr(rotary, "rope_type", "default")
    if kind not in _ROTARY or rotary.attention_scaling != 1:
        raise ValueError(f"rotary positions of kind {kind!r} are not supported; known are {', '.join(_ROTARY)}")

    state = {name: value.detach().double().cpu() for name, value in model.state_dict().items()}
    gemma = config.model_type.endswith("gemma")  # its gains are 1 + w, and it scales what it embeds

    def gain(name):
        norm = model.get_submodule(name)
        return norm.constant().detach().double().cpu() if hasattr(norm, "constant") else state[f"{name}.weight"] + gemma

    tokens = state["model.embed_tokens.weight"]
    weights = {"tokens": tokens * math.sqrt(architecture.width) if gemma else tokens}
    size, group, order = architecture.size, architecture.heads // architecture.groups, {}
    for layer in range(architecture.layers):
        here = f"model.layers.{layer}."

        def joined(norm, names, here=here):
            """Matrices that read the same norm, as one [d, outputs], and its bias."""
            matrices = [state[f"{here}{name}.weight"] for name in names]
            zeros = [matrix.new_zeros(len(matrix)) for matrix in matrices]
            biases = [state.get(f"{here}{name}.bias", zero) for name, zero in zip(names, zeros, strict=True)]
            matrix = torch.cat(matrices).T
            return (matrix if norm is None else gain(here + norm)[:, None] * matrix), torch.cat(biases)

        qkv = joined("input_layernorm", [f"self_attn.{name}_proj" for name in "qkv"])
        ends = [architecture.heads * size, (architecture.heads + architecture.groups) * size]
        if architecture.query_key_norm:
            gains = {name: torch.diag(gain(f"{here}self_attn.{name[0]}_norm")) for name in ("query_gain", "key_gain")}
            gains["query_gain"] /= math.sqrt(size)
            weights |= {f"{layer}.{name}": matrix for name, matrix in gains.items()}
        else:
            for tensor in qkv:
                tensor[..., : ends[0]] /= math.sqrt(size)
        if f"{here}self_attn.q_norm.blend" in state:  # constant by now
            counts = {"q": architecture.heads, "k": architecture.groups}
            scale = torch.cat([gain(f"{here}self_attn.{name}_norm").repeat(count) for name, count in counts.items()])
            for tensor in qkv:
                tensor[..., : ends[1]] *= scale
        out, out_bias = joined(None, ["self_attn.o_proj"])
        if static := getattr(model.model.layers[layer].self_attn, "static", None):
            softmax = config.heads_of_layer(layer)
            order[layer] = softmax + [head for head in range(architecture.heads) if head not in softmax]
            queries, keys = _columns(softmax, size), _columns(sorted({head // group for head in softmax}), size)
            kept = torch.cat([queries, ends[0] + keys, torch.arange(ends[1], qkv[1].shape[0])])
            qkv = qkv[0][:, kept], qkv[1][kept]
            out = out[_columns(order[layer], size)]
            weights[f"{layer}.filters"] = static.matrix(context_length).detach().cpu()
        groups = {
            "qkv": qkv,
            "attention_out": (out, out_bias),
            "ffn_in": joined("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
            "ffn_out": joined(None, ["mlp.down_proj"]),
        }
        for name, (weight, bias) in groups.items():
            weights |= {f"{layer}.{name}.weight": weight, f"{layer}.{name}.bias": bias}
    weights["vocabulary"] = gain("model.norm")[:, None] * state["lm_head.weight"].T
    arrays = {name: np.ascontiguousarray(value.float().numpy()) for name, value in weights.items()}
    public = {"epsilon": config.rms_norm_eps, "frequencies": rotary.inv_freq.tolist(), "head_order": order}
    return architecture, arrays, public


def _columns(heads: list[int], size: int) -> Tensor:
    """The columns of these heads in a matrix that has `size` for each."""
    return (torch.tensor(heads, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def is_llama(model: torch.nn.Module) -> bool:
    """Stock, or of `modeling_llama`."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or ""
    return kind.removeprefix("entropy_") in LLAMA_TYPES
