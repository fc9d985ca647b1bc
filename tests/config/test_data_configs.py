"""The configs of public data sets read a few lines of each as its publishers write them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fmrl_dist.config.loading import load_config
from shards.store.raw_items import check_raw_items, read_raw_items
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.tables import read_events

CONFIGS = sorted((REPOSITORY / "configs" / "data").glob("*.yaml"))
REVIEW = json.dumps({"reviewerID": "u1", "asin": "i1", "overall": 5.0, "unixReviewTime": 1_400_000_000})
VIEW = json.dumps({"user_id": "u1", "parent_asin": "i1", "rating": 5.0, "timestamp": 1_600_000_000_000})
FILES: dict[str, dict[str, str]] = {
    "amazon2014-beauty": {
        "amazon2014/reviews_Beauty.json.gz": REVIEW,
        "amazon2014/meta_Beauty.json.gz": "{'asin': 'i1', 'title': 'One', 'categories': [['A']]}",
    },
    "amazon2018": {
        "amazon2018/All_Beauty.json.gz": REVIEW,
        "amazon2018/meta_All_Beauty.json.gz": '{"asin": "i1", "title": "One", "category": ["A"]}',
    },
    "amazon2023": {
        "amazon2023/All_Beauty.jsonl.gz": VIEW,
        "amazon2023/meta_All_Beauty.jsonl.gz": '{"parent_asin": "i1", "title": "One", "categories": ["A"]}',
    },
    "movielens-100k": {
        "ml-100k/u.data": "u1\ti1\t5\t881250949",
        "ml-100k/u.item": "i1|One (1995)|01-Jan-1995|||0|1" + "|0" * 17,
    },
    "movielens-1m": {"ml-1m/ratings.dat": "u1::i1::5::978300760", "ml-1m/movies.dat": "i1::One (1995)::Drama"},
    "movielens-20m": {
        "ml-20m/ratings.csv": "userId,movieId,rating,timestamp\nu1,i1,5.0,1112486027",
        "ml-20m/movies.csv": 'movieId,title,genres\ni1,"One, Two (1995)",Drama',
    },
    "hm": {
        "hm/transactions_train.csv": "t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,u1,i1,0.05,2",
        "hm/articles.csv": "article_id,prod_name,index_group_name,product_type_name,colour_group_name,detail_desc\n"
        'i1,One,Ladieswear,Vest top,Black,"Jersey top, narrow."',
    },
    "yoochoose": {"yoochoose/yoochoose-clicks.dat": "u1,2014-04-07T10:51:09.277Z,i1,0"},
    "diginetica": {
        "diginetica/train-item-views.csv": "sessionId;userId;itemId;timeframe;eventdate\nu1;NA;i1;526309;2016-05-09",
        "diginetica/products.csv": "itemId;pricelog2;product.name.tokens\ni1;10;4875,776",
    },
    "mind": {
        "mind/behaviors.tsv": "1\tu1\t11/11/2019 9:05:58 AM\ti1 i1\ti1-1 i2-0",
        "mind/news.tsv": 'i1\tnews\tworld\tThe "One\tAbstract\thttp://x\t[]\t[]',
    },
}


def test_each_config_has_its_lines() -> None:
    assert {path.stem for path in CONFIGS} == FILES.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_data_set_is_read(path: Path, tmp_path: Path) -> None:
    for name, text in FILES[path.stem].items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(f"{text}\n".encode()) if file.suffix == ".gz" else f"{text}\n".encode())
    data = replace(load_config(path).data, root=str(tmp_path))
    rows, _ = read_events(data, "user", "item")
    assert set(rows) == {("u1", "i1")}
    if data.items.path:
        check_raw_items(data, tmp_path / "made")
        items = read_raw_items(data, tmp_path / "made")
        assert items.ids.external.to_pylist() == ["i1"] and items.bad == {}
