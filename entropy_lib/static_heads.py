"""Static heads: attention whose weights are learned per distance and do not depend on the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class StaticHeads(nn.Module):
    """o_i = Σ_{j≤i} f[h, i−j]·v_j: a causal filter over distances in place of softmax(QKᵀ), so linear in the values.

    (Attention without queries and keys: arXiv 2005.00743, "Synthesizer".) `filter` is f, [heads, n_positions], one
    weight a distance; heads start as normalised exponential decays over 0.3 to `n_positions`/2 tokens. Distances count
    the keys that a query sees, so that padding and a cache change nothing.
    """

    def __init__(self, heads: int, n_positions: int):
        super().__init__()
        reach = torch.logspace(math.log10(0.3), math.log10(n_positions / 2), heads)
        decay = torch.exp(-torch.arange(n_positions) / reach[:, None])
        self.filter = nn.Parameter(decay / decay.sum(-1, keepdim=True))

    def matrix(self, query_len: int, key_len: int | None = None) -> Tensor:
        """The weights of `query_len` queries that are the last of `key_len` keys, [heads, query_len, key_len].

        Raises ValueError if there are more keys than distances in the filter.
        """
        key_len = query_len if key_len is None else key_len
        if key_len > self.filter.shape[1]:
            raise ValueError(f"{key_len} keys exceed the {self.filter.shape[1]} distances of the static heads' filter")
        queries = torch.arange(key_len - query_len, key_len, device=self.filter.device)
        distance = queries[:, None] - torch.arange(key_len, device=self.filter.device)
        return self.filter[:, distance.clamp(min=0)].masked_fill(distance < 0, 0)

    def forward(self, value: Tensor, query_len: int, visible: Tensor | None = None) -> Tensor:
        """[B, heads, T_k, D] -> [B, heads, T_q, D].

        `visible` is boolean, broadcastable to [B, 1, T_q, T_k], True where a query sees a key; None: plainly causal.
        """
        if visible is None:
            return torch.einsum("hqk,bhkd->bhqd", self.matrix(query_len, value.shape[2]).to(value.dtype), value)
        visible = visible.expand(-1, -1, query_len, value.shape[2])
        # The keys that it sees after this one, counted by a product: of visible.cumsum(-1) torch 2.11 compiles a kernel
        # for GPUs whose counts are wrong.
        later = torch.ones(visible.shape[-1], visible.shape[-1], device=visible.device).tril(-1)
        with torch.autocast(visible.device.type, enabled=False):  # counts above 256 are none in bfloat16
            distance = (visible.float() @ later).long()
        weights = self.filter[:, distance.clamp(max=self.filter.shape[1] - 1)].movedim(0, 1)  # [B, heads, 1, T_q, T_k]
        weights = weights.squeeze(2).masked_fill(~visible, 0)
        return weights.to(value.dtype) @ value
