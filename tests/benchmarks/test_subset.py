"""A subset for measurements: a core, numbered anew, whose features are still those of its items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paper import subset
from fmrl_dist.config.loading import load_config
from shards.store.builder import build_store
from tests.fixtures.training import refusal


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=9), max_size=12), st.integers(0, 4))
def test_a_core_is_the_largest_part_without_rare_items(histories: list[list[int]], least: int) -> None:
    left = subset.core(histories, least)
    events = [item for history in left for item in history]
    assert all(len(history) >= 5 for history in left) and all(events.count(item) >= least for item in events)
    assert subset.core([*left, [99]], least) == left, "what cannot stay takes nothing along"
    kept = iter(histories)
    for history in left:  # each is what is left of one of them, in their order
        assert any(history == [item for item in each if item in events] for each in kept)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine users of items 2, 4 … 12, and item 1 of one event; features are the items' numbers."""
    histories = [[2, 4, 6, 8, 10, 12][user % 2 :] + [1] * (user == 0) for user in range(9)]
    rows = pa.array(histories, pa.list_(pa.int32()))
    pq.write_table(pa.table({"user_id": list(range(9)), "item_ids": rows}), tmp_path / "sequences.parquet")
    np.save(tmp_path / "text_minilm_384.npy", np.arange(1, 14, dtype=np.float16)[:, None] * [1, 0])
    return tmp_path


@pytest.mark.parametrize(("least", "items"), [(2, [2, 4, 6, 8, 10, 12]), (0, list(range(1, 14)))])
def test_items_keep_their_features_and_histories_their_order(data: Path, least: int, items: list[int]) -> None:
    out = data / "small"
    subset.main(["--data", str(data), "--users", "9", "--core", str(least), "--output", str(out)])
    features = np.load(out / "features.npy")
    assert features[:, 0].tolist() == items
    found = pq.read_table(out / "sequences.parquet")["item_ids"].to_pylist()
    expected = [[2, 4, 6, 8, 10, 12][user % 2 :] + [1] * (user == 0 and least == 0) for user in range(9)]
    assert [[int(features[item - 1, 0]) for item in history] for history in found] == expected
    store, _ = build_store(load_config(out / "config.yaml", ["--store.path", str(data / "store")]))
    assert (store.manifest.num_users, store.manifest.num_items) == (9, len(items))


def test_what_cannot_be_drawn_is_refused(data: Path) -> None:
    words = ["--data", str(data), "--output", str(data / "small")]
    assert "--users is 10; expected 1 to 9, which there are" in refusal(subset.main, *words, "--users", "10")
    assert "no user is left of 9" in refusal(subset.main, *words, "--users", "9", "--core", "10")
    np.save(data / "few.npy", np.zeros((11, 2), np.float16))
    words += ["--users", "9"]
    assert "few.npy has 11 rows, and there is an item 12" in refusal(subset.main, *words, "--features", "few.npy")
    assert "none.npy does not exist; --data needs both" in refusal(subset.main, *words, "--features", "none.npy")
    assert "--core is -1; expected at least 0" in refusal(subset.main, *words, "--core", "-1")
    assert not (data / "small").exists()
