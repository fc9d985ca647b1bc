"""What one pass over the histories counts, against plain loops over them."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.store.builder import build_store
from shards.store_page.figures import _binned, length_edges
from shards.store_page.survey import MOST_TIME_BINS, SHOWN_EVENTS, TimeBins, survey
from tests.fixtures.stores import ITEMS, read_split, tiny_config, write_histories, write_raw


def test_counts_equal_plain_loops(tmp_path: Path) -> None:
    write_raw(tmp_path)
    generator = np.random.default_rng(1)
    histories = {f"u{n}": generator.choice(ITEMS, n % 23).tolist() for n in range(60)}
    histories |= {f"v{n}": ["c"] * 3 for n in range(5)}  # what one ends with, the next begins with
    times = {user: sorted(generator.integers(0, 9, len(items)).tolist()) for user, items in histories.items()}
    write_histories(tmp_path / "sequences.parquet", histories, times)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", sequences={"times": "times"}))
    found = survey(store)
    for split, counts in found.splits.items():
        items, when = read_split(store, split), read_split(store, split, "times")
        lengths = [len(history) for history in items.values()]
        assert (counts.users, counts.events, counts.longest) == (len(lengths), sum(lengths), max(lengths))
        assert counts.lengths.nonzero()[0].tolist() == sorted(set(lengths))
        assert counts.quantile(0.5) == sorted(lengths)[-(-len(lengths) // 2) - 1]
        repeats = [len(history) - len(set(history)) for history in items.values()]
        assert (counts.repeated, counts.users_with_repeats) == (sum(repeats), sum(n > 0 for n in repeats))
        pairs = [list(zip(items[user], when[user], strict=True)) for user in items]
        assert counts.repeated_at_once == sum(len(events) - len(set(events)) for events in pairs)
    assert found.times is not None and (found.times.width, found.times.low, found.times.high) == (1, 0, 8)
    by_time = Counter(time for history in read_split(store, "train", "times").values() for time in history)
    assert {time: int(counts[0]) for time, counts in found.times.counts.items() if counts[0]} == by_time
    num_tested = len(read_split(store, "test"))
    assert np.sum(list(found.times.counts.values()), axis=0)[1:].tolist() == [num_tested, num_tested]
    whole = read_split(store, "test")
    assert len(found.examples) == 10 and found.examples_of == "test"
    for example in found.examples:
        assert example.items.tolist() == whole[example.number][-SHOWN_EVENTS:]
        assert example.num_events == len(whole[example.number])
    again = survey(store)
    assert [example.number for example in again.examples] == [example.number for example in found.examples]
    assert len({example.number for example in found.examples}) == 10


def test_a_store_without_times_or_evaluated_users(tmp_path: Path) -> None:
    write_raw(tmp_path)
    write_histories(tmp_path / "sequences.parquet", {"u1": ["a", "b"], "u2": ["b", "b"]})
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store"))
    found = survey(store)
    assert found.times is None and found.examples_of == "train" and len(found.examples) == 2
    assert found.splits["test"].users == found.splits["test"].quantile(0.5) == 0


@pytest.mark.parametrize("spread", [1, 10**4, 10**9, 2**62])
def test_time_bins_do_not_depend_on_order(spread: int) -> None:
    times = np.random.default_rng(2).integers(-spread, spread, 4000)
    forward, backward = TimeBins(), TimeBins()
    for part in np.array_split(times, 7):
        forward.add(part, 0)
    for part in np.array_split(np.sort(times)[::-1], 31):
        backward.add(part, 0)
    assert forward.width == backward.width and len(forward.counts) <= MOST_TIME_BINS
    found = {time: int(counts[0]) for time, counts in forward.counts.items()}
    assert found == {time: int(counts[0]) for time, counts in backward.counts.items()}
    assert found == Counter((times // forward.width).tolist())


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 6, 7, 100, 3000])
def test_length_bins_hold_every_length(longest: int) -> None:
    edges = length_edges(longest)
    assert edges[0] == 1 and edges[-2] <= longest < edges[-1] and edges == sorted(set(edges))
    counts = np.zeros(5000, np.int64)
    counts[1 : longest + 1] = 1
    assert _binned(counts, edges).sum() == longest


def test_memory_does_not_grow_with_users(tmp_path: Path) -> None:
    peaks = []
    for num_users in (300, 6000):
        root = tmp_path / str(num_users)
        write_raw(root)
        histories = {user: [ITEMS[(user + n) % 6] for n in range(user % 40)] for user in range(num_users)}
        write_histories(root / "sequences.parquet", histories, {user: list(range(user % 40)) for user in histories})
        config = tiny_config(root, root / "store", sequences={"times": "times"})
        blocks = dataclasses.replace(config.store, users_per_block=100)
        store, _ = build_store(dataclasses.replace(config, store=blocks))
        tracemalloc.start()
        survey(store)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], "a twentieth of the users takes as much"
