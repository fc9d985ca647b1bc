"""MovieLens of GroupLens, by file names: 100K (``u.data``), 1M and 10M (``ratings.dat``), 20M and later (``.csv``).

Ratings: user, item, rating, time in seconds. Items: title with its year, genres; the plain table has the genres as
``categories`` too, for the default text. 100K has a flag for each genre, in the order of ``u.genre``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.tables import CsvConfig, SequenceTableConfig
from shards.tables.csv_files import UNREADABLE
from shards.tables.formats.item_rows import ItemRow, ItemSource
from shards.tables.text_streams import lines_of

EVENT_FILES = ("u.data", "ratings.dat", "ratings.csv")  # what is looked for in a folder
ITEM_FILES = ("u.item", "movies.dat", "movies.csv")
NAMES = ("user", "item", "rating", "timestamp")
GENRES_100K = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")
NO_GENRES = "(no genres listed)"
YEAR = re.compile(r"\((\d{4})\)\s*$")
FIRST_FLAG = 5  # column of u.item


def event_columns(given: SequenceTableConfig, file: Path) -> SequenceTableConfig:
    """Columns of the ratings."""
    plain = replace(given, layout="interactions", rating="rating", times="timestamp", time_unit="s")
    name = _plain_name(file)
    if name.endswith(".csv"):
        return replace(plain, user="userId", items="movieId")
    delimiter = "::" if name.endswith(".dat") else "\t"
    csv_config = CsvConfig(delimiter=delimiter, quote="", encoding="latin-1", header=False, names=NAMES)
    return replace(plain, user="user", items="item", csv=csv_config)


def read_items(file: Path) -> Iterator[ItemRow | str]:
    """Items of ``u.item``, ``movies.dat`` or ``movies.csv``."""
    name = _plain_name(file)
    if name.endswith(".csv"):
        yield from _of_csv(file)
        return
    is_100k = name.endswith(".item")
    for line in lines_of(file, encoding="latin-1"):
        cells = (line or "").split("|" if is_100k else "::")
        if len(cells) < (FIRST_FLAG + len(GENRES_100K) if is_100k else 3):
            yield UNREADABLE
        elif is_100k:
            flags = zip(GENRES_100K, cells[FIRST_FLAG:], strict=False)
            yield _row(cells[0], cells[1], [genre for genre, flag in flags if flag == "1"])
        else:  # a title may hold the delimiter
            yield _row(cells[0], "::".join(cells[1:-1]), cells[-1].split("|"))


def _of_csv(file: Path) -> Iterator[ItemRow | str]:
    lines = (line for line in lines_of(file) if line is not None)
    header = next(lines, "").removeprefix("\ufeff").split(",")
    if header[:3] != ["movieId", "title", "genres"]:
        raise UserError(f"table {file} begins with {','.join(header)!r}; expected movieId,title,genres of MovieLens")
    for line in lines:
        cells = next(csv.reader(io.StringIO(line)), [])
        yield _row(cells[0], cells[1], cells[2].split("|")) if len(cells) == len(header) else UNREADABLE


def _row(item_id: str, title: str, genres: list[str]) -> ItemRow | str:
    if not item_id.strip():
        return "no id"
    year, known = YEAR.search(title), [genre for genre in genres if genre and genre != NO_GENRES] or None
    return ItemRow(item_id, title.strip() or None, int(year[1]) if year else None, genres=known, categories=known)


def _plain_name(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").removesuffix(".zst")


ITEMS = ItemSource(("item_id", "title", "year", "categories", "genres"), read_items)
