"""Recommended items against a full sort, in one process and over several; coverage and popularity by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import COMPARED_ITEMS, Catalogue, EmbeddedCatalogue
from fmrl_dist.evaluation.metrics import metrics_of_lists
from fmrl_dist.evaluation.split_catalogue import SplitCatalogue
from fmrl_dist.evaluation.target_ranks import TargetRanks, seen_items
from fmrl_dist.evaluation.top_lists import exposures
from tests.fixtures.processes import run_processes
from tests.fixtures.ranking import make_block, random_users, target_ranks

SIZES = (4, 8)
NUM_ITEMS, NUM_USERS = COMPARED_ITEMS + 700, 12


def embeddings() -> tuple[Tensor, Tensor]:
    """Small integers, so that scores are exact."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randint(-500, 501, (NUM_USERS, SIZES[-1]), generator=generator).float()
    return z, torch.randint(-500, 501, (NUM_ITEMS, SIZES[-1]), generator=generator).float()


def lists_of(catalogue: Catalogue, z: Tensor, items: Tensor, length: int) -> Tensor:
    """With wrong guesses, so that every pass is repeated: lists must not be filled twice, and ranks must be right."""
    histories, targets = random_users(NUM_USERS, len(items), seed=2)
    block = make_block(histories, targets)
    guesses = torch.full((len(SIZES), NUM_USERS), 0.25)
    ranks = TargetRanks(z, block.targets, seen_items(block), guesses, SIZES, list_length=length)
    catalogue.compare([ranks], StopRequest())
    assert ranks.lists is not None and not ranks.collects
    for which in range(2):
        assert torch.equal(ranks.result()[which], target_ranks(z, items, block, SIZES, mask_seen=bool(which)))
    return ranks.lists.items


def expected_lists(z: Tensor, items: Tensor, length: int) -> np.ndarray:
    histories, targets = random_users(NUM_USERS, len(items), seed=2)
    lists = np.full((2, len(SIZES), NUM_USERS, length), -1)
    for j, size in enumerate(SIZES):
        scores = (z[:, :size] @ items[:, :size].T).double().numpy()
        for user, (history, target) in enumerate(zip(histories, targets, strict=True)):
            order = np.lexsort((np.arange(len(items)), -scores[user]))
            for which, hidden in enumerate((set(), set(history) - {target})):
                kept = [item for item in order.tolist() if item not in hidden][:length]
                lists[which, j, user, : len(kept)] = kept
    return lists


@pytest.mark.parametrize(("num_items", "length"), [(NUM_ITEMS, 20), (NUM_ITEMS, 1), (COMPARED_ITEMS, 100), (7, 10)])
def test_lists_are_a_full_sort(num_items: int, length: int) -> None:
    z, items = embeddings()
    found = lists_of(EmbeddedCatalogue(items[:num_items]), z, items[:num_items], length)
    np.testing.assert_array_equal(found.numpy(), expected_lists(z, items[:num_items], length))


def test_nan_is_not_recommended() -> None:
    z, items = embeddings()
    items[3] = torch.nan
    found = lists_of(EmbeddedCatalogue(items), z, items, 50)
    assert not (found == 3).any() and (found >= 0).all()


def split_lists(length: int) -> list[object]:
    z, items = embeddings()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    catalogue = SplitCatalogue.embed(rank, num_ranks, NUM_ITEMS, lambda first, last: items[first:last])
    found: list[object] = lists_of(catalogue, z + rank, items, length).tolist()
    return found


@pytest.mark.multiproc
def test_ranks_that_share_the_items_list_the_same() -> None:
    z, items = embeddings()
    for rank, found in enumerate(run_processes(3, split_lists, 20)):
        np.testing.assert_array_equal(np.array(found), expected_lists(z + rank, items, 20))


def test_exposures_and_metrics_by_hand() -> None:
    """Five items with 0, 1, 1, 4 and 9 training events: percentiles 0, 3/8, 3/8, 3/4 and 1."""
    lists = torch.tensor([[4, 3, 1], [4, 1, -1]])  # of two users, one with a short list
    counted = exposures(lists, [1, 3], 5)
    assert counted.tolist() == [[0, 0, 0, 0, 2], [0, 2, 0, 1, 2]]
    names = ["coverage@1", "coverage@3", "popularity@1", "popularity@3"]
    found = metrics_of_lists(counted, np.array([0, 1, 1, 4, 9]), names)
    assert found == pytest.approx(
        {"coverage@1": 1 / 5, "coverage@3": 3 / 5, "popularity@1": 1, "popularity@3": (2 * 3 / 8 + 3 / 4 + 2) / 5}
    )
    assert metrics_of_lists(counted * 0, np.array([0, 1, 1, 4, 9]), names) == dict.fromkeys(names, 0.0)
