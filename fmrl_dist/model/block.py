"""A residual block: what mixes the events of a history, then a feed-forward network (eq. 10-12)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.dropout import NestedDropout
from fmrl_dist.model.mixers.mixing import Mixer, Mixing, build_mixer
from fmrl_dist.model.nested import NestedLayerNorm, NestedLinear


class FeedForward(nn.Module):
    """Gated FFN (SiLU(x W_g + b_g) ⊙ (x W_1 + b_1)) W_2 + b_2, dropout after W_1 and after W_2."""

    def __init__(
        self, sizes: Sequence[int], dropout: float, matmul_dtype: torch.dtype | None, dropout_power: float = 0.0
    ) -> None:
        super().__init__()
        self.gate = NestedLinear(sizes, matmul_dtype)
        self.w_1 = NestedLinear(sizes, matmul_dtype)
        self.w_2 = NestedLinear(sizes, matmul_dtype)
        self.dropout = NestedDropout(sizes, dropout, dropout_power)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = F.silu(self.gate(x)) * self.dropout(self.w_1(x))
        return self.dropout(self.w_2(hidden))


class ResidualBlock(nn.Module):
    """Mixer, then FFN, each behind its own nested layer-norm and a residual.

    The mixer's tensors are named for its kind, ``lru.B`` or ``attention.qkv``: nobody takes one kind's for another's.

    Args:
        sizes: Matryoshka sizes.
        mixing: which mixer, and its settings.
        dropout: rate in the FFN.
        mixer_dropout: rate after the mixer.
        matmul_dtype: of the products' inputs in training mode.
        dropout_power: how fast both rates fall towards smaller sizes.
        scan: see :func:`~fmrl_dist.model.mixers.mixing.build_mixer`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        mixing: Mixing,
        dropout: float,
        mixer_dropout: float,
        matmul_dtype: torch.dtype | None = None,
        dropout_power: float = 0.0,
        scan: str = "auto",
    ) -> None:
        super().__init__()
        self._mixer_name = mixing.mixer
        self.add_module(f"{mixing.mixer}_norm", NestedLayerNorm(sizes))
        self.add_module(mixing.mixer, build_mixer(mixing, sizes, matmul_dtype, scan))
        self.mixer_dropout = NestedDropout(sizes, mixer_dropout, dropout_power)
        self.ffn_norm = NestedLayerNorm(sizes)
        self.ffn = FeedForward(sizes, dropout, matmul_dtype, dropout_power)

    @property
    def mixer(self) -> Mixer:
        """What mixes the events."""
        return cast(Mixer, self.get_submodule(self._mixer_name))

    @property
    def mixer_norm(self) -> nn.Module:
        """The layer-norm before it."""
        return self.get_submodule(f"{self._mixer_name}_norm")

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x [P, D] packed rows, starts int64 [·+1] → [P, D]."""
        x = x + self.mixer_dropout(self.mixer(self.mixer_norm(x), starts))
        return x + self.ffn(self.ffn_norm(x))

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One event of each of B histories: the mixer's state and x [B, D] → new state, [B, D]."""
        state, mixed = self.mixer.step(state, self.mixer_norm(x))
        x = x + self.mixer_dropout(mixed)
        return state, x + self.ffn(self.ffn_norm(x))
