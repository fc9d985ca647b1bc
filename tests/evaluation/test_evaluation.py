"""Target ranks in one tiled pass against a full sort in float64: all sizes, ties, masking, NaN, and sums over blocks.

Given outputs and embeddings are small integers: every sum is exact in float32, whatever the order of its terms, so
target ranks must agree exactly, and there are ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.evaluation.catalogue import COMPARED_ITEMS, EmbeddedCatalogue
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.target_ranks import GUESSED
from fmrl_dist.model.embed_catalogue import check_rankable
from fmrl_dist.model.fmrlrec import FMRLRec
from tests.fixtures.ranking import CUTOFF, histograms, make_block, random_users, target_ranks

SIZES = (4, 8, 16)
# Fewer items than a tile; whole tiles; a last tile of one item.
CATALOGUES = [1, 2, 21, GUESSED, 1000, COMPARED_ITEMS, COMPARED_ITEMS + 1, 2 * COMPARED_ITEMS + 700]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def integers(rows: int, width: int, high: int, seed: int) -> Tensor:
    """Integers in -high … high as float32."""
    return torch.randint(-high, high + 1, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def reference_rank(scores: np.ndarray, target: int, seen: Sequence[int], mask_seen: bool) -> float:
    """Target rank among ``scores`` [V]: the middle of the positions of its ties in the sorted list."""
    candidates = sorted(set(range(len(scores))) - (set(seen) - {target} if mask_seen else set()))
    values = np.sort(scores[candidates])[::-1]
    places = np.flatnonzero(values == scores[target]) + 1
    return (places[0] + places[-1]) / 2


def reference_ranks(
    z: Tensor, items: Tensor, histories: Sequence[Sequence[int]], targets: Sequence[int], mask_seen: bool
) -> np.ndarray:
    """[S, U]; the scores of a size are one float64 product over its prefix."""
    z64, items64 = z.double().numpy(), items.double().numpy()
    ranks = [
        [
            reference_rank(items64[:, :size] @ z64[user, :size], target, history, mask_seen)
            for user, (history, target) in enumerate(zip(histories, targets, strict=True))
        ]
        for size in SIZES
    ]
    return np.array(ranks)


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("high", [1, 500], ids=["many ties", "few ties"])
@pytest.mark.parametrize("num_items", CATALOGUES)
def test_ranks_equal_a_full_sort(num_items: int, high: int, mask_seen: bool) -> None:
    num_users = 24
    z, items = integers(num_users, SIZES[-1], high, seed=1), integers(num_items, SIZES[-1], high, seed=2)
    histories, targets = random_users(num_users, num_items, seed=num_items)
    # In a large catalogue a random target is never near the top: move half the targets there, at varying sizes.
    for user in range(0, num_users, 2):
        size = SIZES[user // 2 % len(SIZES)]
        order = (items[:, :size] @ z[user, :size]).argsort(descending=True)
        targets[user] = int(order[min(user // 2, num_items - 1)])
    expected = reference_ranks(z, items, histories, targets, mask_seen)
    if high == 500 and num_items > 2 * CUTOFF:
        assert 0 < (expected <= CUTOFF).sum() < expected.size
    found = target_ranks(z, items, make_block(histories, targets), SIZES, mask_seen)
    np.testing.assert_array_equal(found.numpy(), expected)


@settings(max_examples=60)
@given(st.integers(1, 700), st.integers(0, 5), st.integers(0, 4), st.booleans(), st.integers(0, 2**32))
def test_ranks_equal_a_full_sort_on_random_shapes(
    num_items: int, num_users: int, high: int, mask_seen: bool, seed: int
) -> None:
    """With high = 0 all scores are equal."""
    z, items = integers(num_users, SIZES[-1], high, seed), integers(num_items, SIZES[-1], high, seed + 1)
    histories, targets = random_users(num_users, num_items, seed)
    expected = reference_ranks(z, items, histories, targets, mask_seen).reshape(len(SIZES), num_users)
    found = target_ranks(z, items, make_block(histories, targets), SIZES, mask_seen)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("num_items", [COMPARED_ITEMS - 1, COMPARED_ITEMS + 2000])
@pytest.mark.parametrize("num_equal", [0, 1, 2, 17, 18, 19, 20, 500, 4000])
@pytest.mark.parametrize("num_higher", [0, 1, 8, 9, 10, 25])
def test_a_tie_counts_half(num_higher: int, num_equal: int, num_items: int) -> None:
    """Target rank = 1 + greater + ½ equal; ties are before and after the target, in one tile or in two."""
    places = torch.randperm(num_items, generator=torch.Generator().manual_seed(num_equal))
    scores = torch.zeros(num_items)
    scores[places[:num_higher]] = 2
    scores[places[num_higher : num_higher + num_equal + 1]] = 1
    target = int(places[num_higher + num_equal // 2])
    items = torch.zeros(num_items, SIZES[-1])
    items[:, 0] = scores
    z = torch.zeros(1, SIZES[-1])
    z[0, 0] = 1
    found = target_ranks(z, items, make_block([[0]], [target]), SIZES, mask_seen=False)
    assert found.flatten().tolist() == [1 + num_higher + num_equal / 2] * len(SIZES)


def line_of_scores(num_items: int) -> tuple[Tensor, Tensor]:
    """z and items such that item 0 scores highest, then 1, 2, …, at every size."""
    items = torch.zeros(num_items, SIZES[-1])
    items[:, 0] = torch.arange(num_items, 0, -1)
    z = torch.zeros(1, SIZES[-1])
    z[0, 0] = 1
    return z, items


def ranks_of(history: list[int], target: int, mask_seen: bool, max_length: int = 50, num_items: int = 9000) -> Tensor:
    z, items = line_of_scores(num_items)
    return target_ranks(z, items, make_block([history], [target], max_length), SIZES, mask_seen).flatten()


def test_masking_takes_seen_items_out_once() -> None:
    history = [2, 0, 2, 7, 2]  # item 7 scores less than the target anyway
    assert ranks_of(history, 4, mask_seen=False).unique().tolist() == [5]
    assert ranks_of(history, 4, mask_seen=True).unique().tolist() == [3]


def test_a_target_in_its_own_history_is_not_masked() -> None:
    assert ranks_of([3, 1, 3, 0], 3, mask_seen=True).unique().tolist() == [2]
    assert ranks_of([3, 3], 3, mask_seen=True).unique().tolist() == [4]


def test_masking_takes_the_whole_history_not_only_what_the_model_reads() -> None:
    """60 events, of which the model reads the last 3: the 59 items before the target are all hidden."""
    history = list(range(60))
    assert ranks_of(history, 60, mask_seen=True, max_length=3).unique().tolist() == [1]


def test_masking_reaches_every_tile() -> None:
    """Scores rise with the item id, so that the hidden item is in the last tile."""
    num_items = 2 * COMPARED_ITEMS + 10
    z, items = line_of_scores(num_items)
    block = make_block([[num_items - 1, COMPARED_ITEMS, 5]], [num_items - 3])
    assert target_ranks(z, items.flip(0), block, SIZES, mask_seen=False).unique().tolist() == [3]
    assert target_ranks(z, items.flip(0), block, SIZES, mask_seen=True).unique().tolist() == [2]


def test_one_user_is_not_masked_by_another() -> None:
    z, items = line_of_scores(100)
    block = make_block([[0, 1, 2], [50]], [3, 3])
    ranks = target_ranks(z.expand(2, -1), items, block, SIZES, mask_seen=True)
    assert ranks.unique(dim=0).tolist() == [[1, 4]]


def test_masking_everything_else_leaves_rank_1() -> None:
    assert ranks_of(list(range(30)), 29, mask_seen=True, num_items=30).unique().tolist() == [1]


@pytest.mark.parametrize("num_items", [5, 20, 300, COMPARED_ITEMS + 5])
@pytest.mark.parametrize("where", ["output", "target", "others", "all items"])
def test_nan_scores_are_no_hits(where: str, num_items: int) -> None:
    """A NaN score, of the target or of another item, never improves the target rank."""
    z, items = line_of_scores(num_items)
    block = make_block([[1]], [0])
    assert target_ranks(z, items, block, SIZES, mask_seen=False).unique().tolist() == [1]
    if where == "output":
        z[0, 0] = torch.nan
    else:
        items[{"target": slice(0, 1), "others": slice(1, None), "all items": slice(None)}[where], 0] = torch.nan
    ranks = target_ranks(z, items, block, SIZES, mask_seen=False)
    assert ranks.unique().tolist() == [num_items if where == "others" else torch.inf]  # after all of them


def test_a_nan_in_a_later_chunk_spares_the_smaller_sizes() -> None:
    z, items = line_of_scores(50)
    items[0, SIZES[0]] = torch.nan
    ranks = target_ranks(z, items, make_block([[1]], [0]), SIZES, mask_seen=False)
    assert ranks[0].item() == 1
    assert (ranks[1:] > CUTOFF).all()


NUM_ITEMS = 700


@pytest.fixture(scope="module")
def model() -> FMRLRec:
    torch.manual_seed(0)
    return FMRLRec(SIZES, depth=2, feature_dims={"text": 5}).double().eval()


@pytest.fixture(scope="module")
def embeddings(model: FMRLRec) -> Tensor:
    features = torch.randn(NUM_ITEMS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model.encoder(features, torch.ones(NUM_ITEMS, 1, dtype=torch.bool)).detach()


def likely_targets(model: FMRLRec, embeddings: Tensor, histories: list[list[int]]) -> list[int]:
    """Targets at target ranks 1, 3, 5, … 13, 1, … of the largest size, so that there are hits and misses."""
    targets = []
    for user, history in enumerate(histories):
        order = (embeddings @ reference_output(model, embeddings, history)).argsort(descending=True)
        targets.append(int(order[2 * (user % 7)]))
    return targets


@torch.no_grad()
def reference_output(model: FMRLRec, embeddings: Tensor, history: list[int]) -> Tensor:
    """z [D] after a history, one event at a time."""
    state = model.initial_state(1)
    for item in history:
        state, z = model.step(state, embeddings[item][None])
    return z[0].detach()


@pytest.mark.parametrize("mask_seen", [False, True])
def test_histograms_equal_a_loop_over_users(model: FMRLRec, embeddings: Tensor, mask_seen: bool) -> None:
    """The real model, one user at a time and one event at a time, against packed blocks, some cut to 5 events."""
    histories, _ = random_users(40, NUM_ITEMS, seed=5)
    targets = likely_targets(model, embeddings, [history[-5:] for history in histories])
    z = torch.stack([reference_output(model, embeddings, history[-5:]) for history in histories])
    expected = np.zeros((len(SIZES), 2 * CUTOFF + 1), dtype=np.int64)
    for j, ranks in enumerate(reference_ranks(z, embeddings, histories, targets, mask_seen)):
        for rank in ranks:
            expected[j, int(2 * rank) if rank <= CUTOFF else 0] += 1
    blocks = [make_block(histories[low : low + 9], targets[low : low + 9], max_length=5) for low in range(0, 40, 9)]
    found = histograms(model, EmbeddedCatalogue(embeddings), blocks, mask_seen)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.sum(1).tolist() == [40] * len(SIZES)
    assert 0 < metrics_from_histogram(found[-1])["recall@10"] < 1


@pytest.fixture(scope="module")
def users(model: FMRLRec, embeddings: Tensor) -> tuple[list[list[int]], list[int]]:
    histories, _ = random_users(30, NUM_ITEMS, seed=6)
    return histories, likely_targets(model, embeddings, histories)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 4))
def test_any_split_of_the_users_sums_to_the_whole(
    model: FMRLRec,
    embeddings: Tensor,
    users: tuple[list[list[int]], list[int]],
    cuts: list[int],
    world_size: int,
) -> None:
    """Blocks of any sizes, some empty, divided among any number of ranks."""
    histories, targets = users
    catalogue = EmbeddedCatalogue(embeddings)
    whole = histograms(model, catalogue, [make_block(histories, targets)], mask_seen=True)
    edges = [0, *sorted(cuts), 30]
    blocks = [
        make_block(histories[low:high], targets[low:high]) for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    parts = [histograms(model, catalogue, blocks[rank::world_size], mask_seen=True) for rank in range(world_size)]
    assert torch.equal(torch.stack(parts).sum(0), whole)


def test_no_blocks_count_no_users(model: FMRLRec, embeddings: Tensor) -> None:
    found = histograms(model, EmbeddedCatalogue(embeddings), [], mask_seen=False)
    assert torch.equal(found, torch.zeros(len(SIZES), 2 * CUTOFF + 1, dtype=torch.int64))


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e200])  # in float64
def test_outputs_that_are_not_finite_are_refused(factor: float, model: FMRLRec, embeddings: Tensor) -> None:
    """No score is higher than NaN, so they would be figures of 0."""
    histories, targets = random_users(6, NUM_ITEMS, seed=7)
    catalogue, block = EmbeddedCatalogue(embeddings), make_block(histories, targets)
    hook = model.register_forward_hook(lambda _module, _inputs, z: z * factor)
    try:
        with pytest.raises(UserError, match="the model's outputs are not finite, or too large to compare"):
            histograms(model, catalogue, [block], mask_seen=False)
    finally:
        hook.remove()
    assert histograms(model, catalogue, [block], mask_seen=False).sum() == 6 * len(SIZES)
    with pytest.raises(UserError, match="the model's item embeddings are not finite, or too large to compare"):
        check_rankable(embeddings * factor, "item embeddings")
    check_rankable(embeddings * 1e3, "item embeddings")


def test_cosines_rank_as_normalised_prefixes_do() -> None:
    """Each size separately: item prefixes divided by their norms, one of them zero."""
    generator = torch.Generator().manual_seed(3)
    z, items = torch.randn(7, 12, generator=generator), torch.randn(NUM_ITEMS, 12, generator=generator)
    items *= torch.rand(NUM_ITEMS, 1, generator=generator) * 5
    items[3] = 0
    batch = make_block([[1, 2]] * 7, list(range(7)))
    found = target_ranks(z, items, batch, (4, 12), True, normalize=True)
    for row, size in zip(found, (4, 12), strict=True):
        unit = torch.nn.functional.normalize(items[:, :size], dim=1)
        expected = target_ranks(z[:, :size], unit, batch, (size,), True)[0]
        assert torch.equal(row, expected)
    assert not torch.equal(found, target_ranks(z, items, batch, (4, 12), True))
