"""Weight and spectral normalisation of GPT-2's linear layers, wherever Table 5 places them (Tables 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from entropy_lib.entropy import without_autocast


class WeightNorm(nn.Module):
    """W = g · V/‖V‖₂ for some output columns of a [d_in, d_out] weight, one g a column (SM+WNorm)."""

    def __init__(self, weight: Tensor, columns: slice):
        super().__init__()
        self.columns = columns
        self.gain = nn.Parameter(weight[:, columns].detach().norm(dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        return _replace_columns(
            weight, self.columns, self.gain * nn.functional.normalize(weight[:, self.columns], dim=0)
        )


class SpectralNorm(nn.Module):
    """W/σ(W), σ the largest singular value, for some output columns of a [d_in, d_out] weight (SM+SNorm).

    σ = uᵀWv with u, v kept between steps; `iterate_spectral_norms` improves them before a training forward pass. Both
    are computed in float32 or better, under autocast too: bfloat16 would put σ off by up to half a percent.
    """

    def __init__(self, weight: Tensor, columns: slice):
        super().__init__()
        self.columns = columns
        block = weight[:, columns].detach()
        self.register_buffer("left", nn.functional.normalize(torch.randn_like(block[:, 0]), dim=0))
        self.register_buffer("right", nn.functional.normalize(torch.randn_like(block[0]), dim=0))
        if not weight.is_meta:  # a model about to be loaded brings its own u, v
            self.power_iteration(weight, steps=15)

    @torch.no_grad()
    def power_iteration(self, weight: Tensor, steps: int = 1) -> None:
        block = weight[:, self.columns]
        with without_autocast(weight):
            for _ in range(steps):
                self.right.copy_(nn.functional.normalize(block.T @ self.left, dim=0))
                self.left.copy_(nn.functional.normalize(block @ self.right, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        block = weight[:, self.columns]
        # clones, since the next step overwrites the buffers that this step's backward reads
        left, right = self.left.clone(), self.right.clone()
        if weight.dtype in (torch.float16, torch.bfloat16):  # their rounded entries do not have length 1
            left, right = (nn.functional.normalize(vector.float(), dim=0) for vector in (left, right))
        with without_autocast(weight):
            sigma = left @ (block.to(left.dtype) @ right)
        return _replace_columns(weight, self.columns, (block / sigma).to(weight.dtype))


def iterate_spectral_norms(model: nn.Module, *args) -> None:
    """A forward pre-hook: one power iteration a training pass, outside what activation checkpointing runs again."""
    if not model.training:
        return
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            for norm in layer.parametrizations.weight:
                if isinstance(norm, SpectralNorm):
                    norm.power_iteration(layer.parametrizations.weight.original)


def _replace_columns(weight: Tensor, columns: slice, block: Tensor) -> Tensor:
    if block.shape == weight.shape:
        return block
    return torch.cat([weight[:, : columns.start], block, weight[:, columns.stop :]], dim=1)


def _parametrize(layer: nn.Module, norms: list[nn.Module]) -> nn.Module:
    """Put `norms` on `layer.weight`, one after the other, so that the layer can still be pickled."""
    for norm in norms:
        parametrize.register_parametrization(layer, "weight", norm)
    type(layer).__reduce_ex__ = _reduce  # torch made this class for this layer, with a __getstate__ that refuses
    return layer


def _reduce(layer: nn.Module, protocol: int) -> tuple:
    """How a layer with norms is pickled: as the layer without, and the norms to put on it."""
    plain_class = type(layer).__bases__[0]
    plain = plain_class.__new__(plain_class)
    plain.__dict__.update(layer.__dict__)
    norms = layer.parametrizations.weight
    plain._parameters = {"weight": norms.original, **layer._parameters}
    plain._modules = {name: module for name, module in layer._modules.items() if name != "parametrizations"}
    return _parametrize, (plain, list(norms))


def normalize_weights(block: GPT2Block, config: GPT2Config) -> None:
    """Reparametrise the matrices that `norm_placement` names; query, key and value are columns of `c_attn`."""
    norm = {"weight": WeightNorm, "spectral": SpectralNorm}[config.weight_normalization]
    width = config.hidden_size
    targets = []
    for letter in config.norm_placement.removesuffix("FFN").removesuffix("+"):
        if letter == "O":
            targets.append((block.attn.c_proj, slice(0, width)))
        else:
            start = "QKV".index(letter) * width
            targets.append((block.attn.c_attn, slice(start, start + width)))
    if config.norm_placement.endswith("FFN"):
        targets += [(layer, slice(0, layer.weight.shape[1])) for layer in (block.mlp.c_fc, block.mlp.c_proj)]
    for layer, columns in targets:
        _parametrize(layer, [norm(layer.weight, columns)])
