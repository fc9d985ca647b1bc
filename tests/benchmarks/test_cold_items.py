"""Held-out items leave no trace in the tables that the model without them is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.cold_items import known_data, recall, without_items, write_config, write_tables
from fmrl_dist.config.loading import load_config
from shards.store.builder import build_store
from tests.fixtures.stores import HISTORIES, ITEMS, tiny_config, write_histories, write_raw


def test_tables_without_the_items(tmp_path: Path) -> None:
    vectors = write_raw(tmp_path / "raw")
    config = tiny_config((tmp_path / "raw"), tmp_path / "store")
    held_out = write_tables(config, tmp_path, 0.3, seed=1).to_pylist()
    assert len(held_out) == 2
    kept = [item for item in ITEMS if item not in held_out]
    for part, ids in (("known", kept), ("held-out", held_out)):
        assert pq.read_table(tmp_path / part / "items.parquet")["item_id"].to_pylist() == ids
        rows = [ITEMS.index(item) for item in ids]
        assert np.array_equal(np.load(tmp_path / part / "vector.npy"), vectors[rows])
    histories = pq.read_table(tmp_path / "known" / "sequences.parquet").to_pydict()
    assert histories["user_id"] == list(HISTORIES)
    assert histories["item_ids"] == [[item for item in history if item in kept] for history in HISTORIES.values()]
    path = write_config(config, tmp_path, "known", known_data(config, tmp_path / "known"))
    store, _ = build_store(load_config(path))
    assert store.manifest.num_items == len(kept)
    assert write_tables(config, tmp_path, 0.3, seed=1).to_pylist() == held_out
    assert write_tables(config, tmp_path, 0.3, seed=2).to_pylist() != held_out


def test_times_go_with_their_events(tmp_path: Path) -> None:
    write_histories(
        tmp_path / "h.parquet", {"u": ["a", "b", "a"], "v": [], "w": ["b"]}, {"u": [1, 2, 3], "v": [], "w": [4]}
    )
    config = tiny_config(tmp_path, tmp_path / "store", sequences={"times": "times"})
    found = without_items(pq.read_table(tmp_path / "h.parquet"), config, pa.array(["b"])).to_pydict()
    assert found == {"user_id": ["u", "v", "w"], "item_ids": [["a", "a"], [], []], "times": [[1, 3], [], []]}
    config = tiny_config(tmp_path, tmp_path / "store", sequences={"layout": "interactions", "items": "item"})
    events = pa.table({"user_id": ["u", "u"], "item": ["a", "b"]})
    assert without_items(events, config, pa.array(["b"])).to_pydict() == {"user_id": ["u"], "item": ["a"]}


def test_recall() -> None:
    assert recall(np.array([1, 10, 10.5, np.inf])) == "50.00 ± 49.00"
    assert recall(np.empty(0)) == "no users"
