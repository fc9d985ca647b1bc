"""The order of training users: each once per epoch, the same for any number of ranks, a pure function of its inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.data.order import Order

Pairs = list[tuple[int, int]]

lanes_and_batches = st.tuples(st.integers(1, 8), st.integers(1, 4)).map(lambda pair: (pair[0], pair[0] * pair[1]))
small_counts = st.lists(st.integers(0, 9), min_size=1, max_size=12)
POOL_BLOCKS = 64  # the default
many_blocks = st.lists(st.integers(0, 3), min_size=2 * POOL_BLOCKS, max_size=3 * POOL_BLOCKS)
counts = (small_counts | many_blocks).filter(lambda values: sum(values) > 0)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 500)


def as_pairs(rows: np.ndarray) -> Pairs:
    assert rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 2
    return [(block, row) for block, row in rows.tolist()]


def permutation(block_counts: list[int], seed: int, epoch: int) -> Pairs:
    """The epoch's whole permutation: one lane, one step."""
    return as_pairs(Order(block_counts, sum(block_counts), 1, seed).batch(epoch, 0, 0))


@settings(max_examples=50)
@given(counts, lanes_and_batches, seeds, epochs)
def test_each_user_once_per_epoch(block_counts: list[int], shape: tuple[int, int], seed: int, epoch: int) -> None:
    lanes, batch_size = shape
    order = Order(block_counts, batch_size, lanes, seed)
    seen = [
        pair
        for step in range(order.steps_per_epoch)
        for lane in range(lanes)
        for pair in as_pairs(order.batch(epoch, step, lane))
    ]
    assert sorted(seen) == [(block, row) for block, count in enumerate(block_counts) for row in range(count)]


@settings(max_examples=50)
@given(counts, lanes_and_batches, seeds, epochs)
def test_lanes_are_slices_of_the_permutation(
    block_counts: list[int], shape: tuple[int, int], seed: int, epoch: int
) -> None:
    lanes, batch_size = shape
    order = Order(block_counts, batch_size, lanes, seed)
    users, per_lane = permutation(block_counts, seed, epoch), batch_size // lanes
    num_users = len(users)
    for lane in range(lanes):
        slice_of_lane = users[lane * num_users // lanes : (lane + 1) * num_users // lanes]
        for step in range(order.steps_per_epoch + 1):
            expected = slice_of_lane[step * per_lane : (step + 1) * per_lane]
            assert as_pairs(order.batch(epoch, step, lane)) == expected


@settings(max_examples=50)
@given(counts, lanes_and_batches, seeds)
def test_an_epoch_ends_for_all_lanes_at_once(block_counts: list[int], shape: tuple[int, int], seed: int) -> None:
    """The last step has a user in some lane, the one after it in none. Lanes differ by one user at most, so only the
    last two steps can be short."""
    lanes, batch_size = shape
    order = Order(block_counts, batch_size, lanes, seed)
    sizes = np.array(
        [[len(order.batch(0, step, lane)) for lane in range(lanes)] for step in range(order.steps_per_epoch + 1)]
    )
    assert sizes[-1].sum() == 0 and sizes[-2].sum() > 0
    assert (sizes[:-2] >= batch_size // lanes - 1).all()
    assert (sizes[:-3] == batch_size // lanes).all()


@settings(max_examples=50)
@given(counts, lanes_and_batches, seeds, epochs)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    block_counts: list[int], shape: tuple[int, int], seed: int, epoch: int
) -> None:
    """Each rank has its own Order and reads only its own lanes."""
    lanes, batch_size = shape
    alone = Order(block_counts, batch_size, lanes, seed)
    for world_size in range(2, lanes + 1):
        ranks = [Order(block_counts, batch_size, lanes, seed) for _ in range(world_size)]
        assert {order.steps_per_epoch for order in ranks} == {alone.steps_per_epoch}
        for step in range(alone.steps_per_epoch):
            shared = [
                as_pairs(order.batch(epoch, step, lane))
                for rank, order in enumerate(ranks)
                for lane in range(rank, lanes, world_size)
            ]
            whole = [as_pairs(alone.batch(epoch, step, lane)) for lane in range(lanes)]
            assert sorted(sum(shared, [])) == sorted(sum(whole, []))


@settings(max_examples=50)
@given(counts, lanes_and_batches, seeds, st.data())
def test_a_batch_depends_on_epoch_and_step_alone(
    block_counts: list[int], shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    """Queried in any sequence, an Order returns what a fresh one does, so resuming at a step needs no earlier one."""
    lanes, batch_size = shape
    order = Order(block_counts, batch_size, lanes, seed)
    place = st.tuples(epochs, st.integers(0, order.steps_per_epoch), st.integers(0, lanes - 1))
    for epoch, step, lane in data.draw(st.lists(place, max_size=8)):
        fresh = Order(block_counts, batch_size, lanes, seed)
        np.testing.assert_array_equal(order.batch(epoch, step, lane), fresh.batch(epoch, step, lane), strict=True)


@pytest.mark.parametrize("block_counts", [[40], [5] * 8, [1] * (POOL_BLOCKS + 1)], ids=["one", "some", "pools"])
def test_epochs_and_seeds_have_different_orders(block_counts: list[int]) -> None:
    orders = {tuple(permutation(block_counts, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@settings(max_examples=50)
@given(counts, lanes_and_batches, seeds)
def test_the_length_is_known_beforehand(block_counts: list[int], shape: tuple[int, int], seed: int) -> None:
    """It depends on the number of users alone, not on their blocks or the seed."""
    lanes, batch_size = shape
    num_users = sum(block_counts)
    longest_lane = max((lane + 1) * num_users // lanes - lane * num_users // lanes for lane in range(lanes))
    steps = -(-longest_lane * lanes // batch_size)
    assert Order(block_counts, batch_size, lanes, seed).steps_per_epoch == steps
    assert Order([num_users], batch_size, lanes, 0).steps_per_epoch == steps


@settings(max_examples=50)
@given(st.integers(8, POOL_BLOCKS), seeds, epochs)
def test_users_and_blocks_are_shuffled_by_separate_streams(num_blocks: int, seed: int, epoch: int) -> None:
    """With one user per block, a shared stream would apply the blocks' permutation twice."""
    order = Order([1] * num_blocks, num_blocks, 1, seed)
    blocks, _ = order._blocks(epoch)
    assert order.batch(epoch, 0, 0)[:, 0].tolist() != blocks[blocks].tolist()


def test_a_pool_holds_whole_blocks_and_mixes_their_users() -> None:
    """So a reader needs at most POOL_BLOCKS blocks per lane at a time, yet users of one block are spread."""
    num_blocks, per_block = 2 * POOL_BLOCKS + 5, 7
    blocks = np.array(permutation([per_block] * num_blocks, seed=3, epoch=1))[:, 0]
    pools = [blocks[low : low + POOL_BLOCKS * per_block] for low in range(0, len(blocks), POOL_BLOCKS * per_block)]
    assert [len(np.unique(pool)) for pool in pools] == [POOL_BLOCKS, POOL_BLOCKS, 5]
    first = set(pools[0].tolist())
    assert first != set(range(POOL_BLOCKS))  # the blocks themselves are shuffled
    # Among n blocks, neighbours share a block with probability 1/n: 7 of 448 here, 384 if blocks were read in turn.
    assert (pools[0][1:] == pools[0][:-1]).sum() < 25


def test_every_user_comes_first_equally_often() -> None:
    block_counts, draws = [4, 1, 7], 2400
    firsts = [permutation(block_counts, seed=0, epoch=epoch)[0] for epoch in range(draws)]
    frequency = [firsts.count((block, row)) for block, count in enumerate(block_counts) for row in range(count)]
    expected = draws / sum(block_counts)
    chi_square = sum((found - expected) ** 2 / expected for found in frequency)
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_more_lanes_than_users_leaves_lanes_empty() -> None:
    order = Order([1, 2], batch_size=16, lanes=16, seed=0)
    assert order.steps_per_epoch == 1
    sizes = [len(order.batch(0, 0, lane)) for lane in range(16)]
    assert sum(sizes) == 3 and max(sizes) == 1
