"""The configs of public data sets build a store of files in the shape in which their publishers write them.

The same histories stand in each: in the order of files that are not sorted, with all columns that are published, their
separators, quotes and headers, and items without a title or text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.config.loading import load_config
from shards.store.build_report import read_report
from shards.store.builder import build_store
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.stores import read_columns, read_split

CONFIGS = sorted((REPOSITORY / "configs" / "data").glob("*.yaml"))
HISTORIES = {
    "11": ["0001", "0002", "0003", "0004"],
    "12": ["0003", "0001", "0004"],
    "13": ["0002", "0004", "0001", "0003"],
}
TITLES = {
    "0001": "Amélie (2001)",
    "0002": 'The "Red", Shoes (1948)',
    "0003": "Heat; Dust::Rain (1983)",
    "0004": "Sky (1999)",
    "0005": "Bought by Nobody (1980)",
}
DAY, FIRST_DAY = 86_400, 1_400_000_000
EVENTS = sorted((place, user, item) for user, items in HISTORIES.items() for place, item in enumerate(items))[::-1]
LATIN = "latin-1"


def second(place: int) -> int:
    """The time of a user's event, of a day of its own: some files have days alone."""
    return FIRST_DAY + place * DAY


def lines(rows: Iterator[str] | list[str], header: str = "", encoding: str = "utf-8", end: str = "\n") -> bytes:
    return "".join(row + end for row in ([header] if header else []) + list(rows)).encode(encoding)


def quoted(text: str) -> str:
    """A cell of a CSV."""
    return '"' + text.replace('"', '""') + '"'


def reviews_2014() -> Iterator[str]:
    for place, user, item in EVENTS:
        helpful = {"reviewerName": 'The "U"', "helpful": [0, 1], "reviewText": "So,\tgood", "summary": "Fine"}
        times = {"unixReviewTime": second(place), "reviewTime": "05 13, 2014"}
        yield json.dumps({"reviewerID": user, "asin": item} | helpful | {"overall": 5.0} | times)


def reviews_2018() -> Iterator[str]:
    for number, (place, user, item) in enumerate(EVENTS):
        extra = {"vote": "2", "image": ["http://x/1.jpg"]} if number % 2 else {"style": {"Size:": " Large"}}
        times = {"unixReviewTime": second(place), "reviewTime": "05 13, 2014"}
        yield json.dumps({"overall": 5.0, "verified": True, "reviewerID": user, "asin": item} | extra | times)


def reviews_2023() -> Iterator[str]:
    for place, user, item in EVENTS:
        extra = {"title": "Fine", "text": "So good", "images": [{"small_image_url": "http://x"}], "asin": "variant"}
        times = {"timestamp": 1000 * second(place) + 7, "helpful_vote": 0, "verified_purchase": True}
        yield json.dumps({"rating": 5.0} | extra | {"parent_asin": item, "user_id": user} | times)


def items_2014() -> Iterator[str]:
    for item, title in TITLES.items():
        extra = {"related": {"also_viewed": ["0009"]}, "salesRank": {"Beauty": 1}, "imUrl": "http://x/y.jpg"}
        yield str(
            {"asin": item, "title": title, "price": 9.99, "brand": "Acme", "categories": [["Beauty", "A"]]} | extra
        )


def items_2018() -> Iterator[str]:
    for item, title in TITLES.items():
        extra = {"description": ["Long", ""], "also_buy": [], "rank": "1 in Beauty (", "price": "$1,012.50", "date": ""}
        yield json.dumps({"category": ["Beauty"], "title": title, "brand": "", "asin": item} | extra)


def items_2023() -> Iterator[str]:
    for item, title in TITLES.items():
        extra = {"average_rating": 4.1, "features": [], "price": None, "details": {"Brand": "Acme"}, "images": []}
        yield json.dumps({"main_category": "Beauty", "title": title, "parent_asin": item, "categories": []} | extra)


def behaviors() -> Iterator[str]:
    """Three impressions of the first user, two of the second, each with all clicks before it; one user has none."""
    for number, (user, count) in enumerate(
        [("11", 4), ("12", 2), ("11", 4), ("13", 4), ("12", 3), ("11", 4), ("14", 0)]
    ):
        clicks = " ".join(HISTORIES.get(user, [])[:count])
        yield f"{number}\t{user}\t11/1{number}/2019 9:05:58 AM\t{clicks}\t0005-1 0002-0"


def news() -> Iterator[str]:
    entity = '[{"Label": "A", "Type": "P", "WikidataId": "Q1", "Confidence": 1.0}]'
    for item, title in TITLES.items():
        abstract = "" if item == "0004" else f'He said "{item}, and no more'
        yield f"{item}\tnews\tnewsworld\t{title}\t{abstract}\thttps://x/{item}.html\t{entity}\t[]"


def articles() -> Iterator[str]:
    for item, title in TITLES.items():
        text = "" if item == "0004" else quoted(f'Top in "{item}", lined.')
        yield f"{item},{item[:3]},{quoted(title)},253,Vest top,Garment Upper body,Black,Ladieswear,{text}"


def iso(place: int) -> str:
    return datetime.fromtimestamp(second(place), UTC).strftime("%Y-%m-%dT%H:%M:%S.277Z")


FLAGS = "|".join("1" if genre in (1, 5) else "0" for genre in range(19))
FILES: dict[str, dict[str, Callable[[], bytes]]] = {
    "amazon2014-beauty": {
        "amazon2014/reviews_Beauty.json.gz": lambda: lines(reviews_2014()),
        "amazon2014/meta_Beauty.json.gz": lambda: lines(items_2014()),
    },
    "amazon2018": {
        "amazon2018/All_Beauty.json.gz": lambda: lines(reviews_2018()),
        "amazon2018/meta_All_Beauty.json.gz": lambda: lines(items_2018()),
    },
    "amazon2023": {
        "amazon2023/All_Beauty.jsonl.gz": lambda: lines(reviews_2023()),
        "amazon2023/meta_All_Beauty.jsonl.gz": lambda: lines(items_2023()),
    },
    "movielens-100k": {
        "ml-100k/u.data": lambda: lines([f"{user}\t{item}\t5\t{second(place)}" for place, user, item in EVENTS]),
        "ml-100k/u.item": lambda: lines(
            [f"{item}|{title}|01-Jan-1995||http://x|{FLAGS}" for item, title in TITLES.items()], encoding=LATIN
        ),
    },
    "movielens-1m": {
        "ml-1m/ratings.dat": lambda: lines([f"{user}::{item}::5::{second(place)}" for place, user, item in EVENTS]),
        "ml-1m/movies.dat": lambda: lines(
            [f"{item}::{title}::Drama|War" for item, title in TITLES.items()], encoding=LATIN
        ),
    },
    "movielens-20m": {
        "ml-20m/ratings.csv": lambda: lines(
            [f"{user},{item},3.5,{second(place)}" for place, user, item in EVENTS],
            "userId,movieId,rating,timestamp",
            end="\r\n",
        ),
        "ml-20m/movies.csv": lambda: lines(
            [f"{item},{quoted(title)},(no genres listed)" for item, title in TITLES.items()],
            "movieId,title,genres",
            end="\r\n",
        ),
    },
    "hm": {
        "hm/transactions_train.csv": lambda: lines(
            [f"{iso(place)[:10]},{user},{item},0.0508305084745762,2" for place, user, item in EVENTS],
            "t_dat,customer_id,article_id,price,sales_channel_id",
        ),
        "hm/articles.csv": lambda: lines(
            articles(),
            "article_id,product_code,prod_name,product_type_no,product_type_name,product_group_name,colour_group_name,"
            "index_group_name,detail_desc",
        ),
    },
    "yoochoose": {
        "yoochoose/yoochoose-clicks.dat": lambda: lines(
            [f"{user},{iso(place)},{item},{'S' if place else 0}" for place, user, item in EVENTS]
        )
    },
    "diginetica": {
        "diginetica/train-item-views.csv": lambda: lines(
            [
                f"{user};{'NA' if place else 7};{item};{526_309 * (place + 1)};2016-05-09"
                for place, user, item in EVENTS
            ],
            "sessionId;userId;itemId;timeframe;eventdate",
        ),
        "diginetica/products.csv": lambda: lines(
            [f"{item};10;{number},776,{100 + number}" for number, item in enumerate(TITLES)],
            "itemId;pricelog2;product.name.tokens",
        ),
    },
    "mind": {"mind/behaviors.tsv": lambda: lines(behaviors()), "mind/news.tsv": lambda: lines(news())},
}
WITHOUT_TITLES = {"yoochoose", "diginetica"}


def write_files(name: str, folder: Path) -> None:
    for path, content in FILES[name].items():
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(content()) if file.suffix == ".gz" else content())


def test_each_config_has_its_lines() -> None:
    assert {path.stem for path in CONFIGS} == FILES.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_data_set_is_built(path: Path, tmp_path: Path) -> None:
    write_files(path.stem, tmp_path)
    changes: dict[str, Any] = {
        "data.root": tmp_path,
        "store.path": tmp_path / "store",
        "data.split.by": "leave_one_out",
    }
    changes |= {f"data.interactions.min_{side}_events": 2 for side in ("user", "item")}
    changes |= {"data.dirt.max_bad_rows": 0.2} if path.stem == "mind" else {}  # of seven rows, one has no clicks
    changes |= {} if path.stem == "yoochoose" else {"data.features.text.dim": 2}
    config = load_config(path, [word for key, value in changes.items() for word in (f"--{key}", str(value))])
    store, _ = build_store(config)
    vocabulary = read_columns(store, "vocab.parquet")
    users, items = read_columns(store, "users.parquet")["external_id"], vocabulary["external_id"]
    found = {
        split: {users[user]: [items[item] for item in row] for user, row in read_split(store, split).items()}
        for split in ("train", "valid", "test")
    }
    assert found == {
        "train": {user: items[:-2] for user, items in HISTORIES.items()},
        "valid": {user: items[:-1] for user, items in HISTORIES.items()},
        "test": HISTORIES,
    }
    bought = {item: title for item, title in TITLES.items() if item != "0005"}
    assert items == list(bought)
    report = read_report(store)
    assert report is not None and report.catalogue.untitled == (None if path.stem in WITHOUT_TITLES else 0)
    if path.stem not in WITHOUT_TITLES:
        assert vocabulary["title"] == list(bought.values())
