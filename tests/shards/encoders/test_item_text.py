"""Item texts: the paper's template, and what a template must not reach."""

from __future__ import annotations

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
