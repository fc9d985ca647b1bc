"""Nested log-sum-exp: the normaliser of every size's softmax from one pass over the items (paper eq. 13-14).

N positions, V items, F feature columns, D width, S sizes. The score of size m_j is the score of m_{j-1} plus the
product of chunk j alone, so one pass over D yields the scores of all sizes. This module defines the functions and
their plain form, the specification; :mod:`fmrl_dist.losses.tiled_log_sum_exp` computes them without holding all scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmrl_dist.losses.distillation import Normalizers, without_value
from fmrl_dist.losses.item_tiles import RowMatrix, TilePlan, back_projected
from fmrl_dist.losses.settings import Correction, LossSettings
from fmrl_dist.losses.tiled_log_sum_exp import TiledLogSumExp
from fmrl_dist.model.nested import add_prefix, chunks, matmul_linear


def nested_scores(z: Tensor, items: Tensor, sizes: Sequence[int]) -> Tensor:
    """Score of each position's own item at every size, [S, N], from z and items [N, D]."""
    products = (z * items).split([high - low for low, high in chunks(sizes)], 1)
    return torch.stack([product.sum(1) for product in products]).cumsum(0)


def nested_log_sum_exp(
    z: Tensor, items: Tensor, settings: LossSettings, correction: Correction | None = None
) -> Normalizers:
    """log Σ_v exp(z_:m · items_v,:m / τ_m + offset_v) for every size m and position, and what the largest size teaches.

    Args:
        z: outputs [N, D], float32 or float64.
        items: embeddings [V, D], of the same dtype.
        settings: how scores are computed, and by which implementation.
        correction: of sampled items; None where items are the whole catalogue. -inf where it leaves no item.

    Returns:
        Differentiable in z and items.

    Raises:
        ValueError: impl is triton and z is float64.
    """
    if settings.impl == "plain":
        return _plain(z, items, settings, correction)
    never_back = (False,) * len(settings.sizes)
    return Normalizers(*TiledLogSumExp.apply(z, None, items, None, _plan(z, settings, correction, never_back)))


def catalogue_log_sum_exp(
    z: Tensor, features: RowMatrix, weight: Tensor, table: Tensor | None, settings: LossSettings
) -> Normalizers:
    """:func:`nested_log_sum_exp` over the items that ``weight`` projects from ``features``.

    Args:
        z: outputs [N, D], float32 or float64.
        features: [V, F], frozen, read a tile of rows at a time.
        weight: W_proj [D, F].
        table: [V, w], added to the first w channels of the projected embeddings; None for nothing.
        settings: as in :func:`nested_log_sum_exp`.

    Returns:
        Differentiable in z, weight and table.

    Raises:
        ValueError: impl is triton and z is float64.
    """
    if settings.impl == "plain":  # the catalogue's embeddings whole
        items = matmul_linear(features[:].to(z.dtype), weight, settings.product_dtype(z))
        return nested_log_sum_exp(z, items if table is None else add_prefix(items, table), settings)
    # Embeddings are needed where a table's rows are added to them, and where a kernel reads them.
    if table is None and settings.impl == "tiled":
        back = back_projected(settings.sizes, len(z), int(features.shape[1]))
    else:
        back = (False,) * len(settings.sizes)
    return Normalizers(*TiledLogSumExp.apply(z, weight, table, features, _plan(z, settings, None, back)))


def _plan(z: Tensor, settings: LossSettings, correction: Correction | None, back: tuple[bool, ...]) -> TilePlan:
    if settings.impl == "triton" and z.dtype == torch.float64:
        raise ValueError("the Triton kernels of the loss sum in float32, and z is float64; choose impl tiled or plain")
    return TilePlan(
        sizes=settings.sizes,
        inverse=settings.inverse_temperatures,
        teacher=None if settings.distillation is None else 1 / settings.teacher_temperature,
        correction=correction,
        dtype=settings.product_dtype(z),
        impl=settings.impl,
        back=back,
    )


def _plain(z: Tensor, items: Tensor, settings: LossSettings, correction: Correction | None) -> Normalizers:
    scores = all_scores(z, items, settings)
    offsets, hits = scores.new_zeros(()), None
    if correction is not None:
        offsets, hits = correction.offsets, correction.target_ids[:, None] == correction.item_ids

    def seen(scores: Tensor) -> Tensor:
        return scores + offsets if hits is None else (scores + offsets).masked_fill(hits, -torch.inf)

    sizes = seen(scores).logsumexp(2)
    if settings.distillation is None:
        return Normalizers(sizes)
    teacher_scores = seen(scores[-1].detach() / settings.teacher_temperature)
    teacher = teacher_scores.logsumexp(1)
    shares = (teacher_scores - teacher[:, None]).exp().nan_to_num(0.0)  # none where a position sees no item
    return Normalizers(sizes, teacher, without_value((shares * scores).sum(2)))


def all_scores(z: Tensor, items: Tensor, settings: LossSettings) -> Tensor:
    """Scores of every size, divided by its temperature, [S, N, V], by one product a size."""
    factors = zip(settings.sizes, settings.inverse_temperatures, strict=True)
    return torch.stack([matmul_linear(z[:, :m], items[:, :m], settings.dtype) * factor for m, factor in factors])
