"""Both deployments of a model in one evaluation: the network cut to each size, and its vectors rotated, then cut.

The rotation (:mod:`fmrl_dist.model.rotation`) is learned from the outputs after the histories of some validation users
and some of the items in them. Their targets choose between two that are learned, as they choose the best checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.histograms import EvaluationProtocol, count_target_ranks, groups_of, last_outputs
from fmrl_dist.evaluation.rank_counts import RankCounts, join_sizes
from fmrl_dist.evaluation.ranker import Ranker
from fmrl_dist.model.rotation import learn_cuts, learn_rotation

T = TypeVar("T")
SAMPLED_USERS = 16_384
SAMPLED_ITEMS = 8192
USERS_AT_ONCE = 512  # whose scores of all sampled items are in memory
TOP = 10
MARGIN = 0.01  # far more than rounding, so that an evaluation and an export choose the same


def cut_sizes(sizes: Sequence[T], protocol: EvaluationProtocol) -> tuple[T, ...]:
    """Sizes to which vectors are cut: all but the whole."""
    return tuple(sizes[:-1]) if protocol.cut_vectors else ()


def count_deployments(
    ranker: Ranker, protocol: EvaluationProtocol, runtime: Runtime, stop: StopRequest, part: Part = WHOLE
) -> RankCounts:
    """Counts of the cut network at each size, then of cut vectors at each of :func:`cut_sizes`.

    See :func:`~fmrl_dist.evaluation.histograms.count_target_ranks`.

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    counts = count_target_ranks(ranker, protocol, runtime, stop, part)
    sizes = cut_sizes(ranker.model.sizes, protocol)
    if not sizes:
        return counts
    rotation = ranker.rotation if ranker.rotation is not None else find_rotation(ranker, protocol.store, runtime, stop)
    of_vectors = count_target_ranks(ranker.rotated(rotation, sizes), protocol, runtime, stop, part)
    sha256 = hashlib.sha256(rotation.cpu().numpy().tobytes()).hexdigest()
    return replace(join_sizes([counts, of_vectors]), rotation=sha256)


@dataclass(frozen=True)
class VectorSample:
    """Vectors of n validation users and of v items of theirs, as they are compared."""

    outputs: Tensor  # of the whole network, after each history, float32 [n, D]
    targets: Tensor  # embeddings of each user's next item, float32 [n, D]
    items: Tensor  # float32 [v, D]
    left_out: Tensor  # int64 [2, ·]: users and items that are not to be ranked for them, seen ones and targets


def find_rotation(ranker: Ranker, store: Store, runtime: Runtime, stop: StopRequest) -> Tensor:
    """:func:`fit_rotations` to the store's validation users, on every process the same: that of cut vectors.

    All processes read the same users in the same blocks, as some catalogues need; the first one learns from them.

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    sample = sample_vectors(ranker, store, stop)
    stop.raise_together(runtime, stop.cut_short)
    rotation = fit_rotations(ranker, sample)[0] if runtime.is_main else None
    width = ranker.model.sizes[-1]
    return runtime.sum(torch.zeros(width, width, device=ranker.device) if rotation is None else rotation)


def fit_rotations(ranker: Ranker, sample: VectorSample) -> tuple[Tensor, Tensor]:
    """The rotations of cut vectors and of a search's prefix, float32 [D, D]; the identity if there are no outputs.

    Two are learned. Vectors are cut after the one from the channels as they were trained, which wins where training has
    run its course, unless more of the sample's targets are found after the other, by more than ``MARGIN``.
    """
    sizes = ranker.model.sizes
    if len(sample.outputs) == 0 or len(sizes) == 1:
        identity = torch.eye(sizes[-1], device=ranker.device)
        return identity, identity
    temperatures = ranker.temperatures or (1.0,) * len(sizes)
    of_cuts = learn_cuts(sample.outputs, sample.items, sizes[:-1], temperatures)
    of_search = learn_rotation(sample.outputs, sample.items, sizes[:-1], temperatures[-1])
    found = [mean_ndcg(sample, rotation, sizes[:-1], ranker.normalize) for rotation in (of_cuts, of_search)]
    return of_search if found[1] > found[0] * (1 + MARGIN) else of_cuts, of_search


@torch.no_grad()
def mean_ndcg(sample: VectorSample, rotation: Tensor, sizes: Sequence[int], normalize: bool) -> float:
    """NDCG@10 of the sample's targets among its items, mean over users and sizes of cut vectors."""
    outputs, targets, items = (rows @ rotation for rows in (sample.outputs, sample.targets, sample.items))
    users, left_out = sample.left_out[:, sample.left_out[0].argsort()]
    gains, num_users = 0.0, len(outputs)
    for first in range(0, num_users, USERS_AT_ONCE):
        last = min(first + USERS_AT_ONCE, num_users)
        is_ranked = torch.ones(last - first, len(items), dtype=torch.bool, device=items.device)
        here = slice(*torch.searchsorted(users, users.new_tensor([first, last])).tolist())
        is_ranked[users[here] - first, left_out[here]] = False
        for size in sizes:
            z, own, others = (rows[:, :size] for rows in (outputs[first:last], targets[first:last], items))
            if normalize:
                own, others = F.normalize(own), F.normalize(others)
            places = ((z @ others.T >= (z * own).sum(1, keepdim=True)) & is_ranked).sum(1)  # no credit for ties
            gains += float((1 / torch.log2(places[places < TOP] + 2.0)).sum())
    return gains / (num_users * len(sizes))


@torch.no_grad()
def sample_vectors(ranker: Ranker, store: Store, stop: StopRequest) -> VectorSample:
    """Vectors of users in blocks spread over all users, and of different items of theirs.

    If ``stop.cut_short`` is set afterwards, they are not all.
    """
    catalogue, width = ranker.catalogue, ranker.model.sizes[-1]
    blocks = store.manifest.splits["valid"]
    numbers = range(0, len(blocks), max(1, -(-sum(block.count for block in blocks) // SAMPLED_USERS)))
    users = evaluation_blocks(store, "valid", ranker.max_length, numbers, inline_dims=catalogue.inline_dims)
    outputs = [torch.empty(0, width, device=ranker.device)]
    targets, items, known, num_users = list(outputs), list(outputs), np.empty(0, np.int64), 0
    pairs, num_items = [np.empty(0, np.int64)], store.manifest.num_items  # user · V + item, of what is left out
    for group in catalogue.in_step(groups_of(stop.until_requested(users), catalogue.users_at_once)):
        group = [block.to(ranker.device) for block in group]
        inputs, wanted = catalogue.inputs(group), catalogue.target_items(group)
        for block, rows, of_targets in zip(group, inputs, wanted, strict=True):
            outputs.append(last_outputs(ranker.model, block, rows))
            targets.append(of_targets)
            ids, places = np.unique(block.items.cpu().numpy(), return_index=True)
            is_new = ~np.isin(ids, known)
            if len(known) < SAMPLED_ITEMS:
                known = np.concatenate((known, ids[is_new]))
                items.append(rows[torch.from_numpy(places[is_new]).to(rows.device)])
            numbers_here = np.arange(num_users, num_users + len(of_targets))
            users_here = np.concatenate((numbers_here, np.repeat(numbers_here, block.seen_starts.diff().cpu().numpy())))
            left_out = np.concatenate((block.targets.cpu().numpy(), block.seen.cpu().numpy()))
            # Once no more items are added, others than these need not be kept: a history may be very long.
            is_kept = np.isin(left_out, known) if len(known) >= SAMPLED_ITEMS else np.ones(len(left_out), bool)
            pairs.append(np.unique(users_here[is_kept] * num_items + left_out[is_kept]))
            num_users += len(of_targets)

    def joined(rows: list[Tensor]) -> Tensor:
        return F.normalize(torch.cat(rows)) if ranker.normalize else torch.cat(rows)

    users_and_items = _among(known, *np.divmod(np.concatenate(pairs), max(num_items, 1)))
    return VectorSample(
        outputs=joined(outputs),
        targets=joined(targets),
        items=joined(items),
        left_out=torch.from_numpy(users_and_items).to(ranker.device),
    )


def _among(known: np.ndarray, users: np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """Users and the places of their items among the known ones, int64 [2, ·]; of other items nothing."""
    order = np.argsort(known)
    places = np.searchsorted(known, item_ids, sorter=order).clip(max=max(len(known) - 1, 0))
    is_known = known[order[places]] == item_ids if len(known) else np.zeros(len(item_ids), bool)
    return np.stack((users[is_known], order[places[is_known]]))
