"""A residual block: what mixes the events of a history, then a feed-forward network (eq. 10-12)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.lru import LRU
from fmrl_dist.model.nested import NestedLayerNorm, NestedLinear


class FeedForward(nn.Module):
    """Gated FFN (SiLU(x W_g + b_g) ⊙ (x W_1 + b_1)) W_2 + b_2, dropout after W_1 and after W_2."""

    def __init__(self, sizes: Sequence[int], dropout: float, matmul_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gate = NestedLinear(sizes, matmul_dtype)
        self.w_1 = NestedLinear(sizes, matmul_dtype)
        self.w_2 = NestedLinear(sizes, matmul_dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = F.silu(self.gate(x)) * self.dropout(self.w_1(x))
        return self.dropout(self.w_2(hidden))


class ResidualBlock(nn.Module):
    """Sequence mixer, then FFN, each behind its own nested layer-norm and a residual."""

    def __init__(
        self,
        sizes: Sequence[int],
        dropout: float,
        lru_dropout: float,
        r_min: float,
        r_max: float,
        matmul_dtype: torch.dtype | None = None,
        scan: str = "auto",
    ) -> None:
        super().__init__()
        self.lru_norm = NestedLayerNorm(sizes)
        self.lru = LRU(sizes, r_min, r_max, matmul_dtype, scan)
        self.lru_dropout = nn.Dropout(lru_dropout)
        self.ffn_norm = NestedLayerNorm(sizes)
        self.ffn = FeedForward(sizes, dropout, matmul_dtype)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        x = x + self.lru_dropout(self.lru(self.lru_norm(x), starts))
        return x + self.ffn(self.ffn_norm(x))

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state, mixed = self.lru.step(state, self.lru_norm(x))
        x = x + self.lru_dropout(mixed)
        return state, x + self.ffn(self.ffn_norm(x))
