"""Muon for the blocks' matrices and AdamW for everything else, as one optimiser with one state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D


class MuonAdamW(Optimizer):
    """torch's two optimisers behind one schedule and one checkpoint.

    Muon (Jordan 2024) takes the weights of the linear maps in the blocks, Q, K and V of a layer as the one matrix that
    GPT-2 holds them in; AdamW embeddings, norms, biases, filters, temperatures and thresholds. Muon's steps are scaled
    to the RMS of AdamW's, so that both take the same learning rate and decay (Liu et al. 2025, arXiv 2502.16982).

    Args:
        model: the model to train.
        decayed: names of the parameters with weight decay.
        lr, weight_decay: of both.
        adam: AdamW's betas, eps and fused.
    """

    def __init__(self, model: nn.Module, decayed: set[str], lr: float, weight_decay: float, **adam):
        matrices = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, Conv1D | nn.Linear) and module is not model.get_output_embeddings()
        }
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name in matrices, name in decayed), []).append(parameter)
        super().__init__(
            [{"params": p, "muon": m, "weight_decay": d * weight_decay} for (m, d), p in groups.items()], {"lr": lr}
        )
        by_muon, by_adam = self._groups(True), self._groups(False)
        self._parts = {
            True: Muon(by_muon, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
            False: AdamW(by_adam, lr, weight_decay=weight_decay, **adam),
        }

    def _groups(self, muon: bool) -> list[dict]:
        return [group for group in self.param_groups if group["muon"] == muon]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon, part in self._parts.items():
            part.param_groups, part.state = self._groups(muon), self.state  # a loaded checkpoint brings its own
            part.step()
        return loss
