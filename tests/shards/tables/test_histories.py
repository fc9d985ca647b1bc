"""Raw tables of every kind give the same store: CSV and Parquet, sequences and interactions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from shards.store.builder import build_store
from tests.fixtures.stores import HISTORIES, read_split, rows_of, tiny_config, write_histories, write_items, write_raw


def test_csv_equals_parquet(tmp_path: Path) -> None:
    write_raw(tmp_path)
    text = ["{title}", "{price}", "{brand}"]
    features = {"words": {"source": "tfidf", "dim": 3, "text": text}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    items = pq.read_table(tmp_path / "items.parquet").drop_columns(["categories"])
    pyarrow.csv.write_csv(items, tmp_path / "items.csv")
    for name, cells in (("spaces", " ".join), ("json", lambda items: str(items).replace("'", '"'))):
        table = {"user_id": list(HISTORIES), "item_ids": [cells(items) for items in HISTORIES.values()]}
        pyarrow.csv.write_csv(pa.table(table), tmp_path / f"{name}.csv")
        tables = {"items": {"path": "items.csv", "title": "title"}, "sequences": {"path": f"{name}.csv"}}
        again, _ = build_store(tiny_config(tmp_path, tmp_path / name, features=features, **tables))
        assert again.manifest.sha256 == store.manifest.sha256


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_interactions_equal_sequences(tmp_path: Path, ending: str, timestamps: bool) -> None:
    """Integer ids; events of one time keep the table's order; users come in order of their first row."""
    histories = {7: [30, 10, 20], 3: [20], 9: [10, 10, 30, 20], 1: [40, 30]}
    times = {7: [5, 5, 8], 3: [1], 9: [2, 4, 4, 4], 1: [0, 9]}
    write_items(tmp_path / "items.parquet", [10, 20, 30, 40])
    write_histories(tmp_path / "sequences.parquet", histories, times)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "one", features={}, sequences={"times": "times"}))
    events = [(user, item, time) for user in histories for item, time in zip(histories[user], times[user], strict=True)]
    late = [event for event in events if event[2] >= 5 and event[0] != 7]  # interleaved: these come last
    events = [event for event in events if event not in late] + late
    columns = dict(zip(("who", "what", "when"), map(list, zip(*events, strict=True)), strict=True))
    table = pa.table(columns)
    if timestamps:
        table = table.set_column(2, "when", pa.array(columns["when"], pa.timestamp("s")).cast(pa.timestamp("ms")))
    path = tmp_path / f"events.{ending}"
    pq.write_table(table, path) if ending == "parquet" else pyarrow.csv.write_csv(table, path)
    sequences = {"path": path.name, "layout": "interactions", "user": "who", "items": "what", "times": "when"}
    again, _ = build_store(tiny_config(tmp_path, tmp_path / "two", features={}, sequences=sequences))
    assert again.manifest.sha256 == store.manifest.sha256
    assert read_split(again, "test", "times")[1] == [2, 4, 4, 4]


def test_shuffled_interactions_are_ordered_by_time(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet")
    events = {"user": [1, 2, 1, 2, 1], "item": ["c", "f", "a", "e", "b"], "t": [30, 2, 10, 1, 20]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    sequences = {"path": "events.parquet", "layout": "interactions", "user": "user", "items": "item", "times": "t"}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "timed", features={}, sequences=sequences))
    assert read_split(store, "test") == {0: rows_of(["a", "b", "c"])}
    assert read_split(store, "train")[1] == rows_of(["e", "f"])
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "as-is", features={}, sequences=sequences | {"times": ""}))
    assert read_split(store, "test") == {0: rows_of(["c", "a", "b"])}
