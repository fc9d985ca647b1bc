"""The content of evaluation.json: the figures of every size, deployment and baseline, from histograms of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fmrl_dist import __version__
from fmrl_dist.data.item_statistics import train_counts
from fmrl_dist.data.store.reader import check_lost_users
from fmrl_dist.evaluation.cut_vectors import cut_sizes
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.metrics import metrics_from_histogram, metrics_of_lists
from fmrl_dist.evaluation.rank_counts import RankCounts
from fmrl_dist.evaluation.segments import segments_of_cells
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

Rows = Mapping[str, Mapping[str, float]]  # name of a size or baseline → metric → value
T = TypeVar("T")


@dataclass(frozen=True)
class EvaluatedModel:
    """Which model the figures are of."""

    step: int  # of its checkpoint
    sha256: str  # of its checkpoint's record, or of an export's files
    manifest_sha256: str  # of the store that it belongs to: a run's, or the one that an export's items are of


def figures(
    counts: RankCounts,
    baselines: Mapping[str, Tensor],
    sizes: Sequence[object],
    protocol: EvaluationProtocol,
    model: EvaluatedModel,
) -> dict[str, Any]:
    """The content of ``evaluation.json``; it has ``users_lost`` only if damaged blocks were left out.

    Args:
        counts: of the model, of cut vectors too if the protocol has them.
        baselines: histograms of each, int64 [2, 2·K' + 1] with K' at least the protocol's cut-off.
        sizes: of the model, or what else there are figures of.
        protocol: whose targets were ranked.
        model: that was evaluated.

    Raises:
        UserError: damaged blocks cost too many of the users (``store.max_lost_share``), or all of them.
    """
    num_lost = num_users_in(protocol) - counts.num_users
    check_lost_users(num_lost, num_users_in(protocol), protocol.split, protocol.store)
    tables = _Tables(protocol, sizes)
    return {
        "split": protocol.split,
        "split_rule": protocol.store.manifest.split_rule,
        "users": counts.num_users,
        **({"users_lost": num_lost} if num_lost else {}),
        "items": protocol.store.manifest.num_items,
        "ties": "half",
        "mask_seen": protocol.mask_seen,
        **tables.of_all_users(counts, baselines),
        "segments": tables.of_segments(counts) if protocol.segments else {},
        **origin(protocol, model),
    }


class _Tables:
    """Figures by ranking, deployment and size: those of the protocol's ranking, and in them a table of the other's.

    Args:
        protocol: whose metrics they are.
        sizes: of the cut network; cut vectors have the sizes that the protocol gives them.
    """

    def __init__(self, protocol: EvaluationProtocol, sizes: Sequence[object]) -> None:
        self._protocol = protocol
        self._main, self._other = (UNSEEN, ALL) if protocol.mask_seen else (ALL, UNSEEN)
        self._other_name = "unmasked" if protocol.mask_seen else "masked"
        self._sizes = {"sizes": sizes}
        if vector_sizes := cut_sizes(sizes, protocol):
            self._sizes["vectors"] = vector_sizes

    def of_all_users(self, counts: RankCounts, baselines: Mapping[str, Tensor]) -> dict[str, Any]:
        """The figures of every size, of the baselines, and of the lists if those were counted."""
        result = self._of_sizes(counts.all_users)
        for which, part in ((self._main, result), (self._other, result[self._other_name])):
            part["baselines"] = self._rows(baselines, which)
            if counts.exposures is not None:
                part |= self._of_lists(counts.exposures[:, which])
        return result

    def of_segments(self, counts: RankCounts) -> dict[str, Any]:
        """The figures of every size on each segment's users."""
        segments = {}
        for name, cells in segments_of_cells():
            histograms = counts.histograms[cells].sum(0)
            segments[name] = {"users": int(histograms[0, 0].sum()), **self._of_sizes(histograms)}
        return segments

    def _of_sizes(self, histograms: Tensor) -> dict[str, Any]:
        """From histograms [2, S + S', 2·K + 1]."""
        pairs = self._by_deployment(list(histograms.transpose(0, 1)))
        of_main, of_other = (
            {key: self._rows(of_size, which) for key, of_size in pairs.items()} for which in (self._main, self._other)
        )
        return {**of_main, self._other_name: of_other}

    def _of_lists(self, exposures: Tensor) -> dict[str, Any]:
        """From how often each item was recommended, [K, S + S', V] in one ranking."""
        trained = train_counts(self._protocol.store)
        rows = [
            metrics_of_lists(exposures[:, row], trained, self._protocol.list_metrics)
            for row in range(exposures.shape[1])
        ]
        names = {"sizes": "lists", "vectors": "vector_lists"}
        return {names[key]: of_size for key, of_size in self._by_deployment(rows).items()}

    def _rows(self, histograms: Mapping[str, Tensor], which: int) -> dict[str, dict[str, float]]:
        metrics = self._protocol.metrics
        return {name: metrics_from_histogram(pair[which], metrics) for name, pair in histograms.items()}

    def _by_deployment(self, of_rows: Sequence[T]) -> dict[str, dict[str, T]]:
        """What there is of the cut network at each size, then of cut vectors, by deployment and size."""
        assert len(of_rows) == sum(map(len, self._sizes.values()))
        values = iter(of_rows)
        return {key: {str(size): next(values) for size in sizes} for key, sizes in self._sizes.items()}


def origin(protocol: EvaluationProtocol, model: EvaluatedModel) -> dict[str, Any]:
    """What model and store an evaluation is of."""
    return {
        "checkpoint": {"step": model.step, "sha256": model.sha256},
        "store": protocol.store.location,
        "manifest_sha256": protocol.store.manifest.sha256,
        "fmrl_dist_version": __version__,
    }


def num_users_in(protocol: EvaluationProtocol) -> int:
    """Users of the whole split, including those in damaged blocks."""
    return sum(block.count for block in protocol.store.manifest.splits[protocol.split])
