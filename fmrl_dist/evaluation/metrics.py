"""Ranking metrics from integer histograms of target ranks, so that sums over processes are exact in any order.

The target rank is 1 + #(items scored higher) + ½·#(other items scored equal). It is a multiple of ½, so a
histogram of 2·target rank counts it exactly. At target rank r, recall@k is [r ≤ k], ndcg@k is [r ≤ k] / log2(1 + r)
and mrr@k is [r ≤ k] / r; a metric is the mean over users.

    >>> import torch
    >>> histogram = torch.zeros(21, dtype=torch.int64)
    >>> histogram[2], histogram[20], histogram[0] = 1, 1, 2  # one target at rank 1, one at 10, two beyond
    >>> metrics_from_histogram(histogram, ["recall@10"])
    {'recall@10': 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.config.train_section import EvalConfig

GAINS = {
    "recall": lambda r: 1.0,
    "ndcg": lambda r: 1 / math.log2(1 + r),
    "mrr": lambda r: 1 / r,
}
METRICS = EvalConfig().metric_names  # those of the default configuration


def metrics_from_histogram(histogram: Tensor, names: Sequence[str] = METRICS) -> dict[str, float]:
    """Metrics of one size.

    Args:
        histogram: int64 [2·K + 1]; entry 2·r counts targets at target rank r, entry 0 those beyond K.
        names: ``name@k`` each, with a name of ``GAINS`` and k up to K.

    Returns:
        The metrics by name; all zero if there were no users.
    """
    counts = histogram.tolist()
    num_users = max(sum(counts), 1)
    placed = [(half_ranks / 2, count) for half_ranks, count in enumerate(counts) if half_ranks > 0 and count > 0]
    result = {}
    for metric in names:
        name, cutoff = metric.split("@")
        assert int(cutoff) <= len(counts) // 2, "the histogram ends before the cut-off"
        result[metric] = sum(count * GAINS[name](r) for r, count in placed if r <= int(cutoff)) / num_users
    return result


def metrics_of_lists(exposures: Tensor, train_counts: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Metrics of the items that one size recommends.

    ``coverage@k`` is the share of the catalogue that is in the first k of somebody's list. ``popularity@k`` is the mean
    percentile of what is listed among all items by training events: 0.5 as much for popular items as for others, 1 only
    the most popular one.

    Args:
        exposures: int [K, V], how often each item is listed, in increasing order of the K cut-offs.
        train_counts: of each item, [V].
        names: ``name@k`` each.
    """
    counts, order = np.asarray(train_counts), np.sort(train_counts)
    below, up_to = np.searchsorted(order, counts, "left"), np.searchsorted(order, counts, "right")
    doubled = torch.from_numpy(below + up_to - 1)  # 2·percentile·(V - 1), an integer
    cutoffs = sorted({int(name.split("@")[1]) for name in names})
    result = {}
    for metric in names:
        name, cutoff = metric.split("@")
        listed = exposures[cutoffs.index(int(cutoff))].cpu().long()
        if name == "coverage":
            result[metric] = int((listed > 0).sum()) / len(listed)
        else:
            result[metric] = int((listed * doubled).sum()) / max(2 * (len(listed) - 1) * int(listed.sum()), 1)
    return result


def histogram_of(ranks: Tensor, cutoff: int) -> Tensor:
    """Histogram of 2·target rank along the last dimension: float [..., U] → int64 [..., 2·cutoff + 1]."""
    doubled = torch.where(ranks <= cutoff, 2 * ranks, 0).long()
    counts = torch.zeros(*ranks.shape[:-1], 2 * cutoff + 1, dtype=torch.int64, device=ranks.device)
    return counts.scatter_add_(-1, doubled, torch.ones_like(doubled))


def metric_of_users(ranks: np.ndarray, metric: str) -> np.ndarray:
    """What each user adds to a metric, float64, for ranks of any shape; their mean is the metric."""
    name, cutoff = metric.split("@")
    with np.errstate(invalid="ignore"):
        gains = {"recall": np.ones_like(ranks), "ndcg": 1 / np.log2(1 + ranks), "mrr": 1 / ranks}[name]
    return np.where(ranks <= int(cutoff), gains, 0.0)
