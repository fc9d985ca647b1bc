"""Items of a published data set as a plain table, Parquet, that is made once and named by what it was made from.

Columns: ``item_id``, ``title``, ``year``, ``price`` (float64), ``brand``, ``categories`` (list of text), ``genres``
(likewise) and ``image_url``, those that the data set has. Rows stream through; only ids are held, to find those that
stand twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256, written_aside
from shards.tables.bad_rows import check_bad_rows
from shards.tables.csv_files import UNREADABLE
from shards.tables.file_states import check_unchanged, file_states

REVISION = 2  # raise it when the same files give other rows
ROWS_AT_ONCE = 10_000
BAD_KEY = b"bad_rows"  # of the file's metadata: cause -> rows that were left out, as JSON
ROWS_KEY = b"num_rows"  # likewise: how many were read
TYPES = {
    "item_id": pa.string(),
    "title": pa.string(),
    "year": pa.int32(),
    "price": pa.float64(),
    "brand": pa.string(),
    "categories": pa.list_(pa.string()),
    "genres": pa.list_(pa.string()),
    "image_url": pa.string(),
}
NUMBER = re.compile(r"[0-9][0-9,]*(\.[0-9]+)?")


@dataclass(frozen=True)
class ItemRow:
    """One item; what is not known is None."""

    item_id: str
    title: str | None = None
    year: int | None = None
    price: float | None = None
    brand: str | None = None
    categories: list[str] | None = None
    genres: list[str] | None = None
    image_url: str | None = None


@dataclass(frozen=True)
class ItemSource:
    """How the items of a data set are read."""

    columns: tuple[str, ...]  # of :class:`ItemRow`, that the data set has
    rows: Callable[[Path], Iterator[ItemRow | str]]  # of a file, in order; text is why a row cannot be used


def plain_items(name: str, files: list[Path], source: ItemSource, folder: Path, limit: float) -> Path:
    """The plain table of the items in ``files``, in ``folder``; one that is there is used again.

    An item that stands twice keeps its first row.

    Args:
        name: of the data set.
        files: in their order.
        source: how to read them.
        folder: to write into; made when it is needed.
        limit: largest share of rows that may be bad.

    Raises:
        UserError: a file cannot be read, holds no item, or too many bad rows, or changes meanwhile.
    """
    before = file_states(files)
    hashes = [file_sha256(file) for file in files]
    digest = hashlib.sha256(json.dumps([name, REVISION, source.columns, hashes]).encode()).hexdigest()[:16]
    path = folder / f"items-{name}-{digest}.parquet"
    shown = ", ".join(map(str, files))
    if path.is_file():
        # The limit may be lower than when the table was made.
        bad_rows, num_read = _counts(path)
        check_bad_rows(Counter(bad_rows), num_read, shown, limit)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    schema, bad, seen, num_rows, twice = pa.schema([(c, TYPES[c]) for c in source.columns]), Counter[str](), set(), 0, 0
    with written_aside(path) as file, pq.ParquetWriter(file, schema) as writer:
        rows = (_writable(row) for source_file in files for row in source.rows(source_file))
        while piece := list(islice(rows, ROWS_AT_ONCE)):
            num_rows += len(piece)
            bad.update(row for row in piece if isinstance(row, str))
            good = [row for row in piece if isinstance(row, ItemRow)]
            kept = [row for row in good if not (row.item_id in seen or seen.add(row.item_id))]  # type: ignore[func-returns-value]
            twice += len(good) - len(kept)
            writer.write_table(pa.Table.from_pylist([_plain(row, source.columns) for row in kept], schema))
        require(num_rows > 0, f"table {shown} is empty; expected at least one item")
        check_bad_rows(bad, num_rows, shown, limit)
        require(bool(seen), f"table {shown} has no item that can be used")
        check_unchanged(before, file_states(files))
        counts = {BAD_KEY: dict(sorted(bad.items())), ROWS_KEY: num_rows}
        writer.add_key_value_metadata({key: json.dumps(count).encode() for key, count in counts.items()})
    note = f"; {twice:,} stand twice, the first is kept" if twice else ""
    print(f"items: {len(seen):,} of {shown}{note}", flush=True)
    return path


def bad_rows_of(path: Path) -> dict[str, int]:
    """What :func:`plain_items` left out, by cause."""
    return _counts(path)[0]


def _counts(path: Path) -> tuple[dict[str, int], int]:
    """What was left out, by cause, and how many rows were read."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        return json.loads(metadata[BAD_KEY]), json.loads(metadata[ROWS_KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"table {path} cannot be read ({error}); remove it, and run this again") from None


def text_or_none(value: Any) -> str | None:
    """A field that should be text; None where it is empty or something else."""
    return value if isinstance(value, str) and value.strip() else None


def words_or_none(value: Any) -> list[str] | None:
    """A field that should be a list of text; of a list of lists, as paths are written, the first."""
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], list):
        value = value[0]
    return [word for word in value if isinstance(word, str) and word.strip()] or None


def first_text(value: Any) -> str | None:
    """The first text of a list, or the text itself."""
    values = value if isinstance(value, list) else [value]
    return next((word for word in values if text_or_none(word)), None)


def price_or_none(value: Any) -> float | None:
    """A price: a number, or text such as ``$12.99``; of a range the lower end."""
    if isinstance(value, str):
        found = NUMBER.search(value) if len(value) < 100 else None  # noqa: PLR2004 - some hold a page of HTML
        value = float(found[0].replace(",", "")) if found else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _writable(row: ItemRow | str) -> ItemRow | str:
    """A row, unless it holds half of a character, which JSON and Python can write and no file of text holds."""
    if isinstance(row, ItemRow):
        words = (row.item_id, row.title, row.brand, row.image_url, *(row.categories or ()), *(row.genres or ()))
        try:
            "".join(filter(None, words)).encode()
        except UnicodeEncodeError:
            return UNREADABLE
    return row


def _plain(row: ItemRow, columns: tuple[str, ...]) -> dict[str, Any]:
    values = asdict(row)
    return {column: values[column] for column in columns}
