"""Nested cross-entropy over the full catalogue (paper eq. 13-14): every size's loss from one pass over the items.

N positions, V items, D width, S sizes. The score of size m_j is the score of m_{j-1} plus the product of chunk j alone,
so one pass over D yields the scores of all sizes. Logits exist only as one tile of positions × items at a time, folded
into a running log-sum-exp per size; the backward pass recomputes the tile. There, size i pulls chunk j whenever i ≥ j,
so the gradient of chunk j is driven by the sum of the softmaxes of all sizes i ≥ j.

Cost: N·V·D multiplications forward, 3·N·V·D backward, S exponentials per score in each; memory N·S + S tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmrl_dist.ops.nested import chunks, matmul_linear

TILE_POSITIONS = 256
TILE_ITEMS = 512


def nested_cross_entropy(
    z: Tensor,
    items: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    impl: str = "tiled",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of each size, summed over positions.

    Args:
        z: outputs [N, D], float32 or float64.
        items: item embeddings [V, D], of the same dtype.
        targets: int64 [N], the right item of each position.
        sizes: trained sizes, the last one D.
        impl: "tiled", or "plain" (all logits at once; the specification).
        dtype: of the products' inputs, z's own if None; log-sum-exp and sums stay in z's dtype.

    Returns:
        [S], differentiable in z and items.
    """
    if impl == "plain":
        return _plain(z, items, targets, sizes, dtype)
    return _Tiled.apply(z, items, targets, tuple(sizes), dtype or z.dtype)


def _plain(z: Tensor, items: Tensor, targets: Tensor, sizes: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    scores = (matmul_linear(z[:, :m], items[:, :m], dtype) for m in sizes)
    return torch.stack([F.cross_entropy(scores_NV, targets, reduction="sum") for scores_NV in scores])


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, items: Tensor, targets: Tensor, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        products = (z * items[targets]).split([high - low for low, high in chunks(sizes)], 1)
        target_scores_SN = torch.stack([p.sum(1) for p in products]).cumsum(0)
        scorer = _TileScorer(z, items, sizes, dtype)
        lse_SN = z.new_empty(len(sizes), len(z))
        for rows in _ranges(len(z), TILE_POSITIONS):
            lse_SN[:, rows] = _log_sum_exp(scorer, rows, len(items))
        ctx.save_for_backward(z, items, targets, lse_SN)
        ctx.sizes, ctx.dtype = sizes, dtype
        return (lse_SN - target_scores_SN).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        z, items, targets, lse_SN = ctx.saved_tensors
        grad_z, grad_items = torch.zeros_like(z), torch.zeros_like(items)
        scorer = _TileScorer(z, items, ctx.sizes, ctx.dtype)
        z_in, items_in, weights = z.to(ctx.dtype), items.to(ctx.dtype), grad_S.tolist()
        for rows in _ranges(len(z), TILE_POSITIONS):
            for columns in _ranges(len(items), TILE_ITEMS):
                pulls = _suffix_softmax(scorer(rows, columns), lse_SN[:, rows], weights)
                for (low, high), pull in zip(chunks(ctx.sizes), pulls, strict=True):
                    pull_in = pull.to(ctx.dtype)
                    _add_product(grad_z[rows, low:high], pull_in, items_in[columns, low:high])
                    _add_product(grad_items[columns, low:high], pull_in.T, z_in[rows, low:high])
        widths = torch.tensor([high - low for low, high in chunks(ctx.sizes)], device=z.device)
        target_pull_D = grad_S.flip(0).cumsum(0).flip(0).repeat_interleave(widths)
        grad_z -= items[targets] * target_pull_D
        grad_items.index_add_(0, targets, z * target_pull_D, alpha=-1)
        return grad_z, grad_items, None, None, None


class _TileScorer:
    """Scores of every size for one tile of positions × items, each chunk multiplied once, in a buffer used again."""

    def __init__(self, z: Tensor, items: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> None:
        widths = [high - low for low, high in chunks(sizes)]
        self._z, self._items = z.to(dtype).split(widths, 1), items.to(dtype).split(widths, 1)
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
    """Log-sum-exp of every size over the whole catalogue, [S, n], folded tile by tile."""
    first, *others = _ranges(num_items, TILE_ITEMS)
    scores = scorer(rows, first)
    highest = scores.amax(2)
    total = scores.sub_(highest[..., None]).exp_().sum(2)
    for columns in others:
        scores = scorer(rows, columns)
        new_highest = torch.maximum(highest, scores.amax(2))
        total = total * (highest - new_highest).exp() + scores.sub_(new_highest[..., None]).exp_().sum(2)
        highest = new_highest
    return highest + total.log()


def _suffix_softmax(scores: Tensor, lse: Tensor, weights: list[float]) -> Tensor:
    """Σ_{i≥j} w_i softmax_i of one tile, [S, n, v], in the place of its scores."""
    pulls = scores.sub_(lse[..., None]).exp_()
    pulls[-1] *= weights[-1]
    for j in range(len(pulls) - 2, -1, -1):
        torch.add(pulls[j + 1], pulls[j], alpha=weights[j], out=pulls[j])
    return pulls
