"""Ranking with the catalogue split over gloo ranks: the histograms equal those of one process exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.evaluation.catalogue import COMPARED_ITEMS, EmbeddedCatalogue
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.ranker import RotatedModel
from fmrl_dist.evaluation.split_catalogue import SplitCatalogue, tile_bounds
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.rotation import principal_rotation
from tests.fixtures.processes import run_processes
from tests.fixtures.ranking import histograms, make_block, random_users

SIZES = (4, 8, 16)
USERS_OF_BLOCKS = (9, 0, 30, 1, 0, 17, 5)
CASES = {  # items, seen items masked, cosines, cut vectors
    "several tiles": (3 * COMPARED_ITEMS + 500, True, False, False),
    "fewer tiles than ranks": (COMPARED_ITEMS + 1, False, False, False),
    "one tile, cosines": (700, True, True, False),
    "cut vectors": (2 * COMPARED_ITEMS + 500, True, False, True),
}


def make_model() -> FMRLRec:
    torch.manual_seed(0)
    return FMRLRec(SIZES, depth=1, feature_dims={"text": 5}).eval()


@torch.no_grad()
def embed(num_items: int) -> Tensor:
    """Embeddings with repetitions, so that there are ties within a tile and between the tiles of two ranks."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randn(num_items, SIZES[-1], generator=generator)
    items[-300:] = items[:300]
    items[5] = torch.nan
    return items


def make_blocks(num_items: int) -> list[EvaluationBlock]:
    """Some users' targets are among their best items, others' are not; some blocks have no users."""
    histories, targets = random_users(sum(USERS_OF_BLOCKS), num_items, seed=3)
    items, model = embed(num_items).nan_to_num(), make_model()
    whole = make_block(histories, targets, max_length=6)
    with torch.no_grad():
        z = model(items[whole.items], whole.starts, whole.from_start)[whole.starts[1:] - 1]
    best = (z @ items.T).topk(20).indices
    targets = [int(best[user, user % 19]) if user % 3 else target for user, target in enumerate(targets)]
    edges = torch.tensor([0, *USERS_OF_BLOCKS]).cumsum(0).tolist()
    return [make_block(histories[low:high], targets[low:high], max_length=6) for low, high in pairwise(edges)]


def found_with(
    catalogue: EmbeddedCatalogue | SplitCatalogue,
    blocks: list[EvaluationBlock],
    mask_seen: bool,
    normalize: bool,
    rotated: bool,
) -> Tensor:
    """Histograms of some blocks, of the cut network or of cut vectors."""
    if not rotated:
        return histograms(make_model(), catalogue, blocks, mask_seen, normalize)
    rotation = principal_rotation(torch.randn(50, SIZES[-1], generator=torch.Generator().manual_seed(2))).float()
    model = RotatedModel(make_model(), rotation, SIZES[:-1])
    return histograms(model, catalogue.rotated(rotation), blocks, mask_seen, normalize)


def split_histograms(case: str) -> list[list[int]]:
    """Histograms of this rank's blocks, summed over the ranks."""
    num_items, mask_seen, normalize, rotated = CASES[case]
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    items = embed(num_items)
    catalogue = SplitCatalogue.embed(rank, num_ranks, num_items, lambda first, last: items[first:last])
    mine = make_blocks(num_items)[rank::num_ranks]
    mine = mine if rank else mine[:1]  # one rank has far fewer than the others
    found = found_with(catalogue, mine, mask_seen, normalize, rotated)
    dist.all_reduce(found)
    assert len(catalogue.items) <= -(-num_items // COMPARED_ITEMS // num_ranks) * COMPARED_ITEMS + COMPARED_ITEMS
    return found.tolist()


@pytest.mark.multiproc
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_histograms_are_those_of_one_process(num_ranks: int, case: str) -> None:
    num_items, mask_seen, normalize, rotated = CASES[case]
    blocks = make_blocks(num_items)
    kept = [block for number, block in enumerate(blocks) if number % num_ranks or number < num_ranks]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = found_with(EmbeddedCatalogue(embed(num_items)), kept, mask_seen, normalize, rotated)
    finally:
        torch.set_num_threads(threads)
    assert 0.05 < metrics_from_histogram(expected[-1])["recall@10"] < 0.9
    for found in run_processes(num_ranks, split_histograms, case):
        assert found == expected.tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("num_items", [1, COMPARED_ITEMS, COMPARED_ITEMS + 1, 10 * COMPARED_ITEMS + 3])
def test_bounds_are_whole_tiles(num_items: int, num_ranks: int) -> None:
    bounds = tile_bounds(num_items, num_ranks)
    assert (len(bounds), bounds[0], bounds[-1]) == (num_ranks + 1, 0, num_items)
    assert all(bound % COMPARED_ITEMS == 0 or bound == num_items for bound in bounds)
    tiles = [-(-(last - first) // COMPARED_ITEMS) for first, last in pairwise(bounds)]
    assert max(tiles) - min(tiles) <= 1
