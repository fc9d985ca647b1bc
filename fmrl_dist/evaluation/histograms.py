"""Histograms of target ranks: every user's target is compared with the whole catalogue, block by block.

User blocks and item tiles are fixed, and target ranks (:mod:`fmrl_dist.evaluation.target_ranks`) are counted in
integers: figures are the same for any number of processes at the same threads per process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.config.train_section import EvalConfig
from fmrl_dist.data.batches import EvaluationBlock, evaluation_blocks
from fmrl_dist.data.item_statistics import train_counts
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.metrics import METRICS, histogram_of
from fmrl_dist.evaluation.rank_counts import RankCounts, RankedUsers, sorted_users
from fmrl_dist.evaluation.ranker import Ranker, SequenceModel
from fmrl_dist.evaluation.segments import NUM_CELLS, Segments
from fmrl_dist.evaluation.target_ranks import TargetRanks, guessed_scores, seen_items
from fmrl_dist.evaluation.top_lists import exposures
from fmrl_dist.model.embed_catalogue import check_rankable


@dataclass(frozen=True)
class EvaluationProtocol:
    """Whose targets are ranked, among which items, and what is reported."""

    store: Store
    split: str  # valid | test
    mask_seen: bool  # which figures come first: without the items of a user's whole history, never the target
    num_users: int = 0  # size of a fixed, evenly spread subset of the split's users; 0 for all
    metrics: tuple[str, ...] = METRICS  # name@k each
    segments: Segments | None = None  # if users are also reported by segment
    keep_users: bool = False  # whether each user's ranks are kept
    list_metrics: tuple[str, ...] = ()  # name@k each, of the items that are recommended
    cut_vectors: bool = False  # whether the whole network's rotated vectors are ranked with at the smaller sizes, too

    @classmethod
    def of_report(cls, store: Store, split: str, mask_seen: bool, config: EvalConfig) -> EvaluationProtocol:
        """All users of a split, also by segment."""
        segments = Segments.of(train_counts(store))
        names = config.metric_names
        lists = config.list_metric_names
        return cls(store, split, mask_seen, 0, names, segments, config.per_user, lists, config.cut_vectors)

    @property
    def cutoff(self) -> int:
        """The last rank that counts, K."""
        return max(int(metric.split("@")[1]) for metric in self.metrics)

    @property
    def list_lengths(self) -> list[int]:
        """The lengths of lists that are reported on."""
        return sorted({int(metric.split("@")[1]) for metric in self.list_metrics})


def count_target_ranks(
    ranker: Ranker, protocol: EvaluationProtocol, runtime: Runtime, stop: StopRequest, part: Part = WHOLE
) -> RankCounts:
    """Counts of all processes, returned on each of them (users on the main one); every process ranks for its share.

    Args:
        ranker: on the runtime's device.
        protocol: whose targets are ranked, and among which items.
        runtime: this process and its group.
        stop: a process that got a signal stops before its next tile of items; the others finish theirs, and all end
            together.
        part: of the split's user blocks.

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    blocks = blocks_of(protocol, my_blocks(protocol, runtime, part), ranker.max_length, ranker.catalogue.inline_dims)
    longest = max(protocol.list_lengths, default=0)
    return sum_counts(rank_users(ranker, blocks, stop, longest), len(ranker.model.sizes), protocol, runtime, stop)


def my_blocks(protocol: EvaluationProtocol, runtime: Runtime, part: Part = WHOLE) -> list[int]:
    """Numbers of the blocks that are this process' share of a part of the users."""
    numbers = part.share(len(protocol.store.manifest.splits[protocol.split]))
    return [numbers[place] for place in runtime.my_share(len(numbers))]


def blocks_of(
    protocol: EvaluationProtocol, numbers: Sequence[int], max_length: int, inline_dims: Mapping[str, int] | None = None
) -> Iterator[EvaluationBlock]:
    """The users of some blocks, see :func:`~fmrl_dist.data.batches.evaluation_blocks`."""
    return evaluation_blocks(
        protocol.store, protocol.split, max_length, numbers, protocol.num_users, inline_dims=inline_dims
    )


def sum_counts(
    ranked: Iterable[RankedUsers], num_sizes: int, protocol: EvaluationProtocol, runtime: Runtime, stop: StopRequest
) -> RankCounts:
    """Count the ranks of this process' users and add those of all processes.

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    own = count_ranks(ranked, num_sizes, protocol)
    stop.raise_together(runtime, stop.cut_short)
    return RankCounts(
        runtime.sum(own.histograms.to(runtime.device)),
        _users_of_all(own.users, num_sizes, runtime) if own.users is not None else None,
        runtime.sum(own.exposures.to(runtime.device)) if own.exposures is not None else None,
    )


def count_ranks(ranked: Iterable[RankedUsers], num_sizes: int, protocol: EvaluationProtocol) -> RankCounts:
    """The counts of some users, on the CPU."""
    num_cells = NUM_CELLS if protocol.segments else 1
    histograms = torch.zeros(num_cells, 2, num_sizes, 2 * protocol.cutoff + 1, dtype=torch.int64)
    lengths, num_items = protocol.list_lengths, protocol.store.manifest.num_items
    counted = torch.zeros(len(lengths), 2, num_sizes, num_items, dtype=torch.int32) if lengths else None
    kept = []
    for block in ranked:
        if counted is not None:
            assert block.lists is not None, "ranked with lists"
            counted += exposures(block.lists, lengths, num_items).cpu()
        if protocol.segments:
            cells = protocol.segments.cells(block.targets, block.lengths)
            for cell in cells.unique().tolist():
                histograms[cell] += histogram_of(block.ranks[..., cells == cell], protocol.cutoff).cpu()
        else:
            histograms[0] += histogram_of(block.ranks, protocol.cutoff).cpu()
        if protocol.keep_users:
            kept.append(block.table.cpu())
    if not protocol.keep_users:
        return RankCounts(histograms, exposures=counted)
    table = torch.cat(kept) if kept else torch.empty(0, 3 + 2 * num_sizes, dtype=torch.float64)
    return RankCounts(histograms, RankedUsers.of_table(table, num_sizes), counted)


@torch.no_grad()
def rank_users(
    ranker: Ranker, blocks: Iterable[EvaluationBlock], stop: StopRequest, list_length: int = 0
) -> Iterator[RankedUsers]:
    """Target ranks of the users of each block, and so many of the items that they are recommended.

    If ``stop.cut_short`` is set afterwards, they are not all users, or not ranked among all items.

    Raises:
        UserError: the model's outputs are not finite, or too large.
    """
    model, catalogue = ranker.model, ranker.catalogue
    for group in catalogue.in_step(groups_of(stop.until_requested(blocks), catalogue.users_at_once)):
        group = [block.to(ranker.device) for block in group]
        ranks = []
        inputs, target_items = catalogue.inputs(group), catalogue.target_items(group)
        for block, rows, wanted in zip(group, inputs, target_items, strict=True):
            z = last_outputs(model, block, rows)
            guesses = guessed_scores(z, wanted, model.sizes, ranker.normalize)
            seen = seen_items(block)
            ranks.append(TargetRanks(z, block.targets, seen, guesses, model.sizes, ranker.normalize, list_length))
        catalogue.compare(ranks, stop)
        for block, target_ranks in zip(group, ranks, strict=True):
            lists = target_ranks.lists.items if target_ranks.lists is not None else None
            yield RankedUsers(block.users, block.targets, block.seen_starts.diff(), target_ranks.result(), lists)


def last_outputs(model: SequenceModel, block: EvaluationBlock, rows: Tensor) -> Tensor:
    """Outputs after the last item of each history [U, D], from the embeddings of all items [N, D].

    Raises:
        UserError: they are not finite, or too large.
    """
    z = model(rows, block.starts, block.from_start)[block.starts[1:] - 1]
    check_rankable(z, "outputs")
    return z


def groups_of(blocks: Iterable[EvaluationBlock], num_users: int) -> Iterator[list[EvaluationBlock]]:
    """Consecutive blocks, grouped until each group has at least ``num_users`` users."""
    group: list[EvaluationBlock] = []
    for block in blocks:
        group.append(block)
        if sum(len(block.users) for block in group) >= num_users:
            yield group
            group = []
    if group:
        yield group


def _users_of_all(own: RankedUsers, num_sizes: int, runtime: Runtime) -> RankedUsers | None:
    """All processes' users on the main one, sorted; one process after the other sends its own to all."""
    table = own.table
    tables = [table]
    if runtime.world_size > 1:
        counts = runtime.gather(torch.tensor([len(table)], device=runtime.device))[:, 0].tolist()
        tables = []
        for rank, count in enumerate(counts):
            rows = (table if rank == runtime.rank else table.new_empty(count, table.shape[1])).to(runtime.device)
            dist.broadcast(rows, rank)
            if runtime.is_main:
                tables.append(rows.cpu())
    return sorted_users(tables, num_sizes) if runtime.is_main else None
