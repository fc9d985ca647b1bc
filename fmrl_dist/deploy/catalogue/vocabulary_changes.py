"""``vocab.parquet`` of an export with items appended, renamed in title, removed or brought back. Rows never move.

V items before, n new ones.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.id_columns import as_ids
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.data.store.tables import table_batches
from fmrl_dist.deploy.item_vocabulary import REMOVED_COLUMN, removed_flags

SHOWN = 3  # ids in a message
MOST_BYTES = 1 << 30  # of a list of ids


@dataclass(frozen=True)
class ItemRecords:
    """The vocabulary of an export."""

    table: pa.Table  # without the column of removed items
    removed: np.ndarray  # bool [V]

    @classmethod
    def read(cls, data: bytes, where: str) -> ItemRecords:
        """From the file's bytes.

        Raises:
            UserError: it cannot be read.
        """
        try:
            table = bounded_table(table_batches(data, where), where)
            removed = removed_flags(table)
            ids, counts = table.column("external_id"), table.column("train_count")
            if not (is_text(ids.type) or pa.types.is_integer(ids.type)) or ids.null_count or counts.null_count:
                raise ValueError(f"external_id is {ids.type}")
        except (OSError, pa.ArrowException, LookupError, ValueError) as error:
            problem = " ".join(str(error).split())[:200]
            raise UserError(f"the vocabulary {where} cannot be read ({problem}); export again") from None
        if REMOVED_COLUMN in table.column_names:
            table = table.drop_columns([REMOVED_COLUMN])
        return cls(table, removed)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def ids(self) -> pa.ChunkedArray:
        """External ids [V]."""
        return self.table.column("external_id")

    @property
    def has_text_ids(self) -> bool:
        return is_text(self.ids.type)

    @property
    def has_titles(self) -> bool:
        return "title" in self.table.column_names

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        """Rows of external ids of the vocabulary's kind, int64 [n]; -1 where there is no such item."""
        rows = pc.index_in(ids.cast(self.ids.type), value_set=self.ids.combine_chunks())
        return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def check_kind(self, ids: pa.Array, where: str) -> None:
        """Refuse ids of another kind than those that are there.

        Raises:
            UserError: text where they are integers, or the reverse.
        """
        here, there = (("text" if text else "integers") for text in (is_text(ids.type), self.has_text_ids))
        require(
            here == there,
            f"ids in {where} are {here}, such as {ids[0].as_py()!r:.60}; those of the export are {there}, such as "
            f"{self.ids[0].as_py()!r:.60}: write them as {there}",
        )

    def appended(self, ids: pa.Array, titles: pa.Array | None) -> ItemRecords:
        """With new items, which no training has seen."""
        columns = {}
        for field in self.table.schema:
            values: pa.Array = pa.nulls(len(ids), field.type)
            match field.name:
                case "item":
                    values = pa.array(np.arange(len(self), len(self) + len(ids)))
                case "external_id":
                    values = ids
                case "train_count":
                    values = pa.array(np.zeros(len(ids), np.int64))
                case "title" if titles is not None:
                    values = titles
            columns[field.name] = values.cast(field.type)
        added = pa.table(columns, schema=self.table.schema)
        removed = np.concatenate((self.removed, np.zeros(len(ids), np.bool_)))
        return ItemRecords(pa.concat_tables([self.table, added]), removed)

    def updated(self, rows: np.ndarray, titles: pa.Array | None) -> ItemRecords:
        """With other titles for some items, and none of them removed any more."""
        table, removed = self.table, self.removed.copy()
        removed[rows] = False
        if titles is not None and self.has_titles:
            column = table.column("title").combine_chunks()
            is_new = np.zeros(len(self), np.bool_)
            is_new[rows] = True
            order = np.argsort(rows)
            new = titles.cast(column.type).take(pa.array(order))
            place = table.column_names.index("title")
            table = table.set_column(place, "title", pc.replace_with_mask(column, pa.array(is_new), new))
        return ItemRecords(table, removed)

    def without(self, rows: np.ndarray) -> ItemRecords:
        """With some items removed: their rows stay, for histories that hold them."""
        removed = self.removed.copy()
        removed[rows] = True
        return ItemRecords(self.table, removed)

    def to_bytes(self) -> bytes:
        """The file."""
        table = self.table
        if self.removed.any():
            table = table.append_column(REMOVED_COLUMN, pa.array(self.removed))
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()


def read_ids(path: Path, column: str, like: ItemRecords) -> pa.Array:
    """Ids in a file: of a column of a Parquet table, or else one a line.

    Raises:
        UserError: it cannot be read, holds no ids, or ids of another kind than those of the vocabulary ``like``.
    """
    require(path.is_file(), f"{path} does not exist; expected a file of ids, one a line, or a .parquet table")
    require(path.stat().st_size <= MOST_BYTES, f"{path} has more than {MOST_BYTES:,} bytes; expected a file of ids")
    try:
        if path.suffix == ".parquet":
            table = bounded_table(table_batches(path.read_bytes(), str(path), [column]), f"table {path}")
            ids = table.column(column).combine_chunks()
        else:
            ids = pa.array([line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()])
            if len(ids) and not like.has_text_ids:
                ids = ids.cast(pa.int64())
    except KeyError:
        raise UserError(f"table {path} has no column {column!r}; name it with --id") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as ids of this export ({problem}); one a line, or .parquet") from None
    require(len(ids) > 0, f"{path} holds no ids; expected at least one")
    require(ids.null_count == 0, f"{path} holds {ids.null_count} null ids; remove these rows")
    require(
        is_text(ids.type) or pa.types.is_integer(ids.type),
        f"{path} holds ids of type {ids.type}; expected ids of items",
    )
    if like.has_text_ids:
        ids = as_ids(ids, str(path), "text")  # integers as a store takes them
    like.check_kind(ids, str(path))
    return pc.unique(ids)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def listed(ids: pa.Array) -> str:
    """The first of some ids, for a message."""
    words = ", ".join(f"{item_id!r:.60}" for item_id in ids[:SHOWN].to_pylist())
    return words + (f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else "")
