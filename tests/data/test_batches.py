"""Training windows and evaluation histories against a reference that handles one user at a time, in plain lists."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock, Packed, evaluation_blocks
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.manifest import Block
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule, target_windows
from shards.store.builder import build_store
from tests.fixtures.stores import tiny_config, write_histories, write_items

NUM_ITEMS = 40
# Events of the raw histories; the last two of 3 or more are held out, so training sees 1, 50, 51, 52, …
LENGTHS = [2, 3, 52, 53, 54, 4, 2, 103, 17, 3, 61, 9, 5, 30, 3, 2, 152, 8, 6, 153, 11]
USERS_PER_BLOCK = 4

Window = tuple[list[int], list[int], bool]  # inputs, targets, whether it starts at the start position


def raw_histories() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, NUM_ITEMS, length).tolist() for length in LENGTHS]


def train_histories() -> list[list[int]]:
    """Training slices by internal user id, which is the user's row."""
    return [history[:-2] if len(history) >= 3 else history for history in raw_histories()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("histories")
    write_items(root / "items.parquet", list(range(NUM_ITEMS)))
    write_histories(root / "sequences.parquet", {f"u{i}": history for i, history in enumerate(raw_histories())})
    config = tiny_config(root, root / "store", features={})
    return build_store(replace(config, store=replace(config.store, users_per_block=USERS_PER_BLOCK)))[0]


def reference_windows(history: list[int], max_length: int, windows: str, predict_first: bool) -> list[Window]:
    """Windows of one user, the last one first: runs of at most ``max_length`` targets, cut from the end."""
    targets = list(range(len(history)) if predict_first else range(1, len(history)))
    runs: list[list[int]] = []
    while targets and not (windows == "last" and runs):
        runs.append(targets[-max_length:])
        targets = targets[:-max_length]
    return [([history[t - 1] for t in run if t > 0], [history[t] for t in run], run[0] == 0) for run in runs]


def unpack(batch: Packed) -> dict[int, list[Window]]:
    """The windows of a training batch by user."""
    found, position = defaultdict(list), 0
    for i, user in enumerate(batch.users.tolist()):
        inputs = batch.items[batch.starts[i] : batch.starts[i + 1]].tolist()
        from_start = bool(batch.from_start[i])
        end = position + len(inputs) + from_start
        found[user].append((inputs, batch.targets[position:end].tolist(), from_start))
        position = end
    assert position == len(batch.targets)
    assert batch.starts[0] == 0 and batch.starts[-1] == len(batch.items)
    return dict(found)


def assert_types(batch: Packed) -> None:
    assert {t.dtype for t in (batch.users, batch.items, batch.starts, batch.targets)} == {torch.int64}
    assert batch.from_start.dtype == torch.bool
    assert len(batch.users) == len(batch.starts) - 1 == len(batch.from_start)


def whole_epoch(
    store: Store, max_length: int, windows: str, predict_first: bool, lanes: int = 2, batch_size: int = 4, seed: int = 0
) -> dict[int, list[Window]]:
    """Every batch of an epoch, lane by lane, as two ranks would read them."""
    order = Order([block.count for block in store.manifest.splits["train"]], batch_size, lanes, seed)
    stream = TrainStream(store, order, WindowRule(max_length, windows, predict_first))
    found: dict[int, list[Window]] = {}
    for step in range(order.steps_per_epoch):
        for rank in range(min(2, lanes)):
            batch = stream.batch(0, step, range(rank, lanes, min(2, lanes)))
            assert_types(batch)
            users = unpack(batch)
            assert not found.keys() & users.keys()
            found |= users
    return found


def expected_epoch(max_length: int, windows: str, predict_first: bool) -> dict[int, list[Window]]:
    by_user = {
        user: reference_windows(history, max_length, windows, predict_first)
        for user, history in enumerate(train_histories())
    }
    return {user: found for user, found in by_user.items() if found}


@pytest.mark.parametrize("predict_first", [True, False])
@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("max_length", [1, 2, 50, 1000])
def test_an_epoch_holds_the_windows_of_every_user(
    store: Store, max_length: int, windows: str, predict_first: bool
) -> None:
    assert whole_epoch(store, max_length, windows, predict_first) == expected_epoch(max_length, windows, predict_first)


@settings(max_examples=30)
@given(
    st.integers(1, 70),
    st.sampled_from(["last", "all"]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**33),
)
def test_windows_do_not_depend_on_batch_lanes_and_seed(
    store: Store, max_length: int, windows: str, predict_first: bool, lanes: int, per_lane: int, seed: int
) -> None:
    found = whole_epoch(store, max_length, windows, predict_first, lanes, lanes * per_lane, seed)
    assert found == expected_epoch(max_length, windows, predict_first)


@settings(max_examples=30)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**33), st.integers(0, 9))
def test_a_resumed_rank_reads_the_windows_of_its_users_only(
    store: Store, data: st.DataObject, lanes: int, per_lane: int, seed: int, epoch: int
) -> None:
    """Starting at any step, for any number of ranks: no block of earlier steps or other ranks is read."""
    blocks = store.manifest.splits["train"]
    order = Order([block.count for block in blocks], lanes * per_lane, lanes, seed, data.draw(st.integers(1, 3)))
    world_size = data.draw(st.integers(1, lanes))
    mine = range(data.draw(st.integers(0, world_size - 1)), lanes, world_size)
    steps = range(data.draw(st.integers(0, order.steps_per_epoch - 1)), order.steps_per_epoch)
    read: list[Block] = []

    def read_block(block: Block) -> dict[str, np.ndarray]:
        read.append(block)
        return Store.read_block(store, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "read_block", read_block)
        stream = TrainStream(store, order, WindowRule(50, "last", True))
        for step in steps:
            stream.batch(epoch, step, mine)
    pools = {pool for step in steps for lane in mine for pool, _, _ in order.spans(epoch, step, lane)}
    needed = {int(block) for pool in pools for block, _ in order.pool(epoch, pool)}
    assert {blocks.index(block) for block in read} == needed
    assert len(read) <= len(mine) * len(blocks)


@pytest.mark.parametrize("num_events", [50, 51, 52])
def test_max_length_counts_targets(store: Store, num_events: int) -> None:
    """By hand: inputs, targets, and whether the window starts at the start position."""
    user = [len(history) for history in train_histories()].index(num_events)
    history = train_histories()[user]
    expected = {
        50: (history[:49], history, True),  # 49 inputs and the start position for 50 targets
        51: (history[:50], history[1:], False),
        52: (history[1:51], history[2:], False),
    }[num_events]
    assert len(expected[1]) == 50
    assert whole_epoch(store, 50, "last", predict_first=True)[user] == [expected]


def test_without_first_targets_50_events_have_49() -> None:
    _, first, last = target_windows(np.array([50, 51, 52]), WindowRule(50, "last", False))
    assert (first.tolist(), last.tolist()) == ([1, 1, 2], [50, 51, 52])


def test_one_event_histories(store: Store) -> None:
    """Their only event is predicted from the start position, or not at all."""
    single = [user for user, history in enumerate(train_histories()) if len(history) == 1]
    assert len(single) == 3
    with_first, without = (whole_epoch(store, 50, "all", predict_first) for predict_first in (True, False))
    for user in single:
        assert with_first[user] == [([], train_histories()[user], True)]
        assert user not in without


def test_a_window_of_the_start_position_alone(store: Store) -> None:
    """51 targets in windows of 50: the first target is left for a window without inputs."""
    user = [len(history) for history in train_histories()].index(51)
    history = train_histories()[user]
    assert whole_epoch(store, 50, "all", True)[user] == [
        (history[:50], history[1:], False),
        ([], history[:1], True),
    ]


@given(st.lists(st.integers(1, 200), max_size=20), st.integers(1, 60), st.booleans())
def test_all_windows_partition_the_targets(lengths: list[int], max_length: int, predict_first: bool) -> None:
    owner, first, last = target_windows(np.array(lengths, dtype=np.int64), WindowRule(max_length, "all", predict_first))
    assert (last - first <= max_length).all() and (last > first).all()
    covered: dict[int, list[int]] = {i: [] for i in range(len(lengths))}
    for i, low, high in zip(owner.tolist(), first.tolist(), last.tolist(), strict=True):
        covered[i] += range(low, high)
    for i, length in enumerate(lengths):
        assert sorted(covered[i]) == list(range(0 if predict_first else 1, length))


@given(st.lists(st.integers(1, 200), max_size=20), st.integers(1, 60), st.booleans())
def test_the_last_window_is_the_first_of_all(lengths: list[int], max_length: int, predict_first: bool) -> None:
    array = np.array(lengths, dtype=np.int64)
    owner, first, last = target_windows(array, WindowRule(max_length, "all", predict_first))
    kept = np.flatnonzero(np.diff(owner, prepend=-1))  # each owner's first window
    for found, whole in zip(
        target_windows(array, WindowRule(max_length, "last", predict_first)), (owner, first, last), strict=True
    ):
        np.testing.assert_array_equal(found, whole[kept], strict=True)


def test_an_empty_lane_gives_an_empty_batch(store: Store) -> None:
    counts = [block.count for block in store.manifest.splits["train"]]
    order = Order(counts, batch_size=24, lanes=24, seed=0)
    stream = TrainStream(store, order, WindowRule(50, "last", True))
    empty = [lane for lane in range(24) if len(order.batch(0, 0, lane)) == 0]
    assert len(empty) == 24 - len(LENGTHS)
    for lanes in (empty, empty[:1]):
        batch = stream.batch(0, 0, lanes)
        assert_types(batch)
        assert unpack(batch) == {}
        assert batch.starts.tolist() == [0]


def test_users_without_targets_give_an_empty_batch(store: Store) -> None:
    """One-event histories, without a start position to predict them from."""
    counts = [block.count for block in store.manifest.splits["train"]]
    order = Order(counts, batch_size=32, lanes=32, seed=0)
    stream = TrainStream(store, order, WindowRule(50, "all", False))
    lane = next(
        lane
        for lane in range(32)
        for block, row in order.batch(0, 0, lane).tolist()
        if len(train_histories()[block * USERS_PER_BLOCK + row]) == 1
    )
    batch = stream.batch(0, 0, [lane])
    assert_types(batch)
    assert unpack(batch) == {}


@dataclass(frozen=True)
class Ranked:
    """One user of an evaluation block."""

    items: list[int]
    target: int
    seen: list[int]


def ranked_users(blocks: list[EvaluationBlock]) -> dict[int, Ranked]:
    found: dict[int, Ranked] = {}
    for block in blocks:
        assert_types(block)
        assert not block.from_start.any()
        histories, seen = (split(*csr) for csr in ((block.items, block.starts), (block.seen, block.seen_starts)))
        for user, items, target, whole in zip(
            block.users.tolist(), histories, block.targets.tolist(), seen, strict=True
        ):
            assert user not in found
            found[user] = Ranked(items, target, whole)
    return found


def split(values: Tensor, starts: Tensor) -> list[list[int]]:
    assert values.dtype == starts.dtype == torch.int64
    return [part.tolist() for part in values.tensor_split(starts[1:-1])] if len(starts) > 1 else []


def evaluated(store: Store, split_name: str, max_length: int, num_users: int = 0) -> dict[int, Ranked]:
    numbers = range(len(store.manifest.splits[split_name]))
    return ranked_users(list(evaluation_blocks(store, split_name, max_length, numbers, num_users)))


@pytest.mark.parametrize("max_length", [1, 50, 1000])
@pytest.mark.parametrize(("split_name", "held_out"), [("valid", 2), ("test", 1)])
def test_evaluation_histories(store: Store, split_name: str, held_out: int, max_length: int) -> None:
    """The last events before the target, and all of them for masking; the test history includes the validation item."""
    expected = {}
    for user, history in enumerate(raw_histories()):
        if len(history) >= 3:
            before, target = history[:-held_out], history[-held_out]
            expected[user] = Ranked(before[-max_length:], target, before)
    assert evaluated(store, split_name, max_length) == expected


def test_ranks_share_the_evaluation_blocks(store: Store) -> None:
    whole = evaluated(store, "test", 50)
    num_blocks = len(store.manifest.splits["test"])
    assert num_blocks > 2
    shares = [ranked_users(list(evaluation_blocks(store, "test", 50, range(rank, num_blocks, 3)))) for rank in range(3)]
    assert sum(map(len, shares)) == len(whole)
    assert shares[0] | shares[1] | shares[2] == whole


@pytest.mark.parametrize("num_users", [1, 2, 5, 7, 17, 18, 19, 1000])
def test_an_evaluation_subset_is_evenly_spread(store: Store, num_users: int) -> None:
    everybody = evaluated(store, "valid", 50)
    assert len(everybody) == 18
    subset = evaluated(store, "valid", 50, num_users)
    assert len(subset) == min(num_users, 18)
    assert subset.items() <= everybody.items()
    positions = [list(everybody).index(user) for user in subset]
    gaps = np.diff([*positions, positions[0] + 18])  # around the circle
    assert gaps.max() - gaps.min() <= 1


def test_a_block_without_chosen_users_is_empty(store: Store) -> None:
    blocks = list(evaluation_blocks(store, "valid", 50, range(len(store.manifest.splits["valid"])), num_users=1))
    sizes = [len(block.users) for block in blocks]
    assert sorted(sizes) == [0] * (len(sizes) - 1) + [1]
    empty = blocks[sizes.index(0)]
    assert_types(empty)
    assert empty.seen_starts.tolist() == [0]


def test_moving_a_batch_keeps_its_kind(store: Store) -> None:
    block = next(evaluation_blocks(store, "test", 50, [0]))
    moved = block.to(torch.device("meta"))
    assert type(moved) is EvaluationBlock
    assert {t.device.type for t in (moved.users, moved.items, moved.seen, moved.seen_starts)} == {"meta"}
