"""From ``data.format`` to plain tables: where events are and what their columns are called, and where items are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from fmrl_dist.base.errors import require
from fmrl_dist.base.table_files import rooted, table_files
from fmrl_dist.base.urls import is_url
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.tables import InteractionsConfig, ItemTableConfig, SequenceTableConfig, SplitConfig, TablePath
from shards.tables.formats import amazon2014, amazon2018, amazon2023, movielens
from shards.tables.formats.item_rows import bad_rows_of, plain_items
from shards.tables.raw_tables import RawTable

FORMATS: dict[str, ModuleType] = {
    "amazon2014": amazon2014,
    "amazon2018": amazon2018,
    "amazon2023": amazon2023,
    "movielens": movielens,
}
PLAIN_ID, PLAIN_TITLE = "item_id", "title"  # columns of the plain tables that are made of published items
PUBLISHED = "published"  # kind of files that only their data set's reader reads
MEND = "data.format names how its publisher writes it; check data.root and the path in the config"


def event_source(data: DataConfig, path: TablePath, downloads: Path | None) -> tuple[RawTable, SequenceTableConfig]:
    """A table of events at ``path``, and the names of its columns.

    Raises:
        UserError: nothing is there.
    """
    if data.format == "tables":
        return RawTable.at(data.root, path, data.sequences.csv, downloads), data.sequences
    format_ = FORMATS[data.format]
    places = _known_files(rooted(data.root, path), getattr(format_, "EVENT_FILES", ()))
    file = table_files(places, mend=MEND, downloads=downloads, any_ending=True)[0]
    columns: SequenceTableConfig = format_.event_columns(data.sequences, file)
    kind = ".csv" if data.format == "movielens" else ""
    return RawTable(places, columns.csv, downloads, kind), columns


def with_plain_items(data: DataConfig, downloads: Path | None) -> DataConfig:
    """``data`` with a plain table of items: its own, or one that is made of a data set's in ``downloads``.

    Of a data set, it says nothing more of events: their columns follow from the format.

    Raises:
        UserError: the items cannot be read, or there is no folder to write into.
    """
    if data.format == "tables":
        return data
    require(downloads is not None, f"data.format {data.format} needs a folder for its item table")
    assert downloads is not None
    format_ = FORMATS[data.format]
    files = published_items(data, downloads).files
    path = plain_items(data.format, files, format_.ITEMS, downloads, data.dirt.max_bad_rows)
    items = ItemTableConfig(path=str(path.absolute()), id=PLAIN_ID, title=PLAIN_TITLE, keep=data.items.keep)
    return replace(
        data,
        format="tables",
        items=items,
        sequences=SequenceTableConfig(),
        interactions=InteractionsConfig(),
        split=SplitConfig(),
    )


def item_columns(data: DataConfig) -> tuple[str, str]:
    """Columns of ids and titles of the plain table of items; the second "" where there is none."""
    return (data.items.id, data.items.title) if data.format == "tables" else (PLAIN_ID, PLAIN_TITLE)


def published_items(data: DataConfig, downloads: Path | None) -> RawTable:
    """The item table as it was published."""
    if data.format == "tables":
        return RawTable.at(data.root, data.items.path, data.items.csv, downloads)
    places = _known_files(rooted(data.root, data.items.path), getattr(FORMATS[data.format], "ITEM_FILES", ()))
    return RawTable(places, downloads=downloads, kind=PUBLISHED)


def bad_items_of(data: DataConfig, plain: DataConfig) -> dict[str, int]:
    """What was left out when the items of ``data`` became those of ``plain``, by cause."""
    return {} if data.format == "tables" else bad_rows_of(Path(str(plain.items.path)))


def _known_files(places: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """For a folder, the first of the data set's files that is in it."""
    return tuple(
        next((str(Path(place) / name) for name in names if (Path(place) / name).is_file()), place)
        if not is_url(place) and Path(place).is_dir()
        else place
        for place in places
    )
