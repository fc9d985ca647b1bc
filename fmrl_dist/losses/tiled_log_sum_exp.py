"""The nested log-sum-exp tile by tile, forward and backward; :mod:`fmrl_dist.losses.log_sum_exp` is the specification.

N positions, V items, F feature columns, D width, S sizes. Scores exist only as one tile of positions × items at a
time, whose softmax is folded into a running log-sum-exp per size. In the backward pass size i pulls chunk j whenever
i ≥ j, so the gradient of chunk j is driven by the sum of the weighted softmaxes of all sizes i ≥ j.

The items' embeddings are given, or projected from frozen features inside the loop, tile by tile. A chunk of width w may
also be projected *back*: z_c (X W_cᵀ)ᵀ = (z_c W_c) Xᵀ, which takes the positions to the features instead of the items
to the width. Multiplications of one item, forward and backward, where tiles are kept for the backward pass:

    project         w·F for the embedding, N·w for its score;  2·N·w + w·F back
    back-project    N·F for the score;                         N·F back

so few positions and wide chunks are better projected back, chunk by chunk (:func:`back_projected`).

Tiles are kept for the backward pass until ``KEPT_BYTES`` are spent; the others are computed again there. Memory beyond
inputs and gradients: N·S, back-projected N·F, a tile, and what is kept; none of it grows with V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmrl_dist.model.nested import add_product, chunks

TILE_POSITIONS = 512  # on the CPU, where a tile of every size should stay in the cache
TILE_ITEMS = 1024
KEPT_BYTES = 128 * 2**20
GPU_FACTOR = 4  # by which each of them is larger on a GPU: few kernels of much work; not measured
LEFT_OUT = torch.finfo(torch.float32).min  # score of an item that a position may not see; its exponential is 0


class RowMatrix(Protocol):
    """A matrix read by slices of rows: a tensor, or a table that stays on disk."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Correction:
    """What is added to the scores of sampled items, and which of them a position may not see."""

    offsets: Tensor  # [V], added to every size's score; no gradient
    item_ids: Tensor  # int64 [V]
    target_ids: Tensor  # int64 [N]; an item with a position's target's id is left out for that position


def back_projected(sizes: Sequence[int], num_positions: int, num_features: int) -> tuple[bool, ...]:
    """Which chunks cost fewer multiplications projected back, by the count in the module's docstring."""
    return tuple(
        2 * num_positions * num_features < 2 * (high - low) * num_features + 3 * num_positions * (high - low)
        for low, high in chunks(sizes)
    )


@dataclass(frozen=True)
class Settings:
    """What does not change from tile to tile."""

    sizes: tuple[int, ...]
    inverse: tuple[float, ...]  # 1 / τ of each size
    correction: Correction | None
    dtype: torch.dtype  # of the products' inputs
    compiled: bool
    back: tuple[bool, ...]  # which chunks are projected back


@dataclass(frozen=True)
class _Softmax:
    """Softmax of one tile by itself, and the logarithm of what it was divided by."""

    shares: Tensor  # [S, n, v]
    log_sum_exp: Tensor  # [S, n]


class TiledLogSumExp(torch.autograd.Function):
    """Log-sum-exp [S, N] of ``z`` [N, D] over items that are projected from features, given in a table, or both added.

    Gradients of z, weight [D, F] and table [V, D]; features are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor | None, table: Tensor | None, features: RowMatrix | None, settings: Settings
    ) -> Tensor:
        scorer = _Scorer(z, weight, table, features, settings)
        softmax = _compiled(_softmax) if settings.compiled else _softmax
        lse_SN = z.new_full((len(settings.sizes), len(z)), -torch.inf)
        kept: dict[tuple[int, int], _Softmax] = {}
        kept_embeddings: dict[int, Tensor] = {}
        factor = GPU_FACTOR if z.is_cuda else 1
        budget = KEPT_BYTES * factor if any(ctx.needs_input_grad) else 0
        for columns in _ranges(scorer.num_items, TILE_ITEMS * factor):
            tile = scorer.item_tile(columns)
            num_bytes = z.element_size() * tile.num_items * (len(settings.sizes) * len(z) + len(tile.transposed))
            keep = num_bytes <= budget
            if keep:
                budget -= num_bytes
                kept_embeddings[columns.start] = tile.transposed.clone()  # not what it was split from
            for rows in _ranges(len(z), TILE_POSITIONS * factor):
                tile_softmax = _Softmax(*softmax(scorer.scores(rows, tile, reuse=not keep)))
                lse_SN[:, rows] = torch.logaddexp(lse_SN[:, rows], tile_softmax.log_sum_exp)
                if keep:
                    kept[columns.start, rows.start] = tile_softmax
        ctx.save_for_backward(z, weight, table, lse_SN)
        ctx.rest = features, settings, kept, kept_embeddings
        return lse_SN.masked_fill(lse_SN <= LEFT_OUT / 2, -torch.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, table, lse_SN = ctx.saved_tensors
        features, settings, kept, kept_embeddings = ctx.rest
        scorer = _Scorer(z, weight, table, features, settings)
        softmax = _compiled(_softmax) if settings.compiled else _softmax
        pull = _compiled(_pull) if settings.compiled else _pull
        gradients = _Gradients(scorer, z, weight, table)
        weights_SN = grad_SN * grad_SN.new_tensor(settings.inverse)[:, None]
        factor = GPU_FACTOR if z.is_cuda else 1
        for columns in _ranges(scorer.num_items, TILE_ITEMS * factor):
            known = kept_embeddings.pop(columns.start, None)
            tile = scorer.item_tile(columns, known)
            gradients.begin_items(tile)
            for rows in _ranges(len(z), TILE_POSITIONS * factor):
                tile_softmax = kept.pop((columns.start, rows.start), None)
                if tile_softmax is None:
                    tile_softmax = _Softmax(*softmax(scorer.scores(rows, tile, reuse=True)))
                factors = weights_SN[:, rows] * (tile_softmax.log_sum_exp - lse_SN[:, rows]).exp()
                gradients.add(rows, tile, pull(tile_softmax.shares, factors))
            gradients.end_items(tile)
        grad_z, grad_weight, grad_table = gradients.finish()
        return grad_z, grad_weight, grad_table, None, None


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of ``scores`` [S, n, v] over the items, in place, and its log-sum-exp [S, n].

    The library's softmax reads each row once. The highest score's share is exp(0) over the sum, which gives the sum.
    """
    highest = scores.amax(2)
    shares = torch.softmax(scores, 2, out=scores)
    return shares, highest - shares.amax(2).log()


def _pull(shares: Tensor, factors: Tensor) -> Tensor:
    """What drives each chunk's gradient, [S, n, v] in place: Σ_{i ≥ j} factor_i · shares_i."""
    pulls = shares.mul_(factors[..., None])
    for j in range(len(pulls) - 2, -1, -1):
        pulls[j] += pulls[j + 1]
    return pulls


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True)
class _ItemTile:
    """Some items, with what the projection makes of them."""

    columns: slice
    features: Tensor | None  # [v, F]
    back_scores: Tensor | None  # [B·N, v], the score of each of the B chunks projected back by itself
    transposed: Tensor  # embeddings [w, v], the channels of the chunks not projected back

    @property
    def num_items(self) -> int:
        return self.columns.stop - self.columns.start


class _Scorer:
    """Scores of every size for one tile of positions × items, each chunk multiplied once.

    All that meets the features is stacked, so that one product a tile does it:
    ``projector`` [B·N + w, F] = the B back-projected chunks of z, then the weight's chunks that are not projected back.
    """

    def __init__(
        self, z: Tensor, weight: Tensor | None, table: Tensor | None, features: RowMatrix | None, settings: Settings
    ) -> None:
        self.settings, self.num_positions = settings, len(z)
        self.num_items = int(features.shape[0]) if features is not None else len(_given(table))
        bounds = chunks(settings.sizes)
        self.z_chunks = [z[:, low:high].to(settings.dtype) for low, high in bounds]
        self.back_rows = len(z) * sum(settings.back)
        self.embedded: list[slice | None] = []  # of each chunk, its channels among the embeddings; None where back
        begin = 0
        for (low, high), back in zip(bounds, settings.back, strict=True):
            self.embedded.append(None if back else slice(begin, begin + high - low))
            begin += 0 if back else high - low
        self.num_embedded = begin
        self._table, self._features, self._buffer = table, features, z.new_empty(0)
        self.weight_chunks: list[Tensor] = []
        if weight is not None:
            self.weight_chunks = [weight[low:high].to(settings.dtype) for low, high in bounds]
            parts = list(zip(self.z_chunks, self.weight_chunks, settings.back, strict=True))
            self.projector = torch.cat(
                [z @ w for z, w, back in parts if back] + [w for _, w, back in parts if not back]
            )

    def item_tile(self, columns: slice, transposed: Tensor | None = None) -> _ItemTile:
        """The items of ``columns``; with the embeddings given only to pull them, not to score them."""
        if self._features is None:
            return _ItemTile(columns, None, None, _given(self._table)[columns].to(self.settings.dtype).T)
        features = self._features[columns].to(self.settings.dtype)
        if transposed is not None:
            return _ItemTile(columns, features, None, transposed)
        back_scores, transposed = (self.projector @ features.T).split((self.back_rows, self.num_embedded))
        if self._table is not None:
            transposed = (transposed + self._table[columns].T).to(self.settings.dtype)
        return _ItemTile(columns, features, back_scores, transposed)

    def scores(self, rows: slice, tile: _ItemTile, reuse: bool) -> Tensor:
        """[S, n, v]; with ``reuse`` the next such call overwrites it."""
        shape = len(self.z_chunks), rows.stop - rows.start, tile.num_items
        scores = self._reused(shape) if reuse else self._buffer.new_empty(shape)
        back_begin = 0
        for j, (z_chunk, channels) in enumerate(zip(self.z_chunks, self.embedded, strict=True)):
            if channels is None:
                product = _given(tile.back_scores)[back_begin + rows.start : back_begin + rows.stop]
                back_begin += self.num_positions
            elif z_chunk.dtype == scores.dtype:
                product = torch.mm(z_chunk[rows], tile.transposed[channels], out=scores[j])
            else:
                product = z_chunk[rows] @ tile.transposed[channels]
            if j > 0:
                torch.add(scores[j - 1], product, out=scores[j])
            elif product.data_ptr() != scores.data_ptr():
                scores[0] = product
        for size_scores, factor in zip(scores, self.settings.inverse, strict=True):
            if factor != 1:
                size_scores *= factor
        if self.settings.correction is not None:
            correction, columns = self.settings.correction, tile.columns
            scores += correction.offsets[columns]
            scores.masked_fill_(correction.target_ids[rows, None] == correction.item_ids[columns], LEFT_OUT)
        return scores

    def _reused(self, shape: tuple[int, int, int]) -> Tensor:
        size = shape[0] * shape[1] * shape[2]
        if self._buffer.numel() < size:
            self._buffer = self._buffer.new_empty(size)
        return self._buffer[:size].view(shape)


class _Gradients:
    """Sums of the gradients over tiles, in z's dtype."""

    def __init__(self, scorer: _Scorer, z: Tensor, weight: Tensor | None, table: Tensor | None) -> None:
        self._scorer, self._dtype = scorer, scorer.settings.dtype
        self._grad_z = torch.zeros_like(z)
        self._grad_projector = None if weight is None else torch.zeros_like(scorer.projector, dtype=z.dtype)
        self._grad_table = None if table is None else torch.zeros_like(table)
        self._pulls = z.new_empty(0)

    def begin_items(self, tile: _ItemTile) -> None:
        """Start on the next items; the rows of ``_tile_pulls`` drive the rows of the projector."""
        if self._pulls.numel() == 0:  # the first tile is the largest
            rows = self._scorer.back_rows + self._scorer.num_embedded
            self._pulls = self._grad_z.new_empty(rows, tile.num_items)
        self._tile_pulls = self._pulls[:, : tile.num_items]
        self._tile_pulls[self._scorer.back_rows :] = 0

    def add(self, rows: slice, tile: _ItemTile, pulls: Tensor) -> None:
        """One tile of positions × items."""
        scorer, back_begin = self._scorer, 0
        grad_embeddings = self._tile_pulls[scorer.back_rows :]
        bounds = chunks(scorer.settings.sizes)
        for (low, high), z_chunk, channels, pull in zip(bounds, scorer.z_chunks, scorer.embedded, pulls, strict=True):
            if channels is None:
                self._tile_pulls[back_begin + rows.start : back_begin + rows.stop] = pull
                back_begin += scorer.num_positions
            else:
                pull_in = pull.to(self._dtype)
                add_product(self._grad_z[rows, low:high], pull_in, tile.transposed[channels].T)
                add_product(grad_embeddings[channels], z_chunk[rows].T, pull_in)

    def end_items(self, tile: _ItemTile) -> None:
        """All positions have pulled these items: on to what the embeddings were made of."""
        if self._grad_table is not None:
            self._grad_table[tile.columns] = self._tile_pulls[self._scorer.back_rows :].T
        if self._grad_projector is not None:
            add_product(self._grad_projector, self._tile_pulls.to(self._dtype), _given(tile.features))

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of z, weight and table."""
        if self._grad_projector is None:
            return self._grad_z, None, self._grad_table
        scorer, back_begin, parts = self._scorer, 0, []
        bounds = chunks(scorer.settings.sizes)
        for (low, high), z_chunk, weight, channels in zip(
            bounds, scorer.z_chunks, scorer.weight_chunks, scorer.embedded, strict=True
        ):
            if channels is None:
                grad = self._grad_projector[back_begin : back_begin + scorer.num_positions].to(self._dtype)
                back_begin += scorer.num_positions
                add_product(self._grad_z[:, low:high], grad, weight.T)
                parts.append((z_chunk.T @ grad).to(self._grad_z.dtype))
            else:
                parts.append(self._grad_projector[scorer.back_rows :][channels])
        return self._grad_z, torch.cat(parts), self._grad_table


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _ranges(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
