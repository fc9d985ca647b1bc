"""Building a store: order, leave-one-out, packing, determinism."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.store.reader import Store
from shards.store import builder
from shards.store.builder import build_store
from shards.store.problems import store_problems
from tests.fixtures.stores import (
    HISTORIES,
    ITEMS,
    read_columns,
    read_items,
    read_split,
    rows_of,
    store_contents,
    tiny_config,
    write_histories,
    write_items,
    write_raw,
)
from tests.fixtures.training import contents


def test_leave_one_out_ids_and_tables(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    manifest = store.manifest
    assert (manifest.num_items, manifest.num_users, manifest.num_dropped_users, manifest.num_events) == (6, 4, 1, 15)
    kept = ["u1", "u3", "u4", "u5"]  # u2 has one event
    assert read_columns(store, "users.parquet") == {"user": [0, 1, 2, 3], "external_id": kept}
    whole = [rows_of(HISTORIES[user]) for user in kept]
    assert read_split(store, "train") == {0: whole[0][:-2], 1: whole[1], 2: whole[2][:-2], 3: whole[3][:-2]}
    assert read_split(store, "valid") == {0: whole[0][:-1], 2: whole[2][:-1], 3: whole[3][:-1]}
    assert read_split(store, "test") == {0: whole[0], 2: whole[2], 3: whole[3]}
    vocab = read_columns(store, "vocab.parquet")
    assert (vocab["item"], vocab["external_id"]) == (list(range(6)), ITEMS)
    assert vocab["train_count"] == [2, 2, 1, 1, 2, 1]  # a b | e a | b | f e d c
    assert vocab["title"][1] == "Thing 1 of kind red"
    np.testing.assert_array_equal(read_items(store, "vector"), rows.astype(np.float16), strict=True)


def test_item_blocks_hold_a_permutation(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", [f"i{i:04d}" for i in range(1000)])
    write_histories(tmp_path / "sequences.parquet", {"u": ["i0001", "i0002"]})
    config = tiny_config(tmp_path, tmp_path / "store", features={})
    store, _ = build_store(dataclasses.replace(config, store=dataclasses.replace(config.store, items_per_block=20)))
    ids = np.concatenate([store.read_block(block)["ids"] for block in store.manifest.items])
    assert sorted(ids.tolist()) == list(range(1000))
    assert abs(ids[:100].mean() - 499.5) < 100  # a run of blocks samples the whole catalogue
    assert read_columns(store, "vocab.parquet")["external_id"][7] == "i0007"  # the ids themselves are not permuted


@settings(max_examples=15)
@given(
    histories=st.lists(st.lists(st.integers(0, 6), max_size=7), min_size=1, max_size=12),
    users_per_block=st.integers(1, 5),
    blocks_per_shard=st.integers(1, 3),
)
def test_any_histories_come_back(histories: list[list[int]], users_per_block: int, blocks_per_shard: int) -> None:
    histories = [*histories, [3, 3]]  # at least one is kept
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_items(root / "items.parquet", list(range(100, 107)))
        raw = {10 * i: [100 + item for item in history] for i, history in enumerate(histories)}
        times = {user: [50 + i for i in range(len(items))] for user, items in raw.items()}
        write_histories(root / "sequences.parquet", raw, times)
        config = tiny_config(root, root / "store", features={}, ids="integer", sequences={"times": "times"})
        blocks = dataclasses.replace(
            config.store, users_per_block=users_per_block, items_per_block=2, blocks_per_shard=blocks_per_shard
        )
        store, _ = build_store(dataclasses.replace(config, store=blocks))
        assert list(store_problems(store)) == []
        kept = [i for i, history in enumerate(histories) if len(history) >= 2]
        assert read_columns(store, "users.parquet")["external_id"] == [10 * i for i in kept]
        whole = dict(enumerate(histories[i] for i in kept))
        train = {user: items[:-2] if len(items) >= 3 else items for user, items in whole.items()}
        assert list(read_split(store, "train").items()) == list(train.items())
        assert read_split(store, "test") == {user: items for user, items in whole.items() if len(items) >= 3}
        assert read_split(store, "valid") == {user: items[:-1] for user, items in whole.items() if len(items) >= 3}
        assert read_split(store, "train", "times") == {u: [50 + i for i in range(len(x))] for u, x in train.items()}
        counts = [block.count for block in store.manifest.splits["train"]]
        assert all(count == users_per_block for count in counts[:-1])
        counted = np.bincount([item for items in train.values() for item in items], minlength=7)
        assert read_columns(store, "vocab.parquet")["train_count"] == counted.tolist()


def test_the_same_input_gives_the_same_store(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    features = {"vector": {"source": "npy", "path": "vectors.npy"}, "words": {"source": "tfidf", "dim": 3}}
    first, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "one", features=features))
    second, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "two", features=features))
    assert first.manifest.sha256 == second.manifest.sha256
    assert store_contents(first.path) == store_contents(second.path)
    np.save(tmp_path / "raw" / "vectors.npy", np.ones((len(ITEMS), 4), np.float32))
    third, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "three", features=features))
    assert third.manifest.sha256 != first.manifest.sha256


def test_a_precomputed_row_of_zeros_is_an_absent_feature(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    rows[1], rows[4] = 0, -0.0
    np.save(tmp_path / "raw" / "vectors.npy", rows)
    store, (feature,) = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    assert (store.manifest.features[0].present, feature.note) == (4, "2 rows of zeros: these items lack it")
    assert read_items(store, "vector.mask").tolist() == [True, False, True, True, False, True]
    assert list(store_problems(store)) == []


def test_an_array_of_zeros_is_refused(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    np.save(tmp_path / "raw" / "vectors.npy", np.zeros_like(rows))
    with pytest.raises(UserError, match="feature 'vector': no item has it; all rows of its array are zeros"):
        build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_items_that_joined_have_no_row_in_an_array(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    rows[1] = 0
    np.save(tmp_path / "raw" / "vectors.npy", rows)
    histories = {"u": ["a", "b", "new"], "v": ["c", "newer", "a"]}
    write_histories(tmp_path / "raw" / "sequences.parquet", histories)
    _, (feature,) = build_store(tiny_config(tmp_path / "raw", tmp_path / "store", on_unknown_item="add"))
    assert feature.note == "1 rows of zeros: these items lack it; 2 items are not in the item table, and lack it"


def test_a_store_is_replaced_only_when_asked(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    config = tiny_config(tmp_path / "raw", tmp_path / "store")
    before = build_store(config)[0].manifest.sha256
    with pytest.raises(UserError, match="exists; keep it, or build it again with --overwrite"):
        build_store(config)
    np.save(tmp_path / "raw" / "vectors.npy", rows + 1)
    assert build_store(config, overwrite=True)[0].manifest.sha256 != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]
    with pytest.raises(UserError, match="exists and is not a store"):
        build_store(tiny_config(tmp_path / "raw", tmp_path / "raw"), overwrite=True)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"manifest.json": '{"name": "web app"}'}, "manifest.json is not a store's manifest"),
        ({"manifest.json": "[1]"}, "manifest.json is not a store's manifest"),
        ({"manifest.json": '{"schema_version": 1}', "thesis.tex": "mine"}, "holds thesis.tex, which a store does not"),
    ],
)
def test_a_folder_of_others_is_never_replaced(files: dict[str, str], complaint: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    (tmp_path / "store").mkdir()
    for name, text in files.items():
        (tmp_path / "store" / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        build_store(tiny_config(tmp_path / "raw", tmp_path / "store"), overwrite=True)
    assert {path.name: path.read_text() for path in (tmp_path / "store").iterdir()} == files


@pytest.mark.parametrize("moment", ["make_demo_data", "_write_store"])
def test_a_store_that_another_build_has_written_meanwhile_stays(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock, or, where a file system has no locks, while this build writes."""
    write_raw(tmp_path / "raw")
    config, other = tiny_config(tmp_path / "raw", tmp_path / "store"), tmp_path / "other"
    build_store(tiny_config(tmp_path / "raw", other, features={}))
    before, original = contents(other), getattr(builder, moment)

    def end_other_build(*arguments: object) -> object:
        other.rename(tmp_path / "store")
        return original(*arguments)

    monkeypatch.setattr(builder, moment, end_other_build)
    with pytest.raises(UserError, match="exists; keep it, or build it again with --overwrite"):
        build_store(config)
    assert contents(tmp_path / "store") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]


@pytest.mark.real_data
def test_beauty(tmp_path: Path, shared_data: Path) -> None:
    root = shared_data / "amazon2014_beauty"
    features = {"text": {"source": "npy", "path": "text_minilm_384.npy", "dim": 384}}
    config = tiny_config(root, tmp_path / "store", features=features)
    store, _ = build_store(dataclasses.replace(config, store=StoreConfig(path=config.store.path)))
    assert list(store_problems(store)) == []
    manifest = store.manifest
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (22_363, 12_101, 198_502)
    raw = [[item - 1 for item in items] for items in pq.read_table(root / "sequences.parquet")["item_ids"].to_pylist()]
    assert read_split(store, "test") == dict(enumerate(raw))  # ids are 1-based in item order; no history is short
    assert read_split(store, "train") == {user: items[:-2] for user, items in enumerate(raw)}
    train_count = read_columns(store, "vocab.parquet")["train_count"]
    assert sum(train_count[items[-1]] == 0 for items in raw) == 138  # cold test targets, as the data's README counts
    stored = np.load(root / "text_minilm_384.npy")
    np.testing.assert_array_equal(read_items(store, "text"), stored, strict=True)


def template_of(store: Store) -> list[str]:
    recipe = store.manifest.features[0].recipe
    assert recipe is not None
    return list(recipe["text"])


def test_the_default_text_is_of_the_columns_that_are_there(tmp_path: Path) -> None:
    """The manifest says which; a template that is given must have all of its columns."""
    write_raw(tmp_path)
    items = pq.read_table(tmp_path / "items.parquet")
    features = {"words": {"source": "tfidf", "dim": 2}}
    whole, _ = build_store(tiny_config(tmp_path, tmp_path / "whole", features=features))
    assert template_of(whole) == ["Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}"]
    pq.write_table(items.drop_columns(["price", "categories"]), tmp_path / "items.parquet")
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "some", features=features))
    given = ["Title: {title}", "Brand: {brand}"]
    assert template_of(store) == given
    again, _ = build_store(tiny_config(tmp_path, tmp_path / "given", features=features, text=given))
    assert again.manifest.sha256 == store.manifest.sha256
    with pytest.raises(UserError, match="no column 'price'; it has: item_id, title, brand"):
        build_store(tiny_config(tmp_path, tmp_path / "refused", features=features, text=[*given, "{price}"]))
