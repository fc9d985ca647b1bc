"""Free baselines: what can be had without training, so that a reader knows what a figure is worth.

    popularity   training events of an item, the same list for everyone
    cosine       cosine of an item's features with those of the user's last item; of several features, the mean; codes
                 are left out
    item_knn     see :mod:`fmrl_dist.evaluation.item_knn`

They are ranked as the model is: same users, all items, ties counting half. Their histograms cost once per store and
split: they are kept in ``Store.derived_folder``. V items, F features' total dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.base.files import json_sha256, write_atomically
from fmrl_dist.config.train_section import MAX_CUTOFF
from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.data.item_statistics import train_counts
from fmrl_dist.data.item_table import ItemTable, feature_dims, load_item_table
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import COMPARED_ITEMS, Catalogue, Group, StreamedCatalogue, add_all_tiles
from fmrl_dist.evaluation.histograms import EvaluationProtocol, blocks_of, my_blocks, rank_users, sum_counts
from fmrl_dist.evaluation.item_knn import item_neighbours, rank_by_neighbours
from fmrl_dist.evaluation.rank_counts import RankCounts, RankedUsers
from fmrl_dist.evaluation.ranker import Ranker
from fmrl_dist.evaluation.target_ranks import TargetRanks, seen_items

VERSION = 1  # of how they are computed: part of the name of the file that keeps them
COUNTED = f"recall@{MAX_CUTOFF}"  # so that all ranks up to there are counted
LAST_EVENT = 1
MOST_EVENTS = 50_000_000  # for which item-kNN is computed without being asked: 1.6 GB


def baseline_histograms(
    names: Sequence[str], store: Store, split: str, runtime: Runtime, stop: StopRequest
) -> dict[str, Tensor]:
    """Histograms of 2·target rank of baselines, int64 [2, 2·MAX_CUTOFF + 1] each; on the main process, others get none.

    Those of :func:`possible_baselines` only. Every process must call it.

    Raises:
        Stopped: on all processes, if one of them got a signal before the end.
    """
    path = store.derived_folder / f"baselines-{VERSION}-{split}-{store.manifest.sha256[:16]}.json"
    names = [name for name in names if name in possible_baselines(store)]
    num_events = sum(block.events for block in store.manifest.splits["train"])
    if "item_knn" in names and num_events > MOST_EVENTS:
        names.remove("item_knn")
        runtime.say(
            f"no item_knn beside the figures: it would hold {num_events:,} training events, more than {MOST_EVENTS:,}; "
            f"python -m fmrl_dist.baselines --store {store.location} computes it"
        )
    known = _read(path) if runtime.is_main else {}
    missing = runtime.agree(*(runtime.is_main and name not in known for name in names)) if names else []
    for name, is_missing in zip(names, missing, strict=True):
        if is_missing:
            counts = count_baseline(name, EvaluationProtocol(store, split, False, metrics=(COUNTED,)), runtime, stop)
            known[name] = counts.all_users[:, 0].cpu()
    num_users = sum(block.count for block in store.manifest.splits[split])
    if runtime.is_main and any(missing):
        whole = {name: rows for name, rows in known.items() if int(rows[0].sum()) == num_users}
        if store.skips_damaged and dict(zip(names, missing, strict=True)).get("item_knn"):
            whole.pop("item_knn", None)  # its neighbours may have been counted without some training users
        _write(path, whole)
    return {name: known[name] for name in names} if runtime.is_main else {}


def possible_baselines(store: Store, each_feature: bool = False) -> tuple[str, ...]:
    """Names of the baselines that a store allows: a cosine needs features; ``cosine:NAME`` is that of one feature."""
    features = vectors_of(store)
    cosines = ["cosine"] if features else []
    if each_feature and len(features) > 1:
        cosines += [f"cosine:{name}" for name in features]
    return ("popularity", *cosines, "item_knn")


def vectors_of(store: Store) -> list[str]:
    """Names of the features that are vectors."""
    return [feature.name for feature in store.manifest.features if not feature.num_codes]


def count_baseline(name: str, protocol: EvaluationProtocol, runtime: Runtime, stop: StopRequest) -> RankCounts:
    """Counts of one baseline, as of a model with one size; see :func:`~.histograms.count_target_ranks`."""
    ranked: Iterable[RankedUsers]
    if name == "popularity":
        blocks = blocks_of(protocol, my_blocks(protocol, runtime), LAST_EVENT)
        ranked = rank_by_popularity(train_counts(protocol.store), stop.until_requested(blocks))
    elif name.startswith("cosine"):
        feature = name.partition(":")[2]
        ranker = cosine_ranker(protocol.store, [feature] if feature else vectors_of(protocol.store), runtime)
        dims = ranker.catalogue.inline_dims
        ranked = rank_users(ranker, blocks_of(protocol, my_blocks(protocol, runtime), LAST_EVENT, dims), stop)
    else:
        numbers = range(len(protocol.store.manifest.splits[protocol.split])) if runtime.is_main else ()
        blocks = stop.until_requested(blocks_of(protocol, numbers, LAST_EVENT))
        ranked = rank_by_neighbours(item_neighbours(protocol.store), blocks) if runtime.is_main else ()
    return sum_counts(ranked, 1, protocol, runtime, stop)


def rank_by_popularity(counts: np.ndarray, blocks: Iterable[EvaluationBlock]) -> Iterator[RankedUsers]:
    """Target ranks [2, 1, U] of each block's users, from training counts int64 [V]."""
    num_up_to = torch.from_numpy(np.cumsum(np.bincount(counts)))  # items with at most so many events
    num_items = len(counts)
    for block in blocks:
        own = torch.from_numpy(counts[block.targets.numpy()])
        seen = seen_items(block)
        of_seen, against = torch.from_numpy(counts[seen[:, 1].numpy()]), own[seen[:, 0]]
        zeros = torch.zeros(len(own), dtype=torch.float64)
        seen_higher = zeros.index_add(0, seen[:, 0], (of_seen > against).double())
        seen_equal = zeros.index_add(0, seen[:, 0], (of_seen == against).double())
        higher = num_items - num_up_to[own]
        equal = num_up_to[own] - torch.where(own > 0, num_up_to[(own - 1).clamp_min(0)], 0) - 1
        ranks = torch.stack((1 + higher + equal / 2, 1 + higher - seen_higher + (equal - seen_equal) / 2))
        yield RankedUsers(block.users, block.targets, block.seen_starts.diff(), ranks[:, None])


@dataclass(frozen=True)
class LastItem:
    """A model whose output is the embedding of the last item."""

    sizes: tuple[int, ...]

    def __call__(self, items: Tensor, starts: Tensor, from_start: Tensor) -> Tensor:
        return items


@dataclass(frozen=True)
class FeatureCatalogue:
    """Normalised features from a table, tile by tile: nothing of the size of the catalogue is in memory."""

    table: ItemTable
    device: torch.device
    users_at_once: int = 4096
    inline_dims: None = None

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        yield from groups

    def inputs(self, group: Group) -> list[Tensor]:
        return [self._rows(block.items) for block in group]

    def target_items(self, group: Group) -> list[Tensor]:
        return [self._rows(block.targets) for block in group]

    def compare(self, users: Sequence[TargetRanks], stop: StopRequest) -> None:
        add_all_tiles(users, self._tiles, stop)

    def _rows(self, ids: Tensor) -> Tensor:
        return unit_features(self.table.values[ids.cpu()].to(self.device), self.table.dims)

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.table.values), COMPARED_ITEMS):
            rows = self.table.values[first : first + COMPARED_ITEMS].to(self.device)
            yield torch.arange(first, first + len(rows), device=self.device), unit_features(rows, self.table.dims)


def unit_features(values: Tensor, dims: Mapping[str, int]) -> Tensor:
    """Each feature divided by its length, float [n, F] → float32 [n, F]; absent ones stay zero.

    The product of two rows is the sum of the features' cosines.
    """
    parts = values.float().split(list(dims.values()), 1)
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts], 1)


class UnitFeatures:
    """Like an item encoder; its embeddings are :func:`unit_features`."""

    def __init__(self, dims: Mapping[str, int], device: torch.device) -> None:
        self.dims, self.bias = dims, torch.empty(0, device=device)

    def normalize(self, values: Tensor, present: Tensor) -> Tensor:
        return values

    def __call__(self, values: Tensor, present: Tensor) -> Tensor:
        return unit_features(values, self.dims)


def cosine_ranker(store: Store, features: Sequence[str], runtime: Runtime) -> Ranker:
    """Ranks by some features of the last item, from the item table, or from an inline store's shards."""
    dims = feature_dims(store, features)
    catalogue: Catalogue
    if store.manifest.inline:
        catalogue = StreamedCatalogue(UnitFeatures(dims, runtime.device), store, dims)
    else:
        catalogue = FeatureCatalogue(load_item_table(store, features), runtime.device)
    return Ranker(LastItem((sum(dims.values()),)), catalogue, LAST_EVENT, normalize=False, device=runtime.device)


def _read(path: Path) -> dict[str, Tensor]:
    """What is kept; nothing if the file is missing or is not as it was written."""
    try:
        record = json.loads(path.read_text())
        if record.pop("sha256") != json_sha256(record):
            return {}
        return {name: torch.tensor(rows, dtype=torch.int64) for name, rows in record.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write(path: Path, histograms: Mapping[str, Tensor]) -> None:
    """Keep histograms; where that cannot be, they are computed again next time."""
    record: dict[str, Any] = {name: rows.tolist() for name, rows in histograms.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record | {"sha256": json_sha256(record)}).encode() + b"\n")
    except OSError:
        pass
