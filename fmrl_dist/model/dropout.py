"""Dropout whose rate grows with the channel: small sizes lack capacity, large ones overfit.

A size's own channels are those that the next smaller size lacks. They are dropped at p_m = rate · (m / D)^power, so
that every slice is regularised for its size (not in the paper, which has one rate).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from fmrl_dist.model.nested import chunks

LEVELS = 2**16  # of the 16-bit numbers that decide which entries are kept
DRAWN = 4  # of them in one draw of 64 bits: on a CPU, draws are most of dropout's time


def rates_of_sizes(sizes: Sequence[int], rate: float, power: float) -> tuple[float, ...]:
    """p_m of each size's own channels."""
    return tuple(rate * (size / sizes[-1]) ** power for size in sizes)


class NestedDropout(nn.Module):
    """In training, zeroes entries at random, each at its channel's rate p, and scales the others by 1 / (1 - p).

    Args:
        sizes: Matryoshka sizes m_1 < … < m_S; the last is the width D.
        rate: p of the largest size's own channels, in [0, 1).
        power: how fast p falls towards smaller sizes; 0: not at all.

    Raises:
        ValueError: ``rate`` is no such number.
    """

    def __init__(self, sizes: Sequence[int], rate: float, power: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout rate {rate}; expected 0 <= rate < 1")
        self.sizes = tuple(sizes)
        self.rates = rates_of_sizes(sizes, rate, power)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] → [N, D]."""
        if not self.training or self.rates[-1] == 0:
            return x
        highest, scale = _thresholds(self.sizes, self.rates, x.dtype, x.device)
        draws = torch.empty(-(-x.numel() // DRAWN), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (numbers <= highest) * scale

    def extra_repr(self) -> str:
        return ", ".join(f"{size}: {rate:.3g}" for size, rate in zip(self.sizes, self.rates, strict=True))


@lru_cache(maxsize=32)
def _thresholds(
    sizes: tuple[int, ...], rates: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """By channel, the highest number that keeps an entry, int16 [D], and the factor of what is kept, [D]."""
    widths = torch.tensor([end - begin for begin, end in chunks(sizes)])
    num_kept = torch.tensor([round((1 - rate) * LEVELS) for rate in rates]).clamp(min=1).repeat_interleave(widths)
    highest = num_kept - 1 - LEVELS // 2  # numbers begin at -LEVELS / 2
    return highest.to(device, torch.int16), (LEVELS / num_kept.double()).to(device, dtype)
