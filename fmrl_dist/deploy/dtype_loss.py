"""What an export's dtype costs: NDCG@10 of validation users with the float32 model, and with what the files hold.

The split is that of validation, so that a dtype is not chosen by test figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fmrl_dist.checkpoint.export.files import VECTORS_TENSOR
from fmrl_dist.checkpoint.export.parts import ExportedModel, as_stored, cut_vectors
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import EmbeddedCatalogue
from fmrl_dist.evaluation.histograms import EvaluationProtocol, blocks_of, count_ranks, rank_users
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.rank_counts import RankCounts
from fmrl_dist.evaluation.ranker import Ranker, RotatedModel, ranker_of_export
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN
from fmrl_dist.model.stored_tensors import rounded

METRIC = "ndcg@10"
SPLIT = "valid"
PROTOCOLS = {"all_items": ALL, "masked": UNSEEN}
MEASURED_USERS = 25_000  # at most, unless the command says otherwise: both models rank the same users


def measure_quality(
    recommender: ExportedModel, dtype: str, store: Store, num_users: int, vectors: int = 0
) -> dict[str, Any]:
    """``quality`` of an export's ``config.json`` (docs/format.md): figures of float32 and, beside them, of ``dtype``.

    Args:
        recommender: float32; every one of its sizes is measured, as a cut network.
        dtype: of the export.
        store: of the catalogue that the recommender ranks.
        num_users: at most so many, spread evenly over all validation users; 0 for none.
        vectors: channels of the export's cut vectors, which are then measured, too; 0 for none.

    Raises:
        UserError: a number does not fit the dtype, or the store cannot be read.
    """
    available = sum(block.count for block in store.manifest.splits[SPLIT])
    if not available:
        return {"not_measured": f"store {store.location} has no validation users"}
    if not num_users:
        return {"not_measured": "it was not asked for"}
    protocol = EvaluationProtocol(store, SPLIT, False, min(num_users, available), (METRIC,))
    dtypes = ["float32"] + [dtype] * (dtype != "float32")
    counts = {each: _count(ranker_of_export(as_stored(recommender, each)), protocol) for each in dtypes}
    result: dict[str, Any] = {
        "metric": METRIC,
        "split": SPLIT,
        "split_rule": store.manifest.split_rule,
        "ties": "half",
        "users": counts["float32"].num_users,  # without those of damaged blocks, if these are skipped
        "items": len(recommender.items),
        **_by_protocol(counts, recommender.model.sizes),
    }
    if vectors:
        cut = {each: _count(_ranker_of_vectors(recommender, each, vectors), protocol) for each in dtypes}
        result["vectors"] = _by_protocol(cut, (vectors,))
    return result


def _ranker_of_vectors(exported: ExportedModel, dtype: str, size: int) -> Ranker:
    """The whole network, its outputs rotated and cut, and the item vectors of an export of ``dtype``."""
    assert exported.rotation is not None
    reader = as_stored(exported, dtype)
    model = RotatedModel(reader.model, exported.rotation[:, :size], (size,))
    catalogue = EmbeddedCatalogue(
        reader.items, rounded({VECTORS_TENSOR: cut_vectors(exported, size)}, dtype)[VECTORS_TENSOR]
    )
    return replace(ranker_of_export(reader), model=model, catalogue=catalogue)


def _count(ranker: Ranker, protocol: EvaluationProtocol) -> RankCounts:
    blocks = blocks_of(protocol, range(len(protocol.store.manifest.splits[SPLIT])), ranker.max_length)
    return count_ranks(rank_users(ranker, blocks, StopRequest()), len(ranker.model.sizes), protocol)


def _by_protocol(counts: Mapping[str, RankCounts], sizes: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """The metric by protocol, dtype and size."""
    return {
        name: {dtype: _by_size(each.all_users[which], sizes) for dtype, each in counts.items()}
        for name, which in PROTOCOLS.items()
    }


def _by_size(histograms: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """The metric of every size, from histograms [S, 2·K + 1]."""
    return {str(m): metrics_from_histogram(row, (METRIC,))[METRIC] for m, row in zip(sizes, histograms, strict=True)}


def describe_quality(quality: Mapping[str, Any], dtype: str) -> str:
    """The lines that an export prints of its dtype's loss."""
    if "not_measured" in quality:
        return f"NDCG@10 of dtype {dtype} was not measured: {quality['not_measured']}"
    lines = [
        f"NDCG@10 on validation ({quality['users']:,} users, {quality['items']:,} items, {quality['split_rule']}, ties "
        f"count {quality['ties']});",
        "pairs of figures: all items ranked | seen items masked",
    ]
    columns = list(quality["all_items"])
    names = [*columns, *(["loss"] if len(columns) > 1 else [])]
    lines.append(f"{'size':>6}" + "".join(f"{name:>20}" for name in names))
    lines += _rows(quality)
    if "vectors" in quality:
        lines += ["cut vectors:", *_rows(quality["vectors"])]
    return "\n".join(lines)


def _rows(figures: Mapping[str, Any]) -> Iterator[str]:
    """One a size, with the loss if there is a dtype but float32."""
    columns = list(figures["all_items"])
    for size in figures["all_items"]["float32"]:
        pairs = [[figures[protocol][column][size] for protocol in PROTOCOLS] for column in columns]
        row = [f"{a:12.5f} {b:.5f}" for a, b in pairs]
        if len(columns) > 1:
            row += ["".join(f"{before - after:+10.5f}" for before, after in zip(*pairs, strict=True))]
        yield f"{size:>6}" + "".join(row)
