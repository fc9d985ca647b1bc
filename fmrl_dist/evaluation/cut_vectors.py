"""Both deployments of a model in one evaluation: the network cut to each size, and its vectors rotated, then cut.

The rotation (:mod:`fmrl_dist.model.rotation`) fits the outputs after the histories of some validation users, whose
targets are not looked at, and some of the items in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
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


def find_rotation(ranker: Ranker, store: Store, runtime: Runtime, stop: StopRequest) -> Tensor:
    """:func:`fit_rotation` to the store's validation users, on every process the same.

    All processes read the same users in the same blocks, as some catalogues need; the first one learns from them.

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    outputs, items = sample_vectors(ranker, store, stop)
    stop.raise_together(runtime, stop.cut_short)
    rotation = fit_rotation(ranker, outputs, items) if runtime.is_main else None
    width = ranker.model.sizes[-1]
    return runtime.sum(torch.zeros(width, width, device=ranker.device) if rotation is None else rotation)


def fit_rotation(ranker: Ranker, outputs: Tensor, items: Tensor) -> Tensor:
    """The rotation for vectors cut to the ranker's sizes, float32 [D, D]; the identity if there are no outputs."""
    sizes = ranker.model.sizes
    if len(outputs) == 0 or len(sizes) == 1:
        return torch.eye(sizes[-1], device=ranker.device)
    return learn_cuts(*compared(ranker, outputs, items), sizes[:-1], ranker.temperatures or (1.0,) * len(sizes))


def fit_search_rotation(ranker: Ranker, outputs: Tensor, items: Tensor) -> Tensor:
    """The rotation for a search that first reads some channels, float32 [D, D]; likewise."""
    sizes = ranker.model.sizes
    if len(outputs) == 0 or len(sizes) == 1:
        return torch.eye(sizes[-1], device=ranker.device)
    temperature = ranker.temperatures[-1] if ranker.temperatures else 1.0
    return learn_rotation(*compared(ranker, outputs, items), sizes[:-1], temperature)


def compared(ranker: Ranker, outputs: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors as they are compared."""
    return (F.normalize(outputs), F.normalize(items)) if ranker.normalize else (outputs, items)


@torch.no_grad()
def sample_vectors(ranker: Ranker, store: Store, stop: StopRequest) -> tuple[Tensor, Tensor]:
    """Outputs of users [n, D] and embeddings of different items of theirs [v, D], of blocks spread over all users.

    If ``stop.cut_short`` is set afterwards, they are not all.
    """
    catalogue, width = ranker.catalogue, ranker.model.sizes[-1]
    blocks = store.manifest.splits["valid"]
    numbers = range(0, len(blocks), max(1, -(-sum(block.count for block in blocks) // SAMPLED_USERS)))
    users = evaluation_blocks(store, "valid", ranker.max_length, numbers, inline_dims=catalogue.inline_dims)
    outputs = [torch.empty(0, width, device=ranker.device)]
    items, known = list(outputs), np.empty(0, np.int64)
    for group in catalogue.in_step(groups_of(stop.until_requested(users), catalogue.users_at_once)):
        group = [block.to(ranker.device) for block in group]
        for block, rows in zip(group, catalogue.inputs(group), strict=True):
            outputs.append(last_outputs(ranker.model, block, rows))
            ids, places = np.unique(block.items.cpu().numpy(), return_index=True)
            is_new = ~np.isin(ids, known)
            if len(known) < SAMPLED_ITEMS:
                known = np.concatenate((known, ids[is_new]))
                items.append(rows[torch.from_numpy(places[is_new]).to(rows.device)])
    return torch.cat(outputs), torch.cat(items)
