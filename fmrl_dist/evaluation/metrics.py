"""Ranking metrics from integer histograms of target ranks, so that sums over processes are exact in any order.

The target rank is 1 + #(items scored higher) + ½·#(other items scored equal). It is a multiple of ½, so a
histogram of 2·target rank counts it exactly. At target rank r, recall@k is [r ≤ k], ndcg@k is [r ≤ k] / log2(1 + r)
and mrr@k is [r ≤ k] / r; a metric is the mean over users.

    >>> import torch
    >>> histogram = torch.zeros(21, dtype=torch.int64)
    >>> histogram[2], histogram[20], histogram[0] = 1, 1, 2  # one target at rank 1, one at 10, two beyond
    >>> metrics_from_histogram(histogram)["recall@10"]
    0.5
"""

from __future__ import annotations

import math

from torch import Tensor

CUTOFF = 10
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10")
assert all(int(metric.split("@")[1]) <= CUTOFF for metric in METRICS), "the histograms end at CUTOFF"


def metrics_from_histogram(histogram: Tensor) -> dict[str, float]:
    """Metrics of one size.

    Args:
        histogram: int64 [2·CUTOFF + 1]; entry 2·r counts targets at target rank r, entry 0 those beyond the cut-off.

    Returns:
        The metrics of ``METRICS``; all zero if there were no users.
    """
    counts = histogram.tolist()
    num_users = max(sum(counts), 1)
    placed = [(half_ranks / 2, count) for half_ranks, count in enumerate(counts) if half_ranks > 0 and count > 0]
    gains = {
        "recall": lambda r: 1.0,
        "ndcg": lambda r: 1 / math.log2(1 + r),
        "mrr": lambda r: 1 / r,
    }
    result = {}
    for metric in METRICS:
        name, cutoff = metric.split("@")
        result[metric] = sum(count * gains[name](r) for r, count in placed if r <= int(cutoff)) / num_users
    return result
