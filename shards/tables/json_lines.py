"""JSON Lines in batches: one object per line, columns as text, or as lists of text, as they are written.

A line that is no JSON object is left out and counted. A column is a name of the objects, or a path ``a.b`` into nested
ones; what a line lacks is null, and so is NaN, which Python writes. Whole numbers keep all of their digits. The engine
parses, many lines at a time.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fmrl_dist.base.errors import UserError, require
from shards.tables.csv_files import UNREADABLE
from shards.tables.engine import literal, private_engine
from shards.tables.text_streams import opened_text

BLOCK_BYTES = 1 << 24  # that are parsed at once; a line is no longer
SAMPLE_LINES, SAMPLE_BYTES = 10_000, 1 << 22  # of a file, from which the names of its columns are known
INTEGERS, TEXT = ("BIGINT", "UBIGINT", "HUGEINT", "UHUGEINT"), "VARCHAR"  # the engine's names of JSON types
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
NO_JSON = "\x01"  # no line of JSON holds it, so it parts nothing

Lists = list[Any]
IDS = "integers of 64 bits or text"


def json_names(file: Path) -> list[str]:
    """Names that the objects at the beginning of a file have, nested ones with dots.

    Raises:
        UserError: the file cannot be read, or is one JSON array.
    """
    return list(_names(file))


def json_batches(
    file: Path, columns: Sequence[str], ids: Sequence[str], lists: Sequence[str], bad: Counter[str]
) -> Iterator[pa.Table]:
    """Columns of a file, large_string or lists of it (of lists of it), a batch of lines at a time.

    Args:
        file: to read.
        columns: names or paths.
        ids: those among them that may hold text and whole numbers only.
        lists: those of lists: a text among arrays is parsed to one; elsewhere it is a list of itself.
        bad: gets the number of lines that are left out.

    Raises:
        UserError: the file cannot be read, or a column holds objects, or one of ids something else than ids.
    """
    names = _names(file)
    numbers = range(1, len(columns) + 1)
    paths = ", ".join(literal(_pointer(column, names)) for column in columns)
    parts = [f"kinds[{n}] AS kind{n}, {_written(f'kinds[{n}]', f'texts[{n}]')} AS text{n}" for n in numbers]
    query = (
        f"SELECT line IS NOT NULL AND json_type(line) = 'OBJECT' AS is_row, {', '.join(parts)} FROM (SELECT line, "
        f"json_type(line, [{paths}]) AS kinds, json_extract_string(line, [{paths}]) AS texts FROM ("
        "SELECT CASE WHEN json_valid(line) THEN line END AS line FROM lines))"
    )
    engine = private_engine()
    try:
        for lines in _line_batches(file, bad):
            engine.register("lines", lines)
            found = engine.sql(query).to_arrow_table()
            engine.unregister("lines")
            found = found.filter(found["is_row"])
            if len(found) < len(lines):
                bad[UNREADABLE] += len(lines) - len(found)
            yield pa.table(
                [
                    _column(
                        found[f"kind{n}"],
                        found[f"text{n}"],
                        f"column {column!r} of {file}",
                        as_ids=column in ids,
                        as_lists=column in lists,
                    )
                    for n, column in zip(numbers, columns, strict=True)
                ],
                names=list(columns),
            )
    finally:
        engine.close()


@contextmanager
def readable_json(file: Path) -> Iterator[None]:
    """Say in one line why a file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        if "UTF8" in what or isinstance(error, UnicodeDecodeError):
            raise UserError(
                f"table {file} is not UTF-8 text ({what}); convert it, for example with "
                "iconv --from-code LATIN1 --to-code UTF-8"
            ) from None
        if "straddling" in what:
            raise UserError(
                f"table {file} has a line of more than {BLOCK_BYTES:,} bytes; expected JSON Lines, an object on each"
            ) from None
        raise UserError(f"table {file} cannot be read: {what}; is the file complete, and in that format?") from None


def list_of_cell(cell: str, where: str, as_ids: bool) -> Lists:
    """What a text means where a list is expected: a JSON array, or words separated by spaces.

    Raises:
        UserError: as :func:`lists_of`.
    """
    cell = cell.strip()
    return lists_of(cell, where, as_ids) if cell.startswith("[") else cell.split()


def lists_of(cell: str, where: str, as_ids: bool) -> Lists:
    """A JSON array as a list of text, or of lists of text; null stays None.

    Raises:
        UserError: it is none, holds objects or half of a character, or, as ids, something else than text and whole
            numbers.
    """

    def number(text: str) -> str:
        if as_ids:
            raise UserError(f"{where} holds the id {text}; expected {IDS}")
        return repr(float(text)) if math.isfinite(float(text)) else text

    try:
        value = json.loads(cell, parse_int=str, parse_float=number, parse_constant=number)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{where} holds {cell[:60]!r}; expected a JSON list, or ids separated by spaces") from None
    require(isinstance(value, list), f"{where} holds {cell[:60]!r}; expected a list")
    if "\\u" in cell:
        is_text = not HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False))
        require(is_text, f"{where} holds {cell[:60]!r}, half of a character (a lone surrogate); write the whole one")
    return [_words(word, where, as_ids, 1) for word in value]


def _line_batches(file: Path, bad: Counter[str]) -> Iterator[pa.Table]:
    def leave_out(_: pyarrow.csv.InvalidRow) -> str:
        bad[UNREADABLE] += 1
        return "skip"

    with readable_json(file), opened_text(file, "utf-8", ",") as stream:
        reader = pyarrow.csv.open_csv(
            stream,
            pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, column_names=["line"]),
            pyarrow.csv.ParseOptions(delimiter=NO_JSON, quote_char=False, invalid_row_handler=leave_out),
            pyarrow.csv.ConvertOptions(column_types={"line": pa.large_string()}, strings_can_be_null=False),
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            yield table.filter(pc.not_equal(pc.utf8_trim_whitespace(table["line"]), ""))


def _names(file: Path) -> dict[str, bool]:
    """Each name, and whether it is an object's own key: not a path into one, but one that may hold a dot."""
    with readable_json(file):
        status = file.stat()
    return _names_at(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _names_at(file: Path, _modified_ns: int, _size: int) -> dict[str, bool]:
    """Of a file as it was then: names are asked for several times before its rows are read."""
    with readable_json(file), opened_text(file, "utf-8", ",") as stream:
        start = stream.read(SAMPLE_BYTES).removeprefix(codecs.BOM_UTF8)
    require(
        not start.lstrip().startswith(b"["),
        f"table {file} is one JSON array; expected JSON Lines, an object on each line (jq -c '.[]' FILE makes them)",
    )
    names: dict[str, bool] = {}
    for line in start.split(b"\n", SAMPLE_LINES)[:SAMPLE_LINES]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # counted when the rows are read; the last one may be cut
            continue
        if isinstance(value, dict):
            _add_names(value, "", names)
            names |= dict.fromkeys(value, True)
    return {name: is_own for name, is_own in names.items() if not HALF_CHARACTER.search(name)}  # of an unreadable line


def _pointer(column: str, names: Mapping[str, bool]) -> str:
    """JSON pointer of a column: its own name if an object has it so, dots and all, else a path."""
    keys = [column] if names.get(column) else column.split(".")
    return "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in keys)


def _add_names(value: dict[str, Any], prefix: str, names: dict[str, bool]) -> None:
    for key, inner in value.items():
        names.setdefault(prefix + key, False)
        if isinstance(inner, dict):
            _add_names(inner, f"{prefix}{key}.", names)


def _written(kind: str, text: str) -> str:
    """SQL: the text of a value; that of a number with a fraction or exponent is Python's, as for any kind of file."""
    number = f"TRY_CAST({text} AS DOUBLE)"
    # Most are written so already, and reading a number takes time: those that are not have an exponent, here or there.
    large = f"(strlen({text}) > 16 AND contains({text}, '.'))"
    small = f"starts_with({text}, '0.0000') OR starts_with({text}, '-0.0000')"
    differs = f"{kind} = 'DOUBLE' AND (contains({text}, 'e') OR {large} OR {small})"
    return f"CASE WHEN {differs} AND isfinite({number}) THEN {number}::VARCHAR ELSE {text} END"


def _column(kinds: pa.ChunkedArray, texts: pa.ChunkedArray, where: str, as_ids: bool, as_lists: bool) -> pa.Array:
    found = set(kinds.unique().to_pylist()) - {None, "NULL"}
    require("OBJECT" not in found, f"{where} holds objects; name one of their fields, such as a.b")
    is_missing = pc.or_(pc.equal(kinds, "NULL"), pc.and_(pc.equal(kinds, "DOUBLE"), pc.equal(texts, "NaN")))
    texts = pc.if_else(is_missing, None, texts).cast(pa.large_string())
    others = texts.filter(pc.invert(pc.is_in(kinds, pa.array([TEXT, *INTEGERS, "ARRAY", None])))).drop_null()
    if as_ids and len(others):
        raise UserError(f"{where} holds the id {others[0].as_py()}; expected {IDS}")
    if "ARRAY" not in found:
        return texts

    def list_of(kind: str, text: str) -> Lists:
        if kind == "ARRAY":
            return lists_of(text, where, as_ids)
        return list_of_cell(text, where, as_ids) if as_lists else [text]

    cells = zip(kinds.to_pylist(), texts.to_pylist(), strict=True)
    return list_array([None if text is None else list_of(kind, text) for kind, text in cells])


def list_array(cells: Lists) -> pa.Array:
    """Lists of text; of lists of text, if one of them holds a list."""
    if not any(isinstance(word, list) for cell in cells for word in cell or ()):
        return pa.array(cells, pa.large_list(pa.large_string()))
    nested = [
        cell if cell is None else [word if word is None or isinstance(word, list) else [word] for word in cell]
        for cell in cells
    ]
    return pa.array(nested, pa.large_list(pa.large_list(pa.large_string())))


def _words(word: Any, where: str, as_ids: bool, depth: int) -> Any:
    """Of a value inside a list: text as it is written, or a list of it."""
    if word is None or isinstance(word, str):
        return word
    if isinstance(word, bool) and not as_ids:
        return str(word).lower()
    if isinstance(word, list) and not as_ids and depth < 2:  # noqa: PLR2004 - paths of categories
        return [_words(inner, where, as_ids, depth + 1) for inner in word]
    raise UserError(f"{where} holds {json.dumps(word)[:60]} in a list; expected text or numbers")
