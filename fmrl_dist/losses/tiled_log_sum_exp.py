"""The nested log-sum-exp tile by tile, forward and backward; :mod:`fmrl_dist.losses.log_sum_exp` is the specification.

N positions, n of a tile; V items, v of a tile; D width, S sizes. Scores exist only as one tile of positions × items at
a time, whose log-sum-exp is merged into a running one of each size. The score of size i
contains the products of all chunks j ≤ i, so the gradient of chunk j's products is the sum of the weighted softmaxes of
all sizes i ≥ j.

A tile is computed by PyTorch's operators (:class:`TorchSoftmax`) or by Triton kernels (:class:`TritonSoftmax`). Tiles
are kept for the backward pass until their bytes are spent; the others are computed again there. Memory beyond inputs
and gradients: N·S, back-projected N·F, a tile, and what is kept; none of it grows with V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmrl_dist.losses.item_tiles import Gradients, ItemTile, ItemTiles, RowMatrix, TilePlan, given

TILE_POSITIONS = 512  # on the CPU, where a tile of every size should stay in the cache
TILE_ITEMS = 1024
KEPT_BYTES = 128 * 2**20
GPU_FACTOR = 4  # each of them is larger on a GPU by this factor: few kernels with much work each
TRITON_POSITIONS = 4096  # scores stay in registers, so a tile is as large as its gradients in memory
TRITON_ITEMS = 8192
LEFT_OUT = torch.finfo(torch.float32).min  # score of an item that a position may not see; its exponential is 0


@dataclass(frozen=True)
class TileLimits:
    """The largest tile, and how many bytes of tiles are kept for the backward pass."""

    positions: int
    items: int
    kept_bytes: int


def tile_limits(impl: str, on_gpu: bool) -> TileLimits:
    factor = GPU_FACTOR if on_gpu else 1
    if impl == "triton":
        return TileLimits(TRITON_POSITIONS, TRITON_ITEMS, KEPT_BYTES * factor)
    return TileLimits(TILE_POSITIONS * factor, TILE_ITEMS * factor, KEPT_BYTES * factor)


class TileSoftmax(Protocol):
    """Computes tiles of positions × items. ``kept`` goes from the forward to the backward pass."""

    kept: dict[tuple[int, int], Any]

    def kept_bytes(self, tile: ItemTile) -> int:
        """Bytes that keeping a tile of items and all positions takes, in addition to its embeddings."""

    def log_sum_exp(self, rows: slice, tile: ItemTile, keep: bool) -> Tensor:
        """Log-sum-exp of each size over the tile's items, [S, n].

        With ``keep``, :meth:`score_grads` will not compute it again.
        """

    def score_grads(self, rows: slice, tile: ItemTile, lse_Sn: Tensor, weights_Sn: Tensor) -> Tensor:
        """Gradients of each chunk's products, Σ_{i ≥ j} weights_i · softmax_i, [S, n, v]; ``lse_Sn`` of all items."""


class TiledLogSumExp(torch.autograd.Function):
    """Log-sum-exp [S, N] of ``z`` [N, D] over items that are projected from features, given in a table, or both added.

    Gradients of z, weight [D, F] and table [V, D]; features are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor | None, table: Tensor | None, features: RowMatrix | None, plan: TilePlan
    ) -> Tensor:
        items, limits = ItemTiles(z, weight, table, features, plan), tile_limits(plan.impl, z.is_cuda)
        softmax = make_softmax(z, items)
        lse_SN = z.new_full((len(plan.sizes), len(z)), -torch.inf)
        kept_embeddings: dict[int, Tensor] = {}
        budget = limits.kept_bytes if any(ctx.needs_input_grad) else 0
        for columns in _ranges(items.num_items, limits.items):
            tile = items.tile(columns)
            projected_bytes = z.element_size() * tile.transposed.numel() if features is not None else 0
            num_bytes = projected_bytes + softmax.kept_bytes(tile)
            keep = num_bytes <= budget
            if keep:
                budget -= num_bytes
                if features is not None:  # a copy: a view would keep the back-projected scores alive
                    kept_embeddings[columns.start] = tile.transposed.clone()
            for rows in _ranges(len(z), limits.positions):
                lse_SN[:, rows] = torch.logaddexp(lse_SN[:, rows], softmax.log_sum_exp(rows, tile, keep))
        ctx.save_for_backward(z, weight, table, lse_SN)
        ctx.rest = features, plan, softmax.kept, kept_embeddings
        return lse_SN.masked_fill(lse_SN <= LEFT_OUT / 2, -torch.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, table, lse_SN = ctx.saved_tensors
        features, plan, kept, kept_embeddings = ctx.rest
        items, limits = ItemTiles(z, weight, table, features, plan), tile_limits(plan.impl, z.is_cuda)
        softmax = make_softmax(z, items)
        softmax.kept = kept
        gradients = Gradients(items, z, weight, table)
        weights_SN = grad_SN * grad_SN.new_tensor(plan.inverse)[:, None]
        for columns in _ranges(items.num_items, limits.items):
            tile = items.tile(columns, kept_embeddings.pop(columns.start, None))
            gradients.begin_items(tile)
            for rows in _ranges(len(z), limits.positions):
                gradients.add(rows, tile, softmax.score_grads(rows, tile, lse_SN[:, rows], weights_SN[:, rows]))
            gradients.end_items(tile)
        grad_z, grad_weight, grad_table = gradients.finish()
        return grad_z, grad_weight, grad_table, None, None


def make_softmax(z: Tensor, items: ItemTiles) -> TileSoftmax:
    return TritonSoftmax(z, items.plan) if items.plan.impl == "triton" else TorchSoftmax(z, items)


class TorchSoftmax:
    """Tiles by PyTorch's operators, each chunk multiplied once."""

    def __init__(self, z: Tensor, items: ItemTiles) -> None:
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._items, self._plan = items, items.plan
        self._buffer = z.new_empty(0)

    def kept_bytes(self, tile: ItemTile) -> int:
        return self._buffer.element_size() * tile.num_items * len(self._plan.sizes) * self._items.num_positions

    def log_sum_exp(self, rows: slice, tile: ItemTile, keep: bool) -> Tensor:
        shares, log_sum_exp = self._softmax(rows, tile, reuse=not keep)
        if keep:
            self.kept[tile.columns.start, rows.start] = shares, log_sum_exp
        return log_sum_exp

    def score_grads(self, rows: slice, tile: ItemTile, lse_Sn: Tensor, weights_Sn: Tensor) -> Tensor:
        kept = self.kept.pop((tile.columns.start, rows.start), None)
        shares, log_sum_exp = kept if kept is not None else self._softmax(rows, tile, reuse=True)
        factors = weights_Sn * (log_sum_exp - lse_Sn).exp()
        grads = shares.mul_(factors[..., None])
        for j in range(len(grads) - 2, -1, -1):
            grads[j] += grads[j + 1]
        return grads

    def _softmax(self, rows: slice, tile: ItemTile, reuse: bool) -> tuple[Tensor, Tensor]:
        """Softmax of a tile by itself [S, n, v], and its log-sum-exp [S, n].

        The library's softmax reads each row once. The highest score's share is exp(0) over the sum, which gives it.
        """
        scores = self._scores(rows, tile, reuse)
        highest = scores.amax(2)
        shares = torch.softmax(scores, 2, out=scores)
        return shares, highest - shares.amax(2).log()

    def _scores(self, rows: slice, tile: ItemTile, reuse: bool) -> Tensor:
        """[S, n, v]; with ``reuse`` the next such call overwrites it."""
        items, plan = self._items, self._plan
        shape = len(plan.sizes), rows.stop - rows.start, tile.num_items
        scores = self._reused(shape) if reuse else self._buffer.new_empty(shape)
        back_begin = 0
        for j, (z_chunk, channels) in enumerate(zip(items.z_chunks, items.embedded, strict=True)):
            if channels is None:
                product = given(tile.back_scores)[back_begin + rows.start : back_begin + rows.stop]
                back_begin += items.num_positions
            elif z_chunk.dtype == scores.dtype:
                product = torch.mm(z_chunk[rows], tile.transposed[channels], out=scores[j])
            else:
                product = z_chunk[rows] @ tile.transposed[channels]
            if j > 0:
                torch.add(scores[j - 1], product, out=scores[j])
            elif product.data_ptr() != scores.data_ptr():
                scores[0] = product
        for size_scores, factor in zip(scores, plan.inverse, strict=True):
            if factor != 1:
                size_scores *= factor
        if plan.correction is not None:
            correction = plan.correction.of_tile(rows, tile.columns)
            scores += correction.offsets
            scores.masked_fill_(correction.target_ids[:, None] == correction.item_ids, LEFT_OUT)
        return scores

    def _reused(self, shape: tuple[int, int, int]) -> Tensor:
        size = shape[0] * shape[1] * shape[2]
        if self._buffer.numel() < size:
            self._buffer = self._buffer.new_empty(size)
        return self._buffer[:size].view(shape)


class TritonSoftmax:
    """Tiles by Triton kernels, whose scores stay in registers: only embeddings are kept for the backward pass."""

    def __init__(self, z: Tensor, plan: TilePlan) -> None:
        from fmrl_dist.losses.triton_tiles import TritonTiles

        self.kept: dict[tuple[int, int], Any] = {}
        self._z, self._correction = z.to(plan.dtype).contiguous(), plan.correction
        self._tiles = TritonTiles(plan.sizes, plan.inverse, plan.dtype, z.device)

    def kept_bytes(self, tile: ItemTile) -> int:
        return 0

    def log_sum_exp(self, rows: slice, tile: ItemTile, keep: bool) -> Tensor:
        return self._tiles.log_sum_exp(self._z[rows], tile.transposed.T, self._correction_of(rows, tile))

    def score_grads(self, rows: slice, tile: ItemTile, lse_Sn: Tensor, weights_Sn: Tensor) -> Tensor:
        correction = self._correction_of(rows, tile)
        return self._tiles.score_grads(self._z[rows], tile.transposed.T, correction, lse_Sn, weights_Sn)

    def _correction_of(self, rows: slice, tile: ItemTile) -> Any:
        return None if self._correction is None else self._correction.of_tile(rows, tile.columns)


def _ranges(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
