"""The nested log-sum-exp tile by tile, forward and backward; :mod:`fmrl_dist.losses.log_sum_exp` is the specification.

N positions, n of a tile; V items, v of a tile; D width, S sizes. Scores exist only as one tile of positions × items at
a time, whose log-sum-exp is merged into a running one of each size. The score of size i
contains the products of all chunks j ≤ i, so the gradient of chunk j's products is the sum of the weighted softmaxes of
all sizes i ≥ j. With distillation there is a further row, the teacher's: the scores of the largest size, divided by κ.
Its softmax is part of the gradients of all sizes that it teaches.

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
        """Log-sum-exp of each size over the tile's items, and of the teacher if there is one, [S, n] or [S+1, n].

        With ``keep``, :meth:`score_grads` will not compute it again.
        """

    def score_grads(
        self, rows: slice, tile: ItemTile, lse: Tensor, weights_Sn: Tensor, taught_Sn: Tensor | None
    ) -> Tensor:
        """Gradients of each chunk's products, Σ_{i ≥ j} weights_i · softmax_i + taught_i · teacher, [S, n, v].

        Args:
            rows, tile: which of them.
            lse: of all items, [S, n] or [S+1, n].
            weights_Sn: of the sizes' softmaxes.
            taught_Sn: weights of the teacher's softmax, [S, n]; None without distillation.
        """


class TiledLogSumExp(torch.autograd.Function):
    """Normalizers of ``z`` [N, D] over items that are projected from features, given in a table, or both added.

    Gradients of z, weight [D, F] and table [V, D], with features [V, w]; features are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor | None, table: Tensor | None, features: RowMatrix | None, plan: TilePlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        items, limits = ItemTiles(z, weight, table, features, plan), tile_limits(plan.impl, z.is_cuda)
        softmax, num_sizes = make_softmax(z, items), len(plan.sizes)
        lse = z.new_full((num_sizes if plan.teacher is None else num_sizes + 1, len(z)), -torch.inf)
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
                lse[:, rows] = torch.logaddexp(lse[:, rows], softmax.log_sum_exp(rows, tile, keep))
        ctx.save_for_backward(z, weight, table, lse)
        ctx.rest = features, plan, softmax.kept, kept_embeddings
        found = lse.masked_fill(lse <= LEFT_OUT / 2, -torch.inf)
        if plan.teacher is None:
            return found, None, None
        sizes, teacher = found[:num_sizes].clone(), found[num_sizes].clone()
        ctx.mark_non_differentiable(teacher)
        return sizes, teacher, torch.zeros_like(sizes)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_SN: Tensor, grad_teacher: Tensor | None, grad_taught: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        z, weight, table, lse = ctx.saved_tensors
        features, plan, kept, kept_embeddings = ctx.rest
        items, limits = ItemTiles(z, weight, table, features, plan), tile_limits(plan.impl, z.is_cuda)
        softmax = make_softmax(z, items)
        softmax.kept = kept
        gradients = Gradients(items, z, weight, table)
        inverse = grad_SN.new_tensor(plan.inverse)[:, None]
        weights_SN = grad_SN * inverse
        taught_SN = None if plan.teacher is None else given(grad_taught) * inverse
        for columns in _ranges(items.num_items, limits.items):
            tile = items.tile(columns, kept_embeddings.pop(columns.start, None))
            gradients.begin_items(tile)
            for rows in _ranges(len(z), limits.positions):
                taught_Sn = None if taught_SN is None else taught_SN[:, rows]
                gradients.add(rows, tile, softmax.score_grads(rows, tile, lse[:, rows], weights_SN[:, rows], taught_Sn))
            gradients.end_items(tile)
        grad_z, grad_weight, grad_table = gradients.finish()
        return grad_z, grad_weight, grad_table, None, None


def make_softmax(z: Tensor, items: ItemTiles) -> TileSoftmax:
    return TritonSoftmax(z, items.plan) if items.plan.impl == "triton" else TorchSoftmax(z, items)


class TorchSoftmax:
    """Tiles by PyTorch's operators, each chunk multiplied once.

    A teacher whose κ is 1 has the largest size's softmax, so that it takes no row of its own.
    """

    def __init__(self, z: Tensor, items: ItemTiles) -> None:
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._items, self._plan = items, items.plan
        self._factors = self._plan.inverse  # of the rows of scores
        if self._plan.teacher is not None and self._plan.teacher != 1:
            self._factors += (self._plan.inverse[-1] * self._plan.teacher,)
        self._buffer = z.new_empty(0)

    def kept_bytes(self, tile: ItemTile) -> int:
        return self._buffer.element_size() * tile.num_items * len(self._factors) * self._items.num_positions

    def log_sum_exp(self, rows: slice, tile: ItemTile, keep: bool) -> Tensor:
        shares, log_sum_exp = self._softmax(rows, tile, reuse=not keep)
        if keep:
            self.kept[tile.columns.start, rows.start] = shares, log_sum_exp
        return log_sum_exp

    def score_grads(
        self, rows: slice, tile: ItemTile, lse: Tensor, weights_Sn: Tensor, taught_Sn: Tensor | None
    ) -> Tensor:
        kept = self.kept.pop((tile.columns.start, rows.start), None)
        shares, log_sum_exp = kept if kept is not None else self._softmax(rows, tile, reuse=True)
        factors = (log_sum_exp - lse).exp()
        teacher = None if taught_Sn is None else shares[-1] * factors[-1, :, None]
        grads = shares[: len(weights_Sn)]
        grads *= (weights_Sn * factors[: len(weights_Sn)])[..., None]
        for j in range(len(grads) - 1, -1, -1):
            if j + 1 < len(grads):
                grads[j] += grads[j + 1]
            if teacher is not None:
                grads[j].addcmul_(teacher, given(taught_Sn)[j, :, None])
        return grads

    def _softmax(self, rows: slice, tile: ItemTile, reuse: bool) -> tuple[Tensor, Tensor]:
        """Softmax of a tile by itself, a row of scores each [·, n, v], and its log-sum-exp [S, n] or [S+1, n].

        The library's softmax reads each row once. The highest score's share is exp(0) over the sum, which gives it.
        """
        scores = self._scores(rows, tile, reuse)
        highest = scores.amax(2)
        shares = torch.softmax(scores, 2, out=scores)
        log_sum_exp = highest - shares.amax(2).log()
        return shares, torch.cat((log_sum_exp, log_sum_exp[-1:])) if self._plan.teacher == 1 else log_sum_exp

    def _scores(self, rows: slice, tile: ItemTile, reuse: bool) -> Tensor:
        """A row of each size and of a teacher whose κ is not 1, [·, n, v]; with ``reuse``, until the next call."""
        items, plan = self._items, self._plan
        shape = len(self._factors), rows.stop - rows.start, tile.num_items
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
        if len(scores) > len(plan.sizes):
            scores[-1] = scores[-2]
        for row, factor in zip(scores, self._factors, strict=True):
            if factor != 1:
                row *= factor
        if plan.correction is not None:
            correction = plan.correction.of_tile(rows, tile.columns)
            hits = correction.target_ids[:, None] == correction.item_ids
            scores += torch.where(hits, LEFT_OUT, correction.offsets)  # LEFT_OUT plus a score rounds to itself
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
        self._tiles = TritonTiles(plan.sizes, plan.inverse, plan.teacher, plan.dtype, z.device)

    def kept_bytes(self, tile: ItemTile) -> int:
        return 0

    def log_sum_exp(self, rows: slice, tile: ItemTile, keep: bool) -> Tensor:
        return self._tiles.log_sum_exp(self._z[rows], tile.transposed.T, self._correction_of(rows, tile))

    def score_grads(
        self, rows: slice, tile: ItemTile, lse: Tensor, weights_Sn: Tensor, taught_Sn: Tensor | None
    ) -> Tensor:
        correction = self._correction_of(rows, tile)
        return self._tiles.score_grads(self._z[rows], tile.transposed.T, correction, lse, weights_Sn, taught_Sn)

    def _correction_of(self, rows: slice, tile: ItemTile) -> Any:
        return None if self._correction is None else self._correction.of_tile(rows, tile.columns)


def _ranges(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
