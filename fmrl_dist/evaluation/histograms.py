"""Histograms of target ranks: every user's target is compared with the whole catalogue, block by block.

User blocks and item tiles are fixed, and target ranks (:mod:`fmrl_dist.evaluation.target_ranks`) are counted in
integers: figures are the same for any number of processes at the same threads per process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock, evaluation_blocks
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.metrics import CUTOFF
from fmrl_dist.evaluation.parts import WHOLE, Part
from fmrl_dist.evaluation.ranker import Ranker
from fmrl_dist.evaluation.target_ranks import TargetRanks, hidden_items
from fmrl_dist.model.embed_catalogue import check_rankable


@dataclass(frozen=True)
class EvaluationProtocol:
    """Whose targets are ranked, and among which items."""

    store: Store
    split: str  # valid | test
    mask_seen: bool  # leave out the items of a user's whole history, never the target
    num_users: int = 0  # size of a fixed, evenly spread subset of the split's users; 0 for all


def count_target_ranks(
    ranker: Ranker, protocol: EvaluationProtocol, runtime: Runtime, stop: StopRequest, part: Part = WHOLE
) -> Tensor:
    """Histograms summed over all processes, returned on each of them; every process takes its share of the blocks.

    Args:
        ranker: on the runtime's device.
        protocol: whose targets are ranked, and among which items.
        runtime: this process and its group.
        stop: a process that got a signal stops before its next tile of items; the others finish theirs, and all end
            together.
        part: of the split's user blocks.

    Returns:
        Histogram of 2·target rank for each size, int64 [S, 2·CUTOFF + 1] (see :mod:`fmrl_dist.evaluation.metrics`).

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    store, split = protocol.store, protocol.split
    numbers = part.share(len(store.manifest.splits[split]))
    mine = [numbers[place] for place in runtime.my_share(len(numbers))]
    blocks = evaluation_blocks(
        store, split, ranker.max_length, mine, protocol.num_users, inline_dims=ranker.catalogue.inline_dims
    )
    histograms = target_rank_histograms(ranker, blocks, protocol.mask_seen, stop)
    stop.raise_together(runtime, stop.cut_short)
    return runtime.sum(histograms)


@torch.no_grad()
def target_rank_histograms(
    ranker: Ranker, blocks: Iterable[EvaluationBlock], mask_seen: bool, stop: StopRequest
) -> Tensor:
    """Histogram of 2·target rank for each size over the users of ``blocks``, int64 [S, 2·CUTOFF + 1].

    If ``stop.cut_short`` is set afterwards, the result is partial and must be discarded.

    Raises:
        UserError: the model's outputs are not finite, or too large.
    """
    model, catalogue = ranker.model, ranker.catalogue
    device = model.encoder.bias.device
    histograms = torch.zeros(len(model.sizes), 2 * CUTOFF + 1, dtype=torch.int64, device=device)
    for group in catalogue.in_step(_groups(stop.until_requested(blocks), catalogue.users_at_once)):
        group = [block.to(device) for block in group]
        users = []
        for block, inputs in zip(group, catalogue.inputs(group), strict=True):
            z = model(inputs, block.starts, block.from_start)[block.starts[1:] - 1]
            check_rankable(z, "outputs")
            hidden = hidden_items(block, mask_seen)
            users.append(TargetRanks(z, block.targets, hidden, model.sizes, ranker.normalize))
        catalogue.compare(users, stop)
        for target_ranks in users:
            doubled_ranks = 2 * target_ranks.result()  # [S, U]
            doubled_ranks = torch.where(doubled_ranks <= 2 * CUTOFF, doubled_ranks, 0).long()
            histograms.scatter_add_(1, doubled_ranks, torch.ones_like(doubled_ranks))
    return histograms


def _groups(blocks: Iterable[EvaluationBlock], num_users: int) -> Iterator[list[EvaluationBlock]]:
    """Consecutive blocks, grouped until each group has at least ``num_users`` users."""
    group: list[EvaluationBlock] = []
    for block in blocks:
        group.append(block)
        if sum(len(block.users) for block in group) >= num_users:
            yield group
            group = []
    if group:
        yield group
