"""Data sets as their publishers write them give plain events and a plain item table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import DataConfig
from shards.encoders.item_text import item_texts, parts_for
from shards.store.raw_items import check_raw_items, read_raw_items
from shards.tables.formats.item_rows import price_or_none
from tests.fixtures.tables import data_config, read_events

TEXT = {"words": {"source": "tfidf", "dim": 1}}


def config(root: Path, name: str, events: str, items: str = "", **values: Any) -> DataConfig:
    data = {"format": name, "sequences": {"path": events}, "items": {"path": items}, "features": TEXT}
    return data_config(root, **(data | values))


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    data = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def items_of(data: DataConfig) -> dict[str, list[Any]]:
    """Columns of the plain table that is made of a data set's items."""
    read_raw_items(data, Path(data.root) / "made")
    [path] = (Path(data.root) / "made").glob("items-*.parquet")
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return columns


REVIEW = {"reviewerID": "A1", "asin": "0042", "overall": 4.0, "unixReviewTime": 1_406_073_600, "reviewText": "no"}


@pytest.mark.parametrize("name", ["amazon2014", "amazon2018"])
def test_amazon_reviews(name: str, tmp_path: Path) -> None:
    write(tmp_path / "reviews.json.gz", [json.dumps(REVIEW), json.dumps(REVIEW | {"reviewerID": "A2"})])
    rows, counts = read_events(config(tmp_path, name, "reviews.json.gz"))
    assert rows[0] == ("A1", "0042", 1_406_073_600_000_000, 4.0, None, None, 0)
    assert counts.time_unit == "s" and [row[0] for row in rows] == ["A1", "A2"]


@pytest.mark.parametrize(
    ("name", "line"), [("amazon2014", "A1,0042,5.0,1406073600"), ("amazon2018", "0042,A1,5.0,1406073600")]
)
def test_amazon_ratings_have_no_header(name: str, line: str, tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", [line])
    rows, _ = read_events(config(tmp_path, name, "ratings.csv"), "user", "item", "rating")
    assert rows == [("A1", "0042", 5.0)]


def test_amazon_2014_items_are_python_literals(tmp_path: Path) -> None:
    """Nothing is evaluated: a line that is no literal is bad, and does nothing."""
    touched = tmp_path / "touched"
    lines = [
        str({"asin": "0042", "title": 'It\'s "x"', "price": 9.99, "brand": "Acme", "categories": [["A", "B"], ["C"]]}),
        "{'asin': 'b', 'imUrl': 'http://x/y.jpg', 'salesRank': {'Beauty': 1}, 'title': ''}",
        f"__import__('pathlib').Path({str(touched)!r}).touch()",
        "{'asin': " + "(" * 100_000,
        "[" * 50_000 + "]" * 50_000,
        "{'asin': 'c', 'title': '" + "x" * 2_000_000 + "'}",
        "{'title': 'no id'}",
        "{'asin': '0042', 'title': 'a second row'}",
    ]
    write(tmp_path / "meta.json.gz", lines)
    data = config(tmp_path, "amazon2014", "reviews.json", "meta.json.gz", dirt={"max_bad_rows": 0.7})
    assert items_of(data) == {
        "item_id": ["0042", "b"],
        "title": ['It\'s "x"', None],
        "price": [9.99, None],
        "brand": ["Acme", None],
        "categories": [["A", "B"], None],
        "image_url": [None, "http://x/y.jpg"],
    }
    raw = read_raw_items(data, tmp_path / "made")
    assert raw.bad == {"no id": 1, "unreadable line": 4} and not touched.exists()
    texts = item_texts(raw.table, parts_for((), raw.table.column_names), "\n").texts
    assert texts == ['Title: It\'s "x"\nPrice: 9.99\nBrand: Acme\nCategories: A, B', "Untitled Item"]
    assert raw.titles is not None and raw.titles.to_pylist() == ['It\'s "x"', None]
    with pytest.raises(UserError, match=r"5 of 8 rows cannot be used \(unreadable line: 4, no id: 1\)"):
        read_raw_items(config(tmp_path, "amazon2014", "reviews.json", "meta.json.gz"), tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_a_rating_filter_needs_no_column_beside_a_format(tmp_path: Path) -> None:
    """The items are read by a plain config, which has no column of ratings."""
    write(tmp_path / "reviews.json.gz", [json.dumps(REVIEW)])
    write(tmp_path / "meta.json.gz", [json.dumps({"asin": "0042", "title": "T"})])
    data = config(tmp_path, "amazon2018", "reviews.json.gz", "meta.json.gz", interactions={"min_rating": 4})
    check_raw_items(data, tmp_path / "made")
    assert read_raw_items(data, tmp_path / "made").ids.external.to_pylist() == ["0042"]


def test_amazon_2018_items(tmp_path: Path) -> None:
    item = {"asin": "a", "title": "T", "price": "$1,012.50", "brand": "", "category": ["A", "B"], "imageURL": ["u"]}
    write(tmp_path / "meta.json", [json.dumps(item), json.dumps(item | {"asin": "b", "imageURLHighRes": ["h"]})])
    found = items_of(config(tmp_path, "amazon2018", "reviews.json", "meta.json"))
    assert found["price"] == [1012.5] * 2 and found["brand"] == [None] * 2 and found["image_url"] == ["u", "h"]
    assert found["categories"] == [["A", "B"]] * 2


def test_amazon_2023(tmp_path: Path) -> None:
    """Times are in milliseconds, also where all are small."""
    review = {"user_id": "A", "parent_asin": "p", "asin": "v", "rating": 5.0, "timestamp": 1_588_687_728_923}
    write(tmp_path / "reviews.jsonl", [json.dumps(review)])
    write(tmp_path / "ratings.csv", ["user_id,parent_asin,rating,timestamp", "A,p,5.0,1588687728923"])
    for events in ("reviews.jsonl", "ratings.csv"):
        rows, counts = read_events(config(tmp_path, "amazon2023", events))
        assert rows == [("A", "p", 1_588_687_728_923_000, 5.0, None, None, 0)] and counts.time_unit == "ms"
    items = [
        {"parent_asin": "p", "title": "T", "price": "from 14.99", "store": "S", "categories": ["A", "B"]},
        {"parent_asin": "q", "title": "U", "price": None, "images": [{"thumb": "t", "large": "l"}], "categories": []},
        {"parent_asin": "r", "title": None, "price": 3, "images": {"hi_res": [None], "large": ["l2"]}},
    ]
    write(tmp_path / "meta.jsonl", [json.dumps(item) for item in items])
    found = items_of(config(tmp_path, "amazon2023", "reviews.jsonl", "meta.jsonl"))
    assert found["price"] == [14.99, None, 3.0] and found["brand"] == ["S", None, None]
    assert found["image_url"] == [None, "l", "l2"] and found["categories"] == [["A", "B"], None, None]


NO_FLAGS = "|".join("0" * 19)
FLAGS = "0|0|1|1|0|1|" + "|".join("0" * 13)
MOVIELENS: dict[str, tuple[list[str], list[str], list[list[str] | None]]] = {
    "u.data/u.item": (
        ["196\t242\t3\t881250949", "1\t242\t5\t881250950"],
        [f"242|Les Misérables (1995)|01-Jan-1995||http://x|{FLAGS}", f"7|A||||{NO_FLAGS}"],
        [["Adventure", "Animation", "Comedy"], None],
    ),
    "ratings.dat/movies.dat": (
        ["196::242::3::881250949", "1::242::5::881250950"],
        ["242::Les Misérables (1995)::Adventure|Animation|Comedy", "7::A :: B::(no genres listed)"],
        [["Adventure", "Animation", "Comedy"], None],
    ),
    "ratings.csv/movies.csv": (
        ["userId,movieId,rating,timestamp", "196,242,3,881250949", "1,242,5,881250950"],
        [
            "movieId,title,genres",
            "242,Les Misérables (1995),Adventure|Animation|Comedy",
            '7,"A, ""B""",(no genres listed)',
        ],
        [["Adventure", "Animation", "Comedy"], None],
    ),
}


@pytest.mark.parametrize("names", MOVIELENS)
@pytest.mark.parametrize("as_folder", [True, False])
def test_movielens(names: str, as_folder: bool, tmp_path: Path) -> None:
    events, items = names.split("/")
    lines, movies, genres = MOVIELENS[names]
    (tmp_path / "ml").mkdir()
    encoding = "utf-8" if names.endswith("csv") else "latin-1"
    write(tmp_path / "ml" / events, lines, encoding)
    write(tmp_path / "ml" / items, movies, encoding)
    (tmp_path / "ml" / "README").touch()
    paths = ("ml", "ml") if as_folder else (f"ml/{events}", f"ml/{items}")
    data = config(tmp_path, "movielens", *paths)
    rows, counts = read_events(data)
    assert rows[0] == ("196", "242", 881_250_949_000_000, 3.0, None, None, 0) and counts.rows == 2
    found = items_of(data)
    assert found["item_id"] == ["242", "7"] and found["year"] == [1995, None]
    assert found["title"][0] == "Les Misérables (1995)" and found["genres"] == genres == found["categories"]


def test_items_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "movies.dat", ["1::A (1990)::Drama"])
    data = config(tmp_path, "movielens", "ratings.dat", "movies.dat")
    check_raw_items(data, tmp_path / "made")
    read_raw_items(data, tmp_path / "made")
    assert capsys.readouterr().out.count("items: 1 of") == 1
    write(tmp_path / "movies.dat", ["1::A (1990)::Drama", "2::B::"])
    assert len(read_raw_items(data, tmp_path / "made").ids.external) == 2
    assert len(list((tmp_path / "made").iterdir())) == 2


def test_items_that_were_made_keep_to_a_lower_limit(tmp_path: Path) -> None:
    write(tmp_path / "meta.jsonl", ['{"parent_asin": "a"}'] * 6 + ["garbage"] * 3)
    most = config(tmp_path, "amazon2023", "reviews.jsonl", "meta.jsonl", dirt={"max_bad_rows": 0.5})
    assert read_raw_items(most, tmp_path / "made").bad == {"unreadable line": 3}
    few = config(tmp_path, "amazon2023", "reviews.jsonl", "meta.jsonl")
    with pytest.raises(UserError, match=r"meta.jsonl: 3 of 9 rows cannot be used \(unreadable line: 3\)"):
        read_raw_items(few, tmp_path / "made")
    assert read_raw_items(most, tmp_path / "made").bad == {"unreadable line": 3}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("amazon2014", "{'asin': 'b', 'title': 'x\\ud83d'}"),
        ("amazon2018", '{"asin": "b", "category": ["x\\ud83d"]}'),
    ],
)
def test_half_a_character_makes_a_line_unreadable(name: str, line: str, tmp_path: Path) -> None:
    write(tmp_path / "meta.json", ['{"asin": "a"}', line])
    data = config(tmp_path, name, "reviews.json", "meta.json", dirt={"max_bad_rows": 0.5})
    raw = read_raw_items(data, tmp_path / "made")
    assert raw.ids.external.to_pylist() == ["a"] and raw.bad == {"unreadable line": 1}


def test_what_is_not_the_data_set_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "movies.csv", ["id,name", "1,A"])
    with pytest.raises(UserError, match="begins with 'id,name'; expected movieId,title,genres of MovieLens"):
        items_of(config(tmp_path, "movielens", "ratings.csv", "movies.csv"))
    with pytest.raises(UserError, match="ratings.csv does not exist; data.format names how its publisher writes it"):
        read_events(config(tmp_path, "movielens", "ratings.csv"))
    write(tmp_path / "reviews.jsonl", ['{"a": 1}'])
    with pytest.raises(UserError, match="has no column 'user_id'; it has: a"):
        read_events(config(tmp_path, "amazon2023", "reviews.jsonl"))
    write(tmp_path / "meta.jsonl", [])
    with pytest.raises(UserError, match="is empty; expected at least one item"):
        items_of(config(tmp_path, "amazon2023", "reviews.jsonl", "meta.jsonl"))


@pytest.mark.parametrize(
    ("value", "price"),
    [
        ("$12.99", 12.99),
        ("$5.00 - $10.00", 5.0),
        ("", None),
        ("None", None),
        (True, None),
        (float("nan"), None),
        (7, 7.0),
    ],
)
def test_prices(value: Any, price: float | None) -> None:
    assert price_or_none(value) == price
