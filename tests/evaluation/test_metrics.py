"""Metrics against values computed by hand, at whole and half target ranks, at the cut-offs, and without users."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

import fmrl_dist.evaluation.metrics
from fmrl_dist.evaluation.metrics import METRICS, histogram_of, metric_of_users, metrics_from_histogram
from tests.fixtures.ranking import CUTOFF


def histogram(*ranks: float, beyond: int = 0) -> Tensor:
    counts = torch.zeros(2 * CUTOFF + 1, dtype=torch.int64)
    for rank in ranks:
        counts[int(2 * rank)] += 1
    counts[0] = beyond
    return counts


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(fmrl_dist.evaluation.metrics)
    assert result.attempted >= 3 and result.failed == 0


def test_by_hand() -> None:
    """Target ranks 1, 3, 3 and 7 of five users: 1/log2(1 + r) is 1, 1/2, 1/2 and 1/3."""
    found = metrics_from_histogram(histogram(1, 3, 3, 7, beyond=1))
    assert found == pytest.approx(
        {
            "recall@5": 3 / 5,
            "ndcg@5": (1 + 0.5 + 0.5) / 5,
            "mrr@5": (1 + 1 / 3 + 1 / 3) / 5,
            "recall@10": 4 / 5,
            "ndcg@10": (1 + 0.5 + 0.5 + 1 / 3) / 5,
            "mrr@10": (1 + 1 / 3 + 1 / 3 + 1 / 7) / 5,
        },
        rel=1e-12,
    )
    assert tuple(found) == METRICS


def test_half_ranks() -> None:
    """A target tied with one other item at the top has target rank 1.5; one tied across the cut-off 5 is beyond it."""
    found = metrics_from_histogram(histogram(1.5, 5.5))
    assert found["recall@5"] == 0.5 and found["recall@10"] == 1
    assert found["ndcg@5"] == pytest.approx(1 / math.log2(2.5) / 2)
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(2.5) + 1 / math.log2(6.5)) / 2)
    assert found["mrr@10"] == pytest.approx((1 / 1.5 + 1 / 5.5) / 2)


@pytest.mark.parametrize(("rank", "at_5", "at_10"), [(5, 1, 1), (5.5, 0, 1), (9.5, 0, 1), (10, 0, 1)])
def test_cutoffs_include_their_rank(rank: float, at_5: float, at_10: float) -> None:
    found = metrics_from_histogram(histogram(rank))
    assert (found["recall@5"], found["recall@10"]) == (at_5, at_10)
    assert found["ndcg@5"] == pytest.approx(at_5 / math.log2(1 + rank))
    assert found["ndcg@10"] == pytest.approx(at_10 / math.log2(1 + rank))
    assert found["mrr@10"] == pytest.approx(at_10 / rank)


def test_perfect_and_hopeless() -> None:
    assert set(metrics_from_histogram(histogram(1, 1, 1)).values()) == {1.0}
    assert set(metrics_from_histogram(histogram(beyond=4)).values()) == {0.0}


def test_no_user() -> None:
    assert metrics_from_histogram(histogram()) == dict.fromkeys(METRICS, 0.0)


def test_histograms_count_half_ranks() -> None:
    ranks = torch.tensor([[1.0, 1.5, 10, 10.5], [torch.inf, 3, 3, 11]], dtype=torch.float64)
    found = histogram_of(ranks, CUTOFF)
    assert found[0].tolist() == histogram(1, 1.5, 10, beyond=1).tolist()
    assert found[1].tolist() == histogram(3, 3, beyond=2).tolist()


@pytest.mark.parametrize("metric", ["recall@5", "ndcg@10", "mrr@7", "mrr@10"])
def test_the_mean_over_users_is_the_metric(metric: str) -> None:
    ranks = torch.tensor([1, 1.5, 4, 5, 5.5, 7, 10, 40, torch.inf], dtype=torch.float64)
    expected = metrics_from_histogram(histogram_of(ranks, CUTOFF), [metric])[metric]
    assert metric_of_users(ranks.numpy(), metric).mean() == pytest.approx(expected, rel=1e-12)


def test_other_cutoffs() -> None:
    found = metrics_from_histogram(histogram_of(torch.tensor([1.0, 60, 100, 101]), 100), ["recall@50", "recall@100"])
    assert found == {"recall@50": 0.25, "recall@100": 0.75}
