"""Tiles of items: embeddings given, or projected from frozen features tile by tile; and the gradients of either.

N positions, n of a tile; V items, v of a tile; F feature columns, D width, S sizes, B chunks projected back.

A chunk of width w may also be projected *back*: z_c (X W_cᵀ)ᵀ = (z_c W_c) Xᵀ, which takes the positions to the features
instead of the items to the width. Multiplications of one item, forward and backward, where tiles are kept for the
backward pass:

    project         w·F for the embedding, N·w for its score;  2·N·w + w·F back
    back-project    N·F for the score;                         N·F back

so few positions and wide chunks are better projected back, chunk by chunk (:func:`back_projected`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fmrl_dist.losses.settings import Correction
from fmrl_dist.model.nested import add_prefix, add_product, chunks


class RowMatrix(Protocol):
    """A matrix read by slices of rows: a tensor, or a table that stays on disk."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


def back_projected(sizes: Sequence[int], num_positions: int, num_features: int) -> tuple[bool, ...]:
    """Which chunks cost fewer multiplications projected back, by the count in the module's docstring."""
    return tuple(
        2 * num_positions * num_features < 2 * (high - low) * num_features + 3 * num_positions * (high - low)
        for low, high in chunks(sizes)
    )


@dataclass(frozen=True)
class TilePlan:
    """What does not change from tile to tile."""

    sizes: tuple[int, ...]
    inverse: tuple[float, ...]  # 1 / τ of each size
    teacher: float | None  # 1 / κ where the largest size teaches the others
    correction: Correction | None
    dtype: torch.dtype  # of the products' inputs
    impl: str  # tiled or triton
    back: tuple[bool, ...]  # which chunks are projected back; never any with Triton


@dataclass(frozen=True)
class ItemTile:
    """Some items and their projections."""

    columns: slice
    features: Tensor | None  # [v, F]
    back_scores: Tensor | None  # [B·N, v], the score of each of the B chunks projected back by itself
    transposed: Tensor  # embeddings [w, v], the channels of the chunks not projected back

    @property
    def num_items(self) -> int:
        return self.columns.stop - self.columns.start


class ItemTiles:
    """Makes the tiles of items.

    All factors of the features are stacked, so that one product per tile computes everything:
    ``projector`` [B·N + w, F] = the B back-projected chunks of z, then the weight's chunks that are not projected back.
    """

    def __init__(
        self, z: Tensor, weight: Tensor | None, table: Tensor | None, features: RowMatrix | None, plan: TilePlan
    ) -> None:
        self.plan, self.num_positions = plan, len(z)
        self.num_items = int(features.shape[0]) if features is not None else len(given(table))
        bounds = chunks(plan.sizes)
        self.z_chunks = [z[:, low:high].to(plan.dtype) for low, high in bounds]
        self.back_rows = len(z) * sum(plan.back)
        self.embedded: list[slice | None] = []  # of each chunk, its channels among the embeddings; None where back
        begin = 0
        for (low, high), back in zip(bounds, plan.back, strict=True):
            self.embedded.append(None if back else slice(begin, begin + high - low))
            begin += 0 if back else high - low
        self.num_embedded = begin
        self._table, self._features = table, features
        self.weight_chunks: list[Tensor] = []
        if weight is not None:
            self.weight_chunks = [weight[low:high].to(plan.dtype) for low, high in bounds]
            parts = list(zip(self.z_chunks, self.weight_chunks, plan.back, strict=True))
            self.projector = torch.cat(
                [z @ w for z, w, back in parts if back] + [w for _, w, back in parts if not back]
            )

    def tile(self, columns: slice, transposed: Tensor | None = None) -> ItemTile:
        """The items of ``columns``; with given embeddings, only for the gradients, not to score them."""
        dtype = self.plan.dtype
        if self._features is None:
            return ItemTile(columns, None, None, given(self._table)[columns].to(dtype).T)
        features = self._features[columns].to(dtype)
        if transposed is not None:
            return ItemTile(columns, features, None, transposed)
        if self.plan.impl == "triton":  # whose kernels read an item's channels side by side
            back_scores, transposed = None, (features @ self.projector.T).T
        else:
            back_scores, transposed = (self.projector @ features.T).split((self.back_rows, self.num_embedded))
        if self._table is not None:
            transposed = add_prefix(transposed.T, self._table[columns]).T.to(dtype)
        return ItemTile(columns, features, back_scores, transposed)


class Gradients:
    """Sums of the gradients over tiles, in z's dtype."""

    def __init__(self, items: ItemTiles, z: Tensor, weight: Tensor | None, table: Tensor | None) -> None:
        self._items, self._dtype = items, items.plan.dtype
        self._grad_z = torch.zeros_like(z)
        self._grad_projector = None if weight is None else torch.zeros_like(items.projector, dtype=z.dtype)
        self._grad_table = None if table is None else torch.zeros_like(table)
        self._buffer = z.new_empty(0)

    def begin_items(self, tile: ItemTile) -> None:
        """Start on the next items. ``_tile_grads``: gradients of the projector's products with their features."""
        if self._buffer.numel() == 0:  # the first tile is the largest
            rows = self._items.back_rows + self._items.num_embedded
            self._buffer = self._grad_z.new_empty(rows, tile.num_items)
        self._tile_grads = self._buffer[:, : tile.num_items]
        self._tile_grads[self._items.back_rows :] = 0

    def add(self, rows: slice, tile: ItemTile, score_grads: Tensor) -> None:
        """Add one tile of positions × items, from the gradients of each chunk's products [S, n, v]."""
        items, back_begin = self._items, 0
        grad_embeddings = self._tile_grads[items.back_rows :]
        bounds = chunks(items.plan.sizes)
        for (low, high), z_chunk, channels, grad in zip(
            bounds, items.z_chunks, items.embedded, score_grads, strict=True
        ):
            if channels is None:
                self._tile_grads[back_begin + rows.start : back_begin + rows.stop] = grad
                back_begin += items.num_positions
            else:
                grad_in = grad.to(self._dtype)
                add_product(self._grad_z[rows, low:high], grad_in, tile.transposed[channels].T)
                add_product(grad_embeddings[channels], z_chunk[rows].T, grad_in)

    def end_items(self, tile: ItemTile) -> None:
        """All positions of these items are added: pass the gradients on to projector and table."""
        if self._grad_table is not None:
            grads = self._tile_grads[self._items.back_rows :].T
            self._grad_table[tile.columns] = grads[:, : self._grad_table.shape[1]]
        if self._grad_projector is not None:
            add_product(self._grad_projector, self._tile_grads.to(self._dtype), given(tile.features))

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of z, weight and table."""
        if self._grad_projector is None:
            return self._grad_z, None, self._grad_table
        items, back_begin, parts = self._items, 0, []
        bounds = chunks(items.plan.sizes)
        for (low, high), z_chunk, weight, channels in zip(
            bounds, items.z_chunks, items.weight_chunks, items.embedded, strict=True
        ):
            if channels is None:
                grad = self._grad_projector[back_begin : back_begin + items.num_positions].to(self._dtype)
                back_begin += items.num_positions
                add_product(self._grad_z[:, low:high], grad, weight.T)
                parts.append((z_chunk.T @ grad).to(self._grad_z.dtype))
            else:
                parts.append(self._grad_projector[items.back_rows :][channels])
        return self._grad_z, torch.cat(parts), self._grad_table


def given(tensor: Tensor | None) -> Tensor:
    """The tensor, where the caller knows that there is one."""
    assert tensor is not None
    return tensor
