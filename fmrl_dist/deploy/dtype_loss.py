"""What an export's dtype costs: NDCG@10 of validation users with the float32 model, and with what the files hold.

The split is that of validation, so that a dtype is not chosen by test figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmrl_dist.checkpoint.export_folder import ExportedModel, as_stored
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.histograms import EvaluationProtocol, blocks_of, count_ranks, rank_users
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.ranker import ranker_of_export
from fmrl_dist.evaluation.results.report import SPLIT_RULE
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

METRIC = "ndcg@10"
SPLIT = "valid"
PROTOCOLS = {"all_items": ALL, "masked": UNSEEN}
MEASURED_USERS = 25_000  # at most, unless the command says otherwise: both models rank the same users


def measure_quality(recommender: ExportedModel, dtype: str, store: Store, num_users: int) -> dict[str, Any]:
    """``quality`` of an export's ``config.json`` (docs/format.md): figures of float32 and, beside them, of ``dtype``.

    Args:
        recommender: float32; every one of its sizes is measured, as a cut network.
        dtype: of the export.
        store: of the catalogue that the recommender ranks.
        num_users: at most so many, spread evenly over all validation users; 0 for none.

    Raises:
        UserError: a number does not fit the dtype, or the store cannot be read.
    """
    available = sum(block.count for block in store.manifest.splits[SPLIT])
    if not available:
        return {"not_measured": f"store {store.location} has no validation users"}
    if not num_users:
        return {"not_measured": "it was not asked for"}
    protocol = EvaluationProtocol(store, SPLIT, False, min(num_users, available), (METRIC,))
    figures = {"float32": _figures(recommender, protocol)}
    if dtype != "float32":
        figures[dtype] = _figures(as_stored(recommender, dtype), protocol)
    return {
        "metric": METRIC,
        "split": SPLIT,
        "split_rule": SPLIT_RULE,
        "ties": "half",
        "users": protocol.num_users,
        "items": len(recommender.items),
        **{name: {of: figures[of][name] for of in figures} for name in PROTOCOLS},
    }


def _figures(recommender: ExportedModel, protocol: EvaluationProtocol) -> dict[str, dict[str, float]]:
    """The metric of every size, by protocol."""
    ranker, sizes = ranker_of_export(recommender), recommender.model.sizes
    blocks = blocks_of(protocol, range(len(protocol.store.manifest.splits[SPLIT])), recommender.max_length)
    histograms = count_ranks(rank_users(ranker, blocks, StopRequest()), len(sizes), protocol).all_users
    return {
        name: {
            str(size): metrics_from_histogram(histograms[which, j], (METRIC,))[METRIC] for j, size in enumerate(sizes)
        }
        for name, which in PROTOCOLS.items()
    }


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
    for size in quality["all_items"]["float32"]:
        pairs = [[quality[protocol][column][size] for protocol in PROTOCOLS] for column in columns]
        row = [f"{a:12.5f} {b:.5f}" for a, b in pairs]
        if len(columns) > 1:
            row += ["".join(f"{before - after:+10.5f}" for before, after in zip(*pairs, strict=True))]
        lines.append(f"{size:>6}" + "".join(row))
    return "\n".join(lines)
