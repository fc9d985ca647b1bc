"""Nested log-sum-exp: the normaliser of every size's softmax from one pass over the items (paper eq. 13-14).

N positions, V items, D width, S sizes. The score of size m_j is the score of m_{j-1} plus the product of chunk j alone,
so one pass over D yields the scores of all sizes. Scores exist only as one tile of positions × items at a time, folded
into a running log-sum-exp per size; the backward pass recomputes the tile. There, size i pulls chunk j whenever i ≥ j,
so the gradient of chunk j is driven by the sum of the weighted softmaxes of all sizes i ≥ j.

Cost: N·V·D multiplications forward, 3·N·V·D backward, S exponentials per score in each; memory N·S + S tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmrl_dist.ops.nested import chunks, matmul_linear

TILE_POSITIONS = 256
TILE_ITEMS = 512


@dataclass(frozen=True)
class Correction:
    """What is added to the scores of sampled items, and which of them a position may not see."""

    offsets: Tensor  # [V], added to every size's score; no gradient
    item_ids: Tensor  # int64 [V]
    target_ids: Tensor  # int64 [N]; an item with a position's target's id is left out for that position


def nested_scores(z: Tensor, items: Tensor, sizes: Sequence[int]) -> Tensor:
    """Score of each position's own item at every size, [S, N], from z and items [N, D]."""
    products = (z * items).split([high - low for low, high in chunks(sizes)], 1)
    return torch.stack([product.sum(1) for product in products]).cumsum(0)


def nested_log_sum_exp(
    z: Tensor,
    items: Tensor,
    sizes: Sequence[int],
    temperatures: Sequence[float] | None = None,
    correction: Correction | None = None,
    impl: str = "tiled",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """log Σ_v exp(z_:m · items_v,:m / τ_m + offset_v) for every size m and position.

    Args:
        z: outputs [N, D], float32 or float64.
        items: embeddings [V, D], of the same dtype.
        sizes: trained sizes, the last one D.
        temperatures: τ of each size; None for 1.
        correction: of sampled items; None where items are the whole catalogue. -inf where it leaves no item.
        impl: "tiled", or "plain" (all scores at once; the specification).
        dtype: of the products' inputs, z's own if None; exponentials and sums stay in z's dtype.

    Returns:
        [S, N], differentiable in z and items.
    """
    inverse = [1 / t for t in temperatures] if temperatures is not None else [1.0] * len(sizes)
    if impl == "plain":
        return _plain(z, items, sizes, inverse, correction, dtype)
    return _Tiled.apply(z, items, tuple(sizes), inverse, correction, dtype or z.dtype)


def _plain(
    z: Tensor,
    items: Tensor,
    sizes: Sequence[int],
    inverse: list[float],
    correction: Correction | None,
    dtype: torch.dtype | None,
) -> Tensor:
    scores = torch.stack(
        [matmul_linear(z[:, :m], items[:, :m], dtype) * factor for m, factor in zip(sizes, inverse, strict=True)]
    )
    if correction is not None:
        hits = correction.target_ids[:, None] == correction.item_ids
        scores = (scores + correction.offsets).masked_fill(hits, -torch.inf)
    return scores.logsumexp(2)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        items: Tensor,
        sizes: tuple[int, ...],
        inverse: list[float],
        correction: Correction | None,
        dtype: torch.dtype,
    ) -> Tensor:
        scorer = _TileScorer(z, items, sizes, inverse, correction, dtype)
        lse_SN = z.new_empty(len(sizes), len(z))
        for rows in _ranges(len(z), TILE_POSITIONS):
            lse_SN[:, rows] = _log_sum_exp(scorer, rows, len(items))
        ctx.save_for_backward(z, items, lse_SN)
        ctx.rest = sizes, inverse, correction, dtype
        return lse_SN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor | None, ...]:
        z, items, lse_SN = ctx.saved_tensors
        sizes, inverse, correction, dtype = ctx.rest
        grad_z, grad_items = torch.zeros_like(z), torch.zeros_like(items)
        scorer = _TileScorer(z, items, sizes, inverse, correction, dtype)
        z_in, items_in = z.to(dtype), items.to(dtype)
        weights_SN = grad_SN * grad_SN.new_tensor(inverse)[:, None]
        # A weighted softmax is one exponential: w·exp(s - lse) = sign(w)·exp(s - (lse - log |w|)).
        shift_SN = lse_SN.clamp_min(torch.finfo(z.dtype).min) - weights_SN.abs().log()
        signs_SN = weights_SN.sign() if bool((weights_SN < 0).any()) else None
        for rows in _ranges(len(z), TILE_POSITIONS):
            for columns in _ranges(len(items), TILE_ITEMS):
                pulls = scorer(rows, columns).sub_(shift_SN[:, rows, None]).exp_()
                if signs_SN is not None:
                    pulls *= signs_SN[:, rows, None]
                for j in range(len(pulls) - 2, -1, -1):
                    pulls[j] += pulls[j + 1]
                for (low, high), pull in zip(chunks(sizes), pulls, strict=True):
                    pull_in = pull.to(dtype)
                    _add_product(grad_z[rows, low:high], pull_in, items_in[columns, low:high])
                    _add_product(grad_items[columns, low:high], pull_in.T, z_in[rows, low:high])
        return grad_z, grad_items, None, None, None, None


class _TileScorer:
    """Scores of every size for one tile of positions × items, each chunk multiplied once, in a buffer used again."""

    def __init__(
        self,
        z: Tensor,
        items: Tensor,
        sizes: Sequence[int],
        inverse: list[float],
        correction: Correction | None,
        dtype: torch.dtype,
    ) -> None:
        widths = [high - low for low, high in chunks(sizes)]
        self._z, self._items = z.to(dtype).split(widths, 1), items.to(dtype).split(widths, 1)
        self._inverse, self._correction = inverse, correction
        self._buffer = z.new_empty(len(sizes), min(len(z), TILE_POSITIONS), min(len(items), TILE_ITEMS))

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        """[S, n, v]; the next call overwrites it."""
        scores = self._buffer[:, : rows.stop - rows.start, : columns.stop - columns.start]
        for j, (z, items) in enumerate(zip(self._z, self._items, strict=True)):
            z_rows, items_T = z[rows], items[columns].T
            if z.dtype != scores.dtype:
                scores[j] = z_rows @ items_T
                if j > 0:
                    scores[j] += scores[j - 1]
            elif j == 0:
                torch.mm(z_rows, items_T, out=scores[0])
            else:
                torch.addmm(scores[j - 1], z_rows, items_T, out=scores[j])
        for size_scores, factor in zip(scores, self._inverse, strict=True):
            if factor != 1:
                size_scores *= factor
        if self._correction is not None:
            scores += self._correction.offsets[columns]
            hits = self._correction.target_ids[rows, None] == self._correction.item_ids[columns]
            scores.masked_fill_(hits, -torch.inf)
        return scores


def _ranges(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a · b, in place, also where a and b are of a narrower dtype."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator += a @ b


def _log_sum_exp(scorer: _TileScorer, rows: slice, num_items: int) -> Tensor:
    """Log-sum-exp of every size over all items, [S, n], folded tile by tile."""
    first, *others = _ranges(num_items, TILE_ITEMS)
    scores = scorer(rows, first)
    highest = _finite(scores.amax(2))
    total = scores.sub_(highest[..., None]).exp_().sum(2)
    for columns in others:
        scores = scorer(rows, columns)
        new_highest = torch.maximum(highest, scores.amax(2))
        total = total * (highest - new_highest).exp() + scores.sub_(new_highest[..., None]).exp_().sum(2)
        highest = new_highest
    return highest + total.log()


def _finite(highest: Tensor) -> Tensor:
    """A maximum that can be subtracted from -inf, where every item was left out."""
    return highest.clamp_min(torch.finfo(highest.dtype).min)
