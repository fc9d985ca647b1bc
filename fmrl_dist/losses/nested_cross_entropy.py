"""Nested cross-entropy (paper eq. 13-14): the loss of every size, over the whole catalogue or over sampled items.

N positions, V items, K negatives, D width, S sizes. Both forms are a normaliser less the target's own score; the
normaliser of all sizes comes from one pass over the items (:mod:`fmrl_dist.losses.log_sum_exp`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.losses.log_sum_exp import catalogue_log_sum_exp, nested_log_sum_exp, nested_scores
from fmrl_dist.losses.split_catalogue import CatalogueSlice, split_log_sum_exp
from fmrl_dist.losses.tiled_log_sum_exp import Correction, RowMatrix
from fmrl_dist.model.nested import matmul_linear


def nested_cross_entropy(
    z: Tensor,
    items: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    temperatures: Sequence[float] | None = None,
    impl: str = "tiled",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of each size over the full catalogue, summed over positions.

    Args:
        z: outputs [N, D], float32 or float64.
        items: item embeddings [V, D], of the same dtype.
        targets: int64 [N], the right item of each position.
        sizes: trained sizes, the last one D.
        temperatures: by which the scores of each size are divided; None for 1.
        impl: "tiled", or "plain" (all logits at once; the specification).
        dtype: of the products' inputs, z's own if None; log-sum-exp and sums stay in z's dtype.

    Returns:
        [S], differentiable in z and items.
    """
    if impl == "plain":
        scores = _all_scores(z, items, sizes, temperatures, dtype)
        return torch.stack([F.cross_entropy(scores_NV, targets, reduction="sum") for scores_NV in scores])
    own_SN = _divide(nested_scores(z, items[targets], sizes), temperatures)
    return (nested_log_sum_exp(z, items, sizes, temperatures, None, impl, dtype) - own_SN).sum(1)


def catalogue_cross_entropy(
    z: Tensor,
    target_items: Tensor,
    columns: RowMatrix | CatalogueSlice,
    projection: Tensor,
    table: Tensor | None,
    sizes: Sequence[int],
    temperatures: Sequence[float] | None = None,
    impl: str = "tiled",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`nested_cross_entropy` over items that are projected from their features where they are scored.

    Args:
        z: outputs [N, D], float32 or float64.
        target_items: embeddings [N, D] of the right items.
        columns: [V, C], what the projection maps, read a tile of rows at a time; or this rank's slice of them, where
            the ranks share the catalogue.
        projection: [D, C].
        table: id table [V, D], or None.
        sizes, temperatures, impl, dtype: as in :func:`nested_cross_entropy`.

    Returns:
        [S], differentiable in z, target_items, projection and table.
    """
    own_SN = _divide(nested_scores(z, target_items, sizes), temperatures)
    if isinstance(columns, CatalogueSlice):
        lse_SN = split_log_sum_exp(z, columns, projection, table, sizes, temperatures, impl, dtype)
    else:
        lse_SN = catalogue_log_sum_exp(z, columns, projection, table, sizes, temperatures, impl, dtype)
    return (lse_SN - own_SN).sum(1)


def cosine_per_size(
    loss: Callable[..., Tensor], embeddings: Sequence[Tensor], sizes: Sequence[int], temperatures: Sequence[float]
) -> Tensor:
    """A loss over cosines: each size's prefixes divided by their own lengths, and so each size a pass of its own.

    The lengths differ from size to size, so nothing is shared among sizes: 2·D channels are multiplied instead of D.

    Args:
        loss: takes prefixes of ``embeddings``, sizes and temperatures, and gives [1].
        embeddings: rows [·, D] each, of outputs or items.
        sizes: trained sizes.
        temperatures: one for each size.

    Returns:
        [S].
    """
    return torch.cat(
        [
            loss(*(F.normalize(rows[:, :size], dim=1) for rows in embeddings), (size,), (temperature,))
            for size, temperature in zip(sizes, temperatures, strict=True)
        ]
    )


@dataclass(frozen=True)
class Negatives:
    """Items drawn for some positions to be told from their targets."""

    ids: Tensor  # int64 [K], with repetition
    log_expected: Tensor  # float32 [K], log(K·q): how often each was to be drawn


def sampled_cross_entropy(
    z: Tensor,
    target_items: Tensor,
    targets: Tensor,
    negative_items: Tensor,
    negatives: Negatives,
    sizes: Sequence[int],
    temperatures: Sequence[float] | None = None,
    impl: str = "tiled",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sampled softmax of each size, summed over positions: -s_y + log(e^{s_y} + Σ_k 1[i_k ≠ y] e^{s_{i_k} - log(K q)}).

    The sum over negatives estimates that over all items but the target without bias: each is drawn K·q times on
    average and counts 1/(K·q). The target is always there by itself, so it gets no correction, and a negative that
    happens to be the target is left out but counts in K. The logarithm leaves a bias that shrinks as K grows.

    Args:
        z: outputs [N, D], float32 or float64.
        target_items: embeddings [N, D] of the targets.
        targets: int64 [N], their ids.
        negative_items: embeddings [K, D].
        negatives: their ids and expected counts; every position sees the same ones.
        sizes, temperatures, impl, dtype: as in :func:`nested_cross_entropy`.

    Returns:
        [S], differentiable in z, target_items and negative_items.
    """
    own_SN = _divide(nested_scores(z, target_items, sizes), temperatures)
    if impl == "plain":
        others = _all_scores(z, negative_items, sizes, temperatures, dtype) - negatives.log_expected
        others = others.masked_fill(targets[:, None] == negatives.ids, -torch.inf)
        return (torch.cat((own_SN[..., None], others), 2).logsumexp(2) - own_SN).sum(1)
    correction = Correction(-negatives.log_expected.to(z.dtype), negatives.ids, targets)
    others_SN = nested_log_sum_exp(z, negative_items, sizes, temperatures, correction, impl, dtype)
    return (torch.logaddexp(own_SN, others_SN) - own_SN).sum(1)


def _all_scores(
    z: Tensor, items: Tensor, sizes: Sequence[int], temperatures: Sequence[float] | None, dtype: torch.dtype | None
) -> Tensor:
    """[S, N, V], by one product a size."""
    scores = torch.stack([matmul_linear(z[:, :m], items[:, :m], dtype) for m in sizes])
    return scores if temperatures is None else scores / scores.new_tensor(temperatures)[:, None, None]


def _divide(scores_SN: Tensor, temperatures: Sequence[float] | None) -> Tensor:
    return scores_SN if temperatures is None else scores_SN / scores_SN.new_tensor(temperatures)[:, None]
