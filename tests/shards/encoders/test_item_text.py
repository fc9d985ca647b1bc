"""Item texts: the paper's template, and what a template must not reach."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from fmrl_dist.base.errors import UserError
from shards.encoders.item_text import UNTITLED, item_texts, template_columns


def test_item_text_is_the_papers() -> None:
    table = pa.table(
        {
            "title": ["Comb", None, "  ", "Brush", None],
            "price": pa.array([9.99, 12, None, float("nan"), None], pa.float32()),
            "brand": ["Acme", "", None, None, None],
            "categories": [[["Beauty", "Hair"], ["Sale"]], [["Beauty"]], [], None, [[]]],
        }
    )
    parts = ("Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}")
    texts, present = item_texts(table, parts, "\n")
    assert texts == [
        "Title: Comb\nPrice: 9.99\nBrand: Acme\nCategories: Beauty, Hair",
        "Price: 12.0\nCategories: Beauty",
        UNTITLED,
        "Title: Brush",
        UNTITLED,
    ]
    assert present.tolist() == [True, True, False, True, False]
    assert item_texts(table, ("{title} for {price:.2f}",), " ")[0][:2] == ["Comb for 9.99", UNTITLED]
    assert template_columns(("{a} {b}", "{a}")) == ["a", "b"]


def test_a_format_of_a_narrow_float_is_that_of_its_decimal() -> None:
    """The float32 next to 0.185 is above it, the float64 below: as text files have it, the price is 0.18."""
    for kind, price in ((pa.float32(), 0.185), (pa.float64(), 0.185), (pa.float16(), np.float16(0.3))):
        texts = item_texts(pa.table({"price": pa.array([price], kind)}), ("{price:.2f} {price}",), "").texts
        assert texts == ["0.30 0.3" if kind == pa.float16() else "0.18 0.185"]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_numbers_of_lists_are_written_as_those_of_cells(kind: pa.DataType) -> None:
    cells = list(np.array([0.7, math.nan, 2.5], kind.to_pandas_dtype()))
    lists = pa.array([[*cells, None], [math.nan], [], None], pa.list_(kind))
    nested = pa.array([[cells, cells[2:]], [[math.nan]], [[]], None], pa.list_(pa.list_(kind)))
    for column in (lists, nested):
        texts, present = item_texts(pa.table({"sizes": column}), ("{sizes}",), "")
        assert (texts, present.tolist()) == (["0.7, 2.5", *[UNTITLED] * 3], [True, False, False, False])


def test_times_are_written_to_the_microsecond() -> None:
    moment = 1_400_000_000_123_456_789
    table = pa.table(
        {
            "a": pa.array([moment], pa.timestamp("ns")),
            "b": pa.array([[moment]], pa.list_(pa.timestamp("ns", "UTC"))),
            "c": pa.array([1_001], pa.duration("ns")),
            "d": pa.array([3_723_000_001_001], pa.time64("ns")),
        }
    )
    texts = item_texts(table, ("{a}", "{b}", "{c}", "{d}", "{a:%Y}"), "|").texts
    date = "2014-05-13 16:53:20.123456"
    assert texts == [f"{date}|{date}+00:00|0:00:00.000001|01:02:03.000001|2014"]


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (pa.array([0, 10**18], pa.timestamp("us")), r"row 2 holds 1000000000000000000 of type timestamp\[us\]"),
        (pa.array([10**15], pa.duration("s")), r"row 1 holds 1000000000000000 of type duration\[s\]"),
        (pa.array([0, 2**31 - 1], pa.date32()), r"row 2 holds 2147483647 of type date32\[day\]"),
        (pa.array([[10**18]], pa.list_(pa.timestamp("us"))), "row 1 holds a value of type large_list"),
    ],
)
def test_times_of_no_calendar_are_refused(column: pa.Array, shown: str) -> None:
    with pytest.raises(UserError, match=f"column 'w' of the item table: {shown}.*; expected years from 1 to 9999"):
        item_texts(pa.table({"w": column}), ("{w}",), "")


@pytest.mark.parametrize(
    "part",
    [
        "{title.__class__}",
        "{title[0]}",
        "{title!r}",
        "{title:{price}}",
        "{}",
        "{0.real}",
        "no field",
        "{title",
        "{title:>999999999}",
    ],
)
def test_templates_reach_columns_only(part: str) -> None:
    with pytest.raises(UserError, match="data.text part"):
        template_columns((part,))
