"""Columns of ids become what the config says, or are refused."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.id_columns import IdKind, as_ids, ids_or_null

INTEGERS, WORDS = pa.array([42, -1], pa.int32()), pa.array(["42", "-1"])


@pytest.mark.parametrize("column", [INTEGERS, WORDS, pa.chunked_array([WORDS]), WORDS.dictionary_encode()])
@pytest.mark.parametrize(
    ("kind", "type_", "values"), [("text", pa.large_string(), ["42", "-1"]), ("integer", pa.int64(), [42, -1])]
)
def test_a_kind_that_is_chosen(column: Any, kind: IdKind, type_: pa.DataType, values: list[Any]) -> None:
    found = as_ids(column, "here", kind)
    assert found.type == type_ and found.to_pylist() == values


def test_what_it_is_without_a_choice() -> None:
    assert as_ids(INTEGERS, "here").equals(pa.array([42, -1]))
    assert as_ids(WORDS, "here").equals(WORDS.cast(pa.large_string()))
    assert as_ids(pa.array([2**64 - 1], pa.uint64()), "here", "text").to_pylist() == [str(2**64 - 1)]


def test_nulls_may_be_left() -> None:
    assert ids_or_null(pa.array(["1", "", None]), "here", "integer").to_pylist() == [1, None, None]
    assert ids_or_null(pa.array([1, None]), "here", "text").to_pylist() == ["1", None]
    assert ids_or_null(pa.nulls(2), "here", "text").to_pylist() == [None, None]


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        (pa.array([1, None]), "text", "here holds 1 null ids"),
        (pa.array([1.0]), "text", "here holds ids of type double; expected integers or text"),
        (pa.array([2**64 - 1], pa.uint64()), None, "do not fit int64 .*; store them as text"),
        (pa.array(["9223372036854775808"]), "integer", "do not fit int64 .*; set data.ids: text"),
        *[
            (pa.array(["1", word]), "integer", "which is no integer")
            for word in ("01", "+1", "1.0", "1e5", "-0", " 1", "٣")
        ],
    ],
)
def test_refusals(column: pa.Array, kind: IdKind | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_ids(column, "here", kind)
