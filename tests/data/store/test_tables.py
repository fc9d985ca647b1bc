"""The vocabulary and the users are held against the manifest when they are read: a flipped bit is no other count."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmrl_dist import train
from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store import tables
from fmrl_dist.data.store.manifest import USERS_FILE, VOCAB_FILE, Manifest
from fmrl_dist.data.store.reader import Store
from tests.fixtures.training import make_shop, refusal

FLIPS = 150  # bits of each file


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("name", [VOCAB_FILE, USERS_FILE])
def test_a_flipped_bit_is_refused_or_harmless(name: str, shop: Path, tmp_path: Path) -> None:
    store = Store.open(shutil.copytree(load_config(shop).store.path, tmp_path / "store"))
    path, generator = store.path / name, np.random.default_rng(3)
    whole = path.read_bytes()
    rows, refused = pq.read_table(pa.BufferReader(whole)).to_pylist(), 0
    for place in generator.choice(len(whole) * 8, FLIPS, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            content = store.read_table(name)
        except UserError as error:
            assert str(error).startswith(f"store {store.location}: ") and "build the store again" in str(error)
            refused += 1
        else:  # what the file says of itself, such as its writer, is not what is read
            assert pq.read_table(pa.BufferReader(content), use_threads=False).to_pylist() == rows
    assert refused > FLIPS / 4


def test_a_run_by_popularity_with_other_counts_is_refused(shop: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(load_config(shop).store.path, tmp_path / "store"))
    table = pq.read_table(store / VOCAB_FILE)
    counts = table["train_count"].to_numpy().copy()
    counts[3] += 1
    pq.write_table(table.set_column(2, "train_count", pa.array(counts)), store / VOCAB_FILE)
    words = ["--config", shop, "--store.path", store, "--run.dir", tmp_path / "run"]
    line = refusal(train.main, *words, "--loss.softmax", "sampled", "--loss.negatives", "popularity")
    assert f"store {store}: its rows are not those that were written; build the store again" in line
    line = refusal(train.main, *words, "--model.id_table", "true")
    assert "its rows are not those that were written" in line


def test_a_large_table_is_compared_as_a_file(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows take too long; a store of an older version does not know its files, and only shards.verify checks it."""
    monkeypatch.setattr(tables, "MAX_CHECKED_ROWS", 10)
    monkeypatch.setattr(tables, "rows_sha256", lambda _: pytest.fail("all rows were read"))
    store = Store.open(shutil.copytree(load_config(shop).store.path, tmp_path / "store"))
    whole = store.read_table(VOCAB_FILE)
    assert pq.read_table(pa.BufferReader(whole), use_threads=False).num_rows > 10
    table = pq.read_table(pa.BufferReader(whole), use_threads=False)
    counts = table["train_count"].to_numpy().copy()
    counts[3] += 1
    pq.write_table(table.set_column(1, "train_count", pa.array(counts)), store.path / VOCAB_FILE)
    with pytest.raises(UserError, match="its rows are not those that were written; build the store again"):
        store.read_table(VOCAB_FILE)
    older = Store(store.files, replace(store.manifest, table_files={}))
    assert older.read_table(VOCAB_FILE) != whole


def test_hashes_of_files_name_no_store(shop: Path) -> None:
    """Another version of pyarrow may write other bytes of the same rows."""
    manifest = Store.open(load_config(shop).store.path).manifest
    assert set(manifest.table_files) == {VOCAB_FILE, USERS_FILE}
    for other in ({}, {VOCAB_FILE: "0" * 64, USERS_FILE: "0" * 64}):
        again = Manifest.from_json(replace(manifest, table_files=other).to_json())
        assert again.table_files == other and again.sha256 == manifest.sha256
