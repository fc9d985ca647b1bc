"""What a step draws for items, by a hash of stream, seed, step and item; nothing is drawn for all V items.

All ranks, all micro-batches and both passes of a loss find the same, without an exchange.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOW_BITS = 2**32 - 1
MULTIPLIER = 0x45D9F3B  # its product with 32 bits fits into 63


class ItemHash:
    """A number for every item, another in each step.

    Args:
        stream: numbers that tell one use from the others, and the run's seed.
    """

    def __init__(self, *stream: int) -> None:
        self._stream = stream
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Go to ``step``."""
        self._keys = np.random.SeedSequence((*self._stream, step)).generate_state(2, np.uint32).tolist()

    def __call__(self, ids: Tensor) -> Tensor:
        """Uniform integers below 2^32, int64 as ``ids``."""
        hashed = ids ^ (ids >> 32)
        for key in self._keys:
            hashed = (hashed ^ key) & LOW_BITS
            for _ in range(2):
                hashed = ((hashed ^ (hashed >> 16)) * MULTIPLIER) & LOW_BITS
            hashed = hashed ^ (hashed >> 16)
        return hashed


class LeftOut:
    """Which items a step leaves something of out: a random share of them.

    Args:
        rate: the share.
        stream: see :class:`ItemHash`.
    """

    def __init__(self, rate: float, *stream: int) -> None:
        self.rate, self._hash = rate, ItemHash(*stream)
        self.begin_step = self._hash.begin_step

    def __call__(self, ids: Tensor) -> Tensor:
        """Whether each of some items is among them, bool [n]; ids int64 [n]."""
        return self._hash(ids) < self.rate * 2**32


class ItemNoise:
    """Standard normal numbers for each item.

    Args:
        count: of each item.
        stream: see :class:`ItemHash`.
    """

    def __init__(self, count: int, *stream: int) -> None:
        self._count, self._hash = count, ItemHash(*stream)
        self.begin_step = self._hash.begin_step

    def __call__(self, ids: Tensor) -> Tensor:
        """float32 [n, count]; ids int64 [n]."""
        hashed = self._hash(ids[:, None] * self._count + torch.arange(self._count, device=ids.device))
        return torch.special.ndtri((hashed.double() + 0.5) / 2**32).float()
