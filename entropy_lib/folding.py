"""Fold everything that is constant at inference into plain weights."""

from __future__ import annotations

import copy

import torch
from torch.nn.utils import parametrize

from entropy_lib.modeling import EntropyGPT2LMHeadModel


@torch.no_grad()
def fold_for_inference(model: EntropyGPT2LMHeadModel) -> EntropyGPT2LMHeadModel:
    """A copy, in eval mode, with the same logits and only what inference has to compute.

    Weight and spectral normalisation and 1/α become plain weights; the temperature becomes a constant scale of
    the queries (it differs by position, so it cannot go into W_Q, but it stays linear); thresholds are dropped.
    Annealed LayerNorms go into the matrices after them. Static heads keep their filter, whose T×T matrices
    `StaticHeads.matrix` gives, and value residuals the scalar of layer 0's values (the other goes into W_V).
    Every tensor keeps its dtype and device; hooks stay with the model, which is only read. Raises ValueError for
    another kind of model, one with parameters of its own (an adapter's), or LayerNorms that are not constant yet.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, EntropyGPT2LMHeadModel):
        raise ValueError(f"only an EntropyGPT2LMHeadModel has something to fold, got {type(model).__name__}")
    config = copy.deepcopy(model.config)
    config.folded, config.weight_normalization, config.norm_placement = True, None, None
    config.tie_word_embeddings = model.lm_head.weight is model.transformer.wte.weight
    state = {key: value for key, value in model.state_dict().items() if ".parametrizations." not in key}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for parameter, parametrization in module.parametrizations.items():
                # a copy in eval mode: PyTorch's own spectral_norm takes a power iteration a look in training
                state[f"{name}.{parameter}"] = copy.deepcopy(parametrization).eval()()
    for key in [
        key for key in state if key.rpartition(".")[2] in ("alpha", "log_temperature", "reg_threshold_weights")
    ]:
        prefix, _, parameter = key.rpartition(".")
        value = state.pop(key)
        if parameter == "log_temperature":
            state[f"{prefix}.query_scale"] = torch.exp(-value)
        elif parameter == "alpha":
            for part in ("weight", "bias"):
                state[f"{prefix}.mlp.c_proj.{part}"] = state[f"{prefix}.mlp.c_proj.{part}"] / value
    for index, block in enumerate(model.transformer.h):
        prefix = f"transformer.h.{index}."
        if config.annealed_layer_norm and not model.config.folded:
            for norm, matrix in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_proj" if config.fused_ffn else "mlp.c_fc")):
                names = f"{prefix}{matrix}.weight", f"{prefix}{matrix}.bias"
                folded_in = getattr(block, norm).folded_into(*(state[name] for name in names))
                state.update(zip(names, folded_in, strict=True))
                for key in [key for key in state if key.startswith(f"{prefix}{norm}.")]:
                    del state[key]
        if config.value_residual and index:
            mix, width = state[f"{prefix}attn.value_mix"], config.n_embd
            for part in ("weight", "bias"):
                whole = state[f"{prefix}attn.c_attn.{part}"].clone()
                whole[..., -width:] *= mix[0]
                state[f"{prefix}attn.c_attn.{part}"] = whole
            state[f"{prefix}attn.value_mix"] = torch.stack([torch.ones_like(mix[1]), mix[1]])
    with torch.device("meta"):  # nothing is drawn for weights that are replaced
        folded = EntropyGPT2LMHeadModel(config)
    try:
        folded.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"parameters other than those of its configuration: {error}") from error
    folded.tie_weights()
    folded.generation_config = copy.deepcopy(model.generation_config)
    return folded.eval()
