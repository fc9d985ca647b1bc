"""Which items a step leaves something of out: a hash of stream, seed, step and item; nothing is drawn for all V items.

All ranks, all micro-batches and both passes of a loss find the same, without an exchange.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

LOW_BITS = 2**32 - 1
MULTIPLIER = 0x45D9F3B  # its product with 32 bits fits into 63


class LeftOut:
    """A random share of the items, another in each step.

    Args:
        rate: the share.
        stream: numbers that tell one use from the others, and the run's seed.
    """

    def __init__(self, rate: float, *stream: int) -> None:
        self.rate, self._stream = rate, stream
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Choose the items of ``step``."""
        self._keys = np.random.SeedSequence((*self._stream, step)).generate_state(2, np.uint32).tolist()

    def __call__(self, ids: Tensor) -> Tensor:
        """Whether each of some items is among them, bool [n]; ids int64 [n]."""
        hashed = ids ^ (ids >> 32)
        for key in self._keys:
            hashed = (hashed ^ key) & LOW_BITS
            for _ in range(2):
                hashed = ((hashed ^ (hashed >> 16)) * MULTIPLIER) & LOW_BITS
            hashed = hashed ^ (hashed >> 16)
        return hashed < self.rate * 2**32
