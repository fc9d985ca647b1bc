"""Raw files as publishers write them, made of real histories, give the ready tables' stores, and so all figures."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from shards.store.problems import store_problems
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.stores import read_columns, read_split

DATA = REPOSITORY.parent / "shared" / "data"
DAY = 86_400
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} does not exist: it holds the real histories"),
]


def by_external_ids(store: Store, split: str) -> dict[Any, list[Any]]:
    users, items = (read_columns(store, f"{name}.parquet")["external_id"] for name in ("users", "vocab"))
    return {users[user]: [items[item] for item in slices] for user, slices in read_split(store, split).items()}


def expected(histories: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    return {
        "train": {user: items[:-2] for user, items in histories.items()},
        "valid": {user: items[:-1] for user, items in histories.items()},
        "test": histories,
    }


def check(store: Store, histories: dict[str, list[str]], num_items: int) -> None:
    assert list(store_problems(store)) == []
    assert (store.manifest.num_users, store.manifest.num_items) == (len(histories), num_items)
    assert store.manifest.num_events == sum(map(len, histories.values()))
    for split, slices in expected(histories).items():
        assert by_external_ids(store, split) == slices


def test_beauty_by_the_five_core(tmp_path: Path) -> None:
    """Ratings, with users and items that the 5-core leaves out; items as Python literals. Days, with their ties."""
    ready = pq.read_table(DATA / "amazon2014_beauty" / "sequences.parquet").to_pylist()
    items = pq.read_table(DATA / "amazon2014_beauty" / "items.parquet").to_pylist()
    raw = tmp_path / "amazon2014"
    raw.mkdir()
    histories = {f"A{row['user_id']:07d}": [f"B{item:08d}" for item in row["item_ids"]] for row in ready}
    lines = []
    for row, (user, asins) in zip(ready, histories.items(), strict=True):
        times = row["timestamps"] or [DAY * number for number in range(len(asins))]
        lines += [f"{user},{asin},5.0,{time}" for asin, time in zip(asins, times, strict=True)]
    draw = random.Random(0)
    rare = [f"C{number:08d}" for number in range(400)]
    for number in range(3000):
        chosen = draw.sample([f"B{row['item_id']:08d}" for row in items[:50]] + rare, draw.randint(1, 4))
        lines += [f"Z{number:07d},{asin},1.0,{draw.randrange(10**9)}" for asin in chosen]
    lines += [f"{user},{draw.choice(rare)},1.0,{10**9}" for user in list(histories)[:5]]
    (raw / "ratings_Beauty.csv").write_text("\n".join(lines) + "\n")
    with gzip.open(raw / "meta_Beauty.json.gz", "wt", encoding="utf-8") as file:
        for row in items:
            known = {"asin": f"B{row['item_id']:08d}", "title": row["title"], "categories": row["categories"]}
            known |= {"price": row["price"]} if row["price"] is not None else {}
            file.write(f"{known}\n")
    words = ["--data.root", str(tmp_path), "--data.sequences.path", "amazon2014/ratings_Beauty.csv"]
    words += ["--data.interactions.ties", "table", "--data.features", "{}", "--store.path", str(tmp_path / "store")]
    store, _ = build_store(load_config(REPOSITORY / "configs" / "data" / "amazon2014-beauty.yaml", words))
    check(store, histories, num_items=12_101)
    titles = dict(zip(*(read_columns(store, "vocab.parquet")[name] for name in ("external_id", "title")), strict=True))
    assert titles == {f"B{row['item_id']:08d}": row["title"] for row in items}


def test_movielens_by_one_command(tmp_path: Path) -> None:
    ready = pq.read_table(DATA / "ml1m" / "sequences.parquet").to_pylist()
    items = pq.read_table(DATA / "ml1m" / "items.parquet").to_pylist()
    raw = tmp_path / "ml-1m"
    raw.mkdir()
    histories = {str(row["user_id"]): [str(item) for item in row["item_ids"]] for row in ready}
    rows = [
        f"{user}::{item}::4::{956_703_932 + number}"
        for user, movies in histories.items()
        for number, item in enumerate(movies)
    ]
    random.Random(0).shuffle(rows)
    (raw / "ratings.dat").write_text("\n".join(rows) + "\n", encoding="latin-1")
    movies = [f"{row['item_id']}::{row['title']} ({row['year']})::{'|'.join(row['genres'])}" for row in items]
    (raw / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1", errors="replace")
    words = ["--data.root", str(tmp_path), "--data.features", "{}", "--store.path", str(tmp_path / "store")]
    store, _ = build_store(load_config(REPOSITORY / "configs" / "data" / "movielens-1m.yaml", words))
    check(store, dict(sorted(histories.items())), num_items=len(items))
