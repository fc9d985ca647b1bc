"""Nested log-sum-exp: the normaliser of every size's softmax from one pass over the items (paper eq. 13-14).

N positions, V items, F feature columns, D width, S sizes. The score of size m_j is the score of m_{j-1} plus the
product of chunk j alone, so one pass over D yields the scores of all sizes. Here is what is computed, and the plain
form that says so; how it is computed without ever holding the scores is in :mod:`fmrl_dist.losses.tiled_log_sum_exp`
and :mod:`fmrl_dist.losses.triton_log_sum_exp`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmrl_dist.losses.tiled_log_sum_exp import Correction, RowMatrix, Settings, TiledLogSumExp, back_projected
from fmrl_dist.model.nested import chunks, matmul_linear


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
        impl: "tiled"; "compiled", the same with its element-wise part compiled; "triton", kernels of their own, float32
            sums; or "plain" (all scores at once; the specification).
        dtype: of the products' inputs, z's own if None; exponentials and sums stay in z's dtype.

    Returns:
        [S, N], differentiable in z and items.
    """
    inverse = _inverse(temperatures, sizes)
    if impl == "plain":
        return _plain(z, items, sizes, inverse, correction, dtype)
    if impl == "triton":
        from fmrl_dist.losses.triton_log_sum_exp import TritonLogSumExp

        three = (correction.offsets, correction.item_ids, correction.target_ids) if correction else (None,) * 3
        return TritonLogSumExp.apply(z, items, sizes, inverse, *three, dtype or z.dtype)
    settings = Settings(tuple(sizes), inverse, correction, dtype or z.dtype, impl == "compiled", (False,) * len(sizes))
    return TiledLogSumExp.apply(z, None, items, None, settings)


def catalogue_log_sum_exp(
    z: Tensor,
    features: RowMatrix,
    weight: Tensor,
    table: Tensor | None,
    sizes: Sequence[int],
    temperatures: Sequence[float] | None = None,
    impl: str = "tiled",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`nested_log_sum_exp` over the items that ``weight`` projects from ``features``.

    Args:
        z: outputs [N, D], float32 or float64.
        features: [V, F], frozen, read a tile of rows at a time.
        weight: W_proj [D, F].
        table: [V, D], added to the projected embeddings; None for nothing.
        sizes, temperatures, impl, dtype: as in :func:`nested_log_sum_exp`.

    Returns:
        [S, N], differentiable in z, weight and table.
    """
    inverse, dtype = _inverse(temperatures, sizes), dtype or z.dtype
    if impl in ("plain", "triton"):  # the catalogue's embeddings whole
        items = matmul_linear(features[:].to(z.dtype), weight, dtype)
        return nested_log_sum_exp(z, items if table is None else items + table, sizes, temperatures, None, impl, dtype)
    # A table's rows are added to the embeddings, so there they are needed.
    back = back_projected(sizes, len(z), features.shape[1]) if table is None else (False,) * len(sizes)
    return TiledLogSumExp.apply(
        z, weight, table, features, Settings(tuple(sizes), inverse, None, dtype, impl == "compiled", back)
    )


def _inverse(temperatures: Sequence[float] | None, sizes: Sequence[int]) -> tuple[float, ...]:
    return tuple(1 / t for t in temperatures) if temperatures is not None else (1.0,) * len(sizes)


def _plain(
    z: Tensor,
    items: Tensor,
    sizes: Sequence[int],
    inverse: Sequence[float],
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
