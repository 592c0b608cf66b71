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
    """
    config = copy.deepcopy(model.config)
    config.folded, config.weight_normalization, config.norm_placement = True, None, None
    was_training = model.training
    model.eval()  # spectral normalisation must not take another power iteration
    state = {key: value for key, value in model.state_dict().items() if ".parametrizations." not in key}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            state[f"{name}.weight"] = module.weight
    model.train(was_training)
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
    folded = EntropyGPT2LMHeadModel(config).to(model.device, model.dtype).eval()
    folded.load_state_dict(state)
    return folded
