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

from fmrl_dist.losses.distillation import Normalizers, cross_entropy, merge, without_value
from fmrl_dist.losses.item_tiles import RowMatrix
from fmrl_dist.losses.log_sum_exp import all_scores, catalogue_log_sum_exp, nested_log_sum_exp, nested_scores
from fmrl_dist.losses.settings import Correction, LossSettings
from fmrl_dist.losses.split_catalogue import CatalogueSlice, split_log_sum_exp


def nested_cross_entropy(z: Tensor, items: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """Cross-entropy of each size over the full catalogue, summed over positions.

    Args:
        z: outputs [N, D], float32 or float64.
        items: item embeddings [V, D], of the same dtype.
        targets: int64 [N], the right item of each position.
        settings: how scores are computed, and by which implementation.

    Returns:
        [S], differentiable in z and items.
    """
    if settings.impl == "plain":
        return _plain(all_scores(z, items, settings), targets, settings)
    own_SN = _own_scores(z, items[targets], settings)
    return cross_entropy(nested_log_sum_exp(z, items, settings), own_SN, settings.distillation)


def _plain(scores_SNV: Tensor, targets: Tensor, settings: LossSettings, offsets: Tensor | None = None) -> Tensor:
    """The loss word by word, [S]: ``offsets`` [N, V] are added to all scores, -inf for an item that does not count."""
    offsets = scores_SNV.new_zeros(()) if offsets is None else offsets
    losses = [F.cross_entropy(scores + offsets, targets, reduction="sum") for scores in scores_SNV]
    if settings.distillation is not None:
        shares = F.softmax(scores_SNV[-1].detach() / settings.teacher_temperature + offsets, 1)
        for j, (alpha, scores) in enumerate(zip(settings.distillation, scores_SNV, strict=True)):
            target_shares = (1 - alpha) * F.one_hot(targets, scores.shape[1]).to(shares) + alpha * shares
            learned = -target_shares * F.log_softmax(scores + offsets, 1).masked_fill(shares == 0, 0.0)
            losses[j] = losses[j].detach() + without_value(learned.sum())
    return torch.stack(losses)


def catalogue_cross_entropy(
    z: Tensor,
    target_items: Tensor,
    columns: RowMatrix | CatalogueSlice,
    projection: Tensor,
    table: Tensor | None,
    settings: LossSettings,
) -> Tensor:
    """:func:`nested_cross_entropy` over items that are projected from their features while they are scored.

    Args:
        z: outputs [N, D], float32 or float64.
        target_items: embeddings [N, D] of the right items.
        columns: [V, C], what the projection maps, read a tile of rows at a time; or this rank's slice of them, where
            the ranks share the catalogue.
        projection: [D, C].
        table: id table [V, w] of these items, or None.
        settings: as in :func:`nested_cross_entropy`.

    Returns:
        [S], differentiable in z, target_items, projection and table.
    """
    if isinstance(columns, CatalogueSlice):
        normalizers = split_log_sum_exp(z, columns, projection, table, settings)
    else:
        normalizers = catalogue_log_sum_exp(z, columns, projection, table, settings)
    return cross_entropy(normalizers, _own_scores(z, target_items, settings), settings.distillation)


def cosine_per_size(
    loss: Callable[[Sequence[Tensor], LossSettings], Tensor], embeddings: Sequence[Tensor], settings: LossSettings
) -> Tensor:
    """A loss over cosines: each size's prefixes divided by their own lengths, in a pass per size.

    The lengths differ from size to size, so nothing is shared among sizes: 2·D channels are multiplied instead of D.

    Args:
        loss: takes prefixes of ``embeddings`` and the settings of one size, and gives [1].
        embeddings: rows [·, D] each, of outputs or items.
        settings: of all sizes.

    Returns:
        [S].
    """
    return torch.cat(
        [
            loss([F.normalize(rows[:, : one.sizes[0]], dim=1) for rows in embeddings], one)
            for one in settings.of_each_size()
        ]
    )


@dataclass(frozen=True)
class Negatives:
    """Items drawn for some positions, which the model learns to tell from their targets."""

    ids: Tensor  # int64 [K], with repetition
    log_expected: Tensor  # float32 [K], log(K·q): how often each was expected to be drawn


def sampled_cross_entropy(
    z: Tensor,
    target_items: Tensor,
    targets: Tensor,
    negative_items: Tensor,
    negatives: Negatives,
    settings: LossSettings,
) -> Tensor:
    """Sampled softmax of each size, summed over positions: -s_y + log(e^{s_y} + Σ_k 1[i_k ≠ y] e^{s_{i_k} - log(K q)}).

    The sum over negatives estimates that over all items but the target without bias: each is drawn K·q times on
    average and counts 1/(K·q). The target's own term is always there, so it needs no correction; a negative
    that happens to be the target is left out but counts in K. The logarithm leaves a bias that shrinks as K grows.

    Args:
        z: outputs [N, D], float32 or float64.
        target_items: embeddings [N, D] of the targets.
        targets: int64 [N], their ids.
        negative_items: embeddings [K, D].
        negatives: their ids and expected counts; every position sees the same ones.
        settings: as in :func:`nested_cross_entropy`.

    Returns:
        [S], differentiable in z, target_items and negative_items.
    """
    own_SN = _own_scores(z, target_items, settings)
    if settings.impl == "plain":
        scores = torch.cat((own_SN[..., None], all_scores(z, negative_items, settings)), 2)
        hits = targets[:, None] == negatives.ids
        offsets = (-negatives.log_expected.to(z.dtype)).expand(hits.shape).masked_fill(hits, -torch.inf)
        return _plain(scores, torch.zeros_like(targets), settings, F.pad(offsets, (1, 0)))
    correction = Correction(-negatives.log_expected.to(z.dtype), negatives.ids, targets)
    others = nested_log_sum_exp(z, negative_items, settings, correction)
    normalizers = _with_own(own_SN, others, settings)
    return cross_entropy(normalizers, own_SN, settings.distillation)


def _with_own(own_SN: Tensor, others: Normalizers, settings: LossSettings) -> Normalizers:
    """The normalizers over other items, and over the one of which ``own_SN`` are the scores."""
    if others.teacher is None or others.taught is None:
        return Normalizers(torch.logaddexp(own_SN, others.sizes))
    own_teacher = own_SN[-1].detach() / settings.teacher_temperature
    sizes, taught = torch.stack((own_SN, others.sizes)), torch.stack((without_value(own_SN), others.taught))
    return merge(Normalizers(sizes, torch.stack((own_teacher, others.teacher)), taught))


def _own_scores(z: Tensor, target_items: Tensor, settings: LossSettings) -> Tensor:
    """Each position's score of its own target at every size, [S, N]."""
    scores_SN = nested_scores(z, target_items, settings.sizes)
    return scores_SN * scores_SN.new_tensor(settings.inverse_temperatures)[:, None]
