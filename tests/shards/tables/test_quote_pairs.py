"""Quotes without their pairs are found, wherever the pieces of a stream begin and end."""

from __future__ import annotations

import io
import re
from pathlib import Path
from random import Random

import pytest

from fmrl_dist.base.errors import UserError
from shards.tables.quote_pairs import PairedQuotes
from shards.tables.raw_tables import RawTable, read_table
from tests.fixtures.tables import data_config, interactions, read_events


def read_in_pieces(data: bytes, sizes: list[int], longest: int = 1 << 20) -> bytes:
    stream = PairedQuotes(io.BytesIO(data), '"', ",", longest, Path("t.csv"))
    return b"".join(iter(lambda: stream.read(sizes.pop(0) if sizes else 64), b""))


def lines_at_fault(data: bytes) -> list[int]:
    """Lines of the quotes that open and close the first text at fault, byte by byte; only the first if none closes."""
    at, is_start = 0, True
    while at < len(data):
        if is_start and data[at] == ord('"'):
            opened, at = at, at + 1
            while (closed := data.find(b'"', at)) >= 0 and data[closed + 1 : closed + 2] == b'"':
                at = closed + 2
            lines = [data.count(b"\n", 0, place) + 1 for place in (opened, closed)]
            if closed < 0:
                return lines[:1]
            at = closed + 1
            if set(data[opened:closed]) & set(b"\r\n") and data[at : at + 1] not in (b"", b",", b"\n", b"\r"):
                return lines
            is_start = False
        else:
            is_start = data[at] in b",\r\n"
            at += 1
    return []


def test_as_byte_by_byte() -> None:
    random = Random(0)
    num_faults = 0
    for trial in range(4_000):
        letters = b'"",\n\rab"' if trial % 2 else b'"abcdefg,\nhi,k\n'
        data = bytes(random.choices(letters, k=random.randrange(40)))
        sizes = [3, *(random.choice([1, 2, 3, 5, 40]) for _ in range(40))]
        if expected := lines_at_fault(data):
            num_faults += 1
            with pytest.raises(UserError) as caught:
                read_in_pieces(data, sizes)
            assert [int(line) for line in re.findall(r"line (\d+)", str(caught.value))] == expected, data
        else:
            assert read_in_pieces(data, sizes) == data
    assert 1_000 < num_faults < 3_000


def test_a_text_that_is_longer_than_what_is_parsed_at_once() -> None:
    data = b'a,b\n1,"x\n' + b"2,y\n" * 100 + b'3,"\n'
    with pytest.raises(UserError, match="in line 2 is not closed in 64 bytes; is it a quote without its pair"):
        read_in_pieces(data, [], longest=64)


def test_two_stray_quotes_do_not_take_the_rows_between_them(tmp_path: Path) -> None:
    """Nor does their column have to be one that is read."""
    rows = [[f"u{user}", f"i{item}", f"query {item}"] for user in range(10) for item in range(8)]
    rows[3][2], rows[60][2] = '"big tv', '"small tv'
    (tmp_path / "e.csv").write_text("".join(",".join(row) + "\n" for row in [["u", "i", "query"], *rows]))
    events = interactions("e.csv", times="")
    with pytest.raises(UserError) as caught:
        read_events(data_config(tmp_path, sequences=events))
    assert str(caught.value) == (
        f"table {tmp_path / 'e.csv'}: a text in quotes that begins in line 5 is closed amid text in line 62; is it a "
        "quote without its pair? --data.sequences.csv.quote '' (or data.items) reads quotes as they are"
    )
    found, _ = read_events(data_config(tmp_path, sequences=events | {"csv": {"quote": ""}}), "user", "item")
    assert found == [(user, item) for user, item, _ in rows]


@pytest.mark.parametrize(
    ("text", "csv"),
    [
        ('id\ttitle\r\ni1\t"Heroes\r\ni2\tx\r\ni5\t"Weird Al" Yankovic\r\n', {}),
        ("id::title\ni1::'Heroes\ni2::x\ni3::'Yankovic\n", {"delimiter": "::", "quote": "'"}),
        ('id\ttitle\ri1\t"Heroes\ri2\t"x\r', {}),
    ],
)
def test_other_signs_and_line_ends(text: str, csv: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(text.encode())
    data = data_config(tmp_path, items={"path": "t.tsv", "csv": csv})
    with pytest.raises(UserError, match="is it a quote without its pair"):
        read_table(RawTable.at(tmp_path, "t.tsv", data.items.csv), ["id"])


def test_quotes_that_are_no_fault(tmp_path: Path) -> None:
    cells = ['"a\nb"', '"a "" b"', '"a" b', '24"', '""', '"""x""\n"', '"x"']
    (tmp_path / "t.csv").write_text("id,x\n" + "".join(f"{row},{cell}\n" for row, cell in enumerate(cells)))
    table = read_table(tmp_path / "t.csv", ["x"], text=["x"])
    assert table["x"].to_pylist() == ["a\nb", 'a " b', "a b", '24"', None, '"x"\n', "x"]
