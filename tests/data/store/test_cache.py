"""The cache of byte ranges: never a wrong byte, never too large, shared by processes that can die at any point."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.store import cache
from fmrl_dist.data.store.cache import LOW_WATER, RangeCache
from tests.fixtures.forked import call_in_processes

LIMIT = 10_000


def some_range(number: int, num_bytes: int = 1000) -> tuple[str, bytes]:
    data = np.random.default_rng(number).bytes(num_bytes)
    return hashlib.sha256(data).hexdigest(), data


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if len(path.name) == 64)


def backdate(folder: Path, sha256: str, seconds: float) -> None:
    os.utime(folder / sha256, (time.time() - seconds,) * 2)


def test_a_range_is_held(tmp_path: Path) -> None:
    sha256, data = some_range(0)
    first = RangeCache(tmp_path / "a" / "b", LIMIT)
    assert first.get(sha256, len(data)) is None
    first.put(sha256, data)
    assert first.get(sha256, len(data)) == data
    assert RangeCache(tmp_path / "a" / "b", LIMIT).get(sha256, len(data)) == data
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"short", bytes(1000)])
def test_a_damaged_range_is_dropped(tmp_path: Path, damage: bytes) -> None:
    held = RangeCache(tmp_path, LIMIT)
    sha256, data = some_range(0)
    held.put(sha256, data)
    (tmp_path / sha256).write_bytes(damage)
    assert held.get(sha256, len(data)) is None
    assert not (tmp_path / sha256).exists()
    held.put(sha256, data)
    assert held.get(sha256, len(data)) == data


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3000)), max_size=25))
def test_the_limit_holds(tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("limit")
    for number, num_bytes in puts:
        sha256, data = some_range(number, num_bytes)
        RangeCache(folder, LIMIT).put(sha256, data)
        assert held_bytes(folder) <= LIMIT
        assert RangeCache(folder, LIMIT).get(sha256, num_bytes) == data  # the newest is never evicted


def test_what_was_read_longest_ago_goes_first(tmp_path: Path) -> None:
    held = RangeCache(tmp_path, LIMIT)
    ranges = [some_range(number) for number in range(11)]
    for age, (sha256, data) in enumerate(ranges[:10]):
        held.put(sha256, data)
        backdate(tmp_path, sha256, 100 - age)
    assert held.get(ranges[0][0], 1000) is not None
    held.put(*ranges[10])
    kept = [number for number, (sha256, _) in enumerate(ranges) if (tmp_path / sha256).exists()]
    assert kept == [0, *range(3, 11)]
    assert held_bytes(tmp_path) == LOW_WATER * LIMIT


def test_a_lower_limit_and_a_lost_total(tmp_path: Path) -> None:
    """The file with the total may be missing, damaged or from another limit; then the folder is listed."""
    for number in range(9):
        RangeCache(tmp_path, LIMIT).put(*some_range(number))
    for text in ("", "many", "-5", "9" * 40):
        (tmp_path / "total-bytes").write_text(text)
        RangeCache(tmp_path, LIMIT // 2).put(*some_range(100 + len(text)))
        assert held_bytes(tmp_path) <= LIMIT // 2


def test_a_range_beyond_the_limit_is_not_held(tmp_path: Path) -> None:
    held = RangeCache(tmp_path, LIMIT)
    held.put(*some_range(0))
    held.put(*some_range(1, LIMIT + 1))
    assert held_bytes(tmp_path) == 1000


def test_files_of_killed_processes_are_cleared_away(tmp_path: Path) -> None:
    held = RangeCache(tmp_path, LIMIT)
    for name, age_s in (("aside-dead", 7200), ("aside-alive", 5)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    (tmp_path / "total-bytes").write_text("")
    held.put(*some_range(0))
    assert not (tmp_path / "aside-dead").exists() and (tmp_path / "aside-alive").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store.cache_dir .*file/cache cannot be written .*--store.cache_gb 0"):
        RangeCache(tmp_path / "file" / "cache", LIMIT)


def test_a_lock_that_is_never_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process holds it: nothing is kept, a warning says so, and nobody waits for long."""
    monkeypatch.setattr(cache, "LOCK_S", 0.2)
    held = RangeCache(tmp_path, LIMIT)
    with (tmp_path / "total-bytes").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="does not keep blocks .*locked by another process"):
            held.put(*some_range(0))
    assert [path.name for path in tmp_path.iterdir()] == ["total-bytes"]
    held.put(*some_range(0))
    assert held_bytes(tmp_path) == 1000


def churn(process: int, folder: str) -> tuple[int, int]:
    """Put and get a few ranges for a while; returns how many the cache held, and how many of these were wrong."""
    rng = np.random.default_rng(process)
    held, hits, wrong = RangeCache(Path(folder), LIMIT), 0, 0
    for _ in range(300):
        sha256, data = some_range(int(rng.integers(30)), 1000)
        found = held.get(sha256, 1000)
        hits += found is not None
        wrong += found not in (None, data)
        if found is None:
            held.put(sha256, data)
    return hits, wrong


def test_processes_share_it(tmp_path: Path) -> None:
    results = call_in_processes(2, churn, str(tmp_path))
    assert [wrong for _, wrong in results] == [0, 0] and min(hits for hits, _ in results) > 0
    assert held_bytes(tmp_path) <= LIMIT
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("aside-")]
