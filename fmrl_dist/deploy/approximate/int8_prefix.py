"""The first channels of rotated item vectors as int8: what a funnel looks at of every item.

Rotated channels are sorted by what they carry (:mod:`fmrl_dist.model.rotation`), so a few of them nearly order the
items; and eight bits each are enough for that. Items lie in blocks. A scan keeps each block's largest product alone:
whoever then wants all items above some score need look only into blocks whose largest is.

B users, V items, W channels of whole vectors, m of the prefix, C blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

BLOCK_ITEMS = 64
TILE_ITEMS, MAX_TILE_ITEMS = 8192, 65_536  # scanned at once
TILE_PRODUCTS = 1 << 19  # 2 MB, which stay in a cache
LEAST_PRODUCT, LARGEST_PRODUCT = np.iinfo(np.int32).min, np.iinfo(np.int32).max
CHANNELS = 8  # a prefix is padded with zeros to a multiple: PyTorch's product is wrong for a single channel


@dataclass(frozen=True)
class PrefixQueries:
    """Outputs as int8: a prefix score is ``scale`` times an integer product."""

    values: Tensor  # int8 [B, padded m]
    scales: np.ndarray  # float64 [B], above 0
    unseen: np.ndarray  # float64 [B], length of the part of each output that the prefix scores leave out


class Int8Prefix:
    """Prefixes of all items.

    Args:
        values: int8 [C · BLOCK_ITEMS, padded m]; the last item's is repeated behind it.
        num_items: V.
        steps: what a channel's integers count in, float32 [m].
    """

    def __init__(self, values: Tensor, num_items: int, steps: Tensor) -> None:
        self._values, self.num_items, self._steps = values, num_items, steps
        self._blocks = values.numpy().reshape(-1, BLOCK_ITEMS * values.shape[1]).view(np.int64)  # copied faster

    @classmethod
    def of_rotated(cls, rotated: RotatedInt8, width: int) -> Int8Prefix:
        """The prefixes of ``width`` channels."""
        return cls(_in_blocks(rotated.values[:, :width]), len(rotated.values), rotated.steps[:width])

    def of_rows(self, rows: np.ndarray) -> Int8Prefix:
        """Those of some items, at least one."""
        return Int8Prefix(_in_blocks(self._values[torch.from_numpy(rows)]), len(rows), self._steps)

    def __len__(self) -> int:
        return self.num_items

    @property
    def width(self) -> int:
        """m."""
        return len(self._steps)

    @property
    def num_blocks(self) -> int:
        """C."""
        return len(self._blocks)

    @property
    def num_bytes(self) -> int:
        return self._values.numel()

    def queries(self, rotated_outputs: np.ndarray) -> PrefixQueries:
        """Queries for rotated outputs, float32 [B, W]."""
        outputs = torch.from_numpy(rotated_outputs)
        width = len(self._steps)
        wanted = outputs[:, :width] * self._steps
        scales = wanted.abs().amax(1, keepdim=True) / 127
        scales = torch.where(scales > 0, scales, 1.0)
        values = (wanted / scales).round()
        unseen = outputs.double()
        unseen[:, :width] -= values.double() * scales / self._steps
        padded = torch.zeros(len(outputs), self._values.shape[1], dtype=torch.int8)
        padded[:, :width] = values
        return PrefixQueries(padded, scales[:, 0].double().numpy(), unseen.norm(dim=1).numpy())

    def block_maxima(self, queries: PrefixQueries) -> Tensor:
        """The largest product of each block, int32 [B, C]."""
        users = queries.values
        maxima = torch.empty(len(users), self.num_blocks, dtype=torch.int32)
        tile_items = min(max(TILE_PRODUCTS // len(users), TILE_ITEMS), MAX_TILE_ITEMS) // BLOCK_ITEMS * BLOCK_ITEMS
        for first in range(0, len(self._values), tile_items):
            products = int8_products(users, self._values[first : first + tile_items]).unflatten(1, (-1, BLOCK_ITEMS))
            begin = first // BLOCK_ITEMS
            maxima[:, begin : begin + products.shape[1]] = products.amax(2)
        return maxima

    def products(self, query: Tensor, rows: np.ndarray) -> np.ndarray:
        """Products int32 [n] of some rows, for one query int8 [padded m]."""
        return int8_products(query[None], self._values[torch.from_numpy(rows)])[0].numpy()

    def in_blocks(self, blocks: np.ndarray, query: Tensor, least: int = LEAST_PRODUCT) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [n] and products int32 [n] of the items of some blocks whose product is no less than ``least``.

        For one query, int8 [padded m].
        """
        values = self._blocks.take(blocks, axis=0).view(np.int8).reshape(-1, self._values.shape[1])
        products = int8_products(query[None], torch.from_numpy(values))[0].numpy()
        places = np.flatnonzero(products >= least)
        rows = blocks[places // BLOCK_ITEMS] * BLOCK_ITEMS + places % BLOCK_ITEMS
        is_item = rows < self.num_items  # not the last one repeated
        return rows[is_item], products[places[is_item]]


@dataclass(frozen=True)
class RotatedInt8:
    """All channels of rotated item vectors as int8, from which prefixes are cut."""

    values: Tensor  # int8 [V, W]
    steps: Tensor  # float32 [W], above 0

    @classmethod
    def of_vectors(cls, vectors: np.ndarray, rotation: np.ndarray) -> RotatedInt8:
        """Of item vectors float32 [V, W] and an orthogonal matrix [W, W]."""
        turn, tiles = torch.from_numpy(rotation), torch.from_numpy(vectors).split(TILE_ITEMS)
        largest = torch.stack([(tile @ turn).abs().amax(0) for tile in tiles]).amax(0)
        steps = torch.where(largest > 0, largest / 127, 1.0)
        values = torch.cat([((tile @ turn) / steps).round().clamp(-127, 127).to(torch.int8) for tile in tiles])
        return cls(values, steps)


def int8_products(users: Tensor, items: Tensor) -> Tensor:
    """``users @ items.T`` of int8 [B, m] and [v, m], int32 [B, v]."""
    if _int_mm_is_sound():
        return torch._int_mm(users, items.T)
    return (users.float() @ items.float().T).to(torch.int32)  # exact below 2^24: up to a thousand channels


@cache
def _int_mm_is_sound() -> bool:
    """Whether PyTorch's product of int8 is there and exact, also of the largest numbers."""
    extremes = torch.tensor([-127, -127, 127, 127, -1, 0, 1, 126], dtype=torch.int8).repeat(16, 16)
    users, items = extremes[:3] * torch.tensor([[1], [-1], [1]], dtype=torch.int8), extremes.roll(3, 1)
    try:
        found = [torch._int_mm(users[:count, :width], items[:, :width].T) for count in (1, 3) for width in (8, 128)]
    except (AttributeError, RuntimeError):
        return False
    expected = [users[:count, :width].int() @ items[:, :width].int().T for count in (1, 3) for width in (8, 128)]
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _in_blocks(values: Tensor) -> Tensor:
    """Rows int8 [v, m] filled up to whole blocks with the last one, and to whole groups of channels with zeros."""
    missing, channels = -len(values) % BLOCK_ITEMS, -values.shape[1] % CHANNELS
    filled = torch.cat((values, values[-1:].expand(missing, -1)))
    return torch.nn.functional.pad(filled, (0, channels)).contiguous()
