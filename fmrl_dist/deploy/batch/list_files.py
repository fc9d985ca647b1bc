"""Lists as they are written: Parquet, or JSON Lines such as ``{"user": 17, "item_ids": ["a"], "scores": [1.5]}``.

B users, k items of a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmrl_dist.base.errors import require
from fmrl_dist.deploy.batch.user_batches import UserBatch
from fmrl_dist.deploy.recommender import Recommender

IDENTITY_KEY = b"fmrl_dist.recommend"  # of a Parquet part's metadata
FORMATS = ("parquet", "jsonl")


class ListMaker:
    """Recommends for batches of users; may be called by several threads at once.

    Args:
        recommender: of one size.
        k: items of each list, at least 1.
        exclude_seen: leave the items of a history out of its list.
        allow, deny: external ids, for all users; None for all items, and none.
        titles: also give the items' titles.

    Raises:
        UserError: an item is unknown, or titles are asked for and there are none.
    """

    def __init__(
        self,
        recommender: Recommender,
        k: int,
        exclude_seen: bool = True,
        allow: list[int | str] | None = None,
        deny: list[int | str] | None = None,
        titles: bool = False,
    ) -> None:
        require(k >= 1, f"k is {k}; expected 1 or more items")
        require(not titles or recommender.titles is not None, "the items of this export have no titles; leave them out")
        self._model, self._exclude_seen = recommender.model, exclude_seen
        self._k = self._model.possible_k(k)
        self._allow, self._deny = (None if ids is None else recommender.rows_of(ids) for ids in (allow, deny))
        ids = recommender.item_ids
        self._ids = pa.array(ids, pa.large_string() if isinstance(ids[0], str) else pa.int64())
        self._titles = pa.array(recommender.titles, pa.large_string()) if titles else None

    def __call__(self, batch: UserBatch) -> pa.Table:
        """Columns user, item_ids, scores, and titles if they were asked for."""
        rows, scores = self._model.recommend_rows(batch.histories, self._k, self._exclude_seen, self._allow, self._deny)
        is_item = rows >= 0
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(is_item.sum(1), out=starts[1:])
        listed = pa.array(rows[is_item])
        columns = {"item_ids": self._ids.take(listed), "scores": pa.array(scores[is_item])}
        if self._titles is not None:
            columns["titles"] = self._titles.take(listed)
        lists = {name: pa.ListArray.from_arrays(starts, _plain(values)) for name, values in columns.items()}
        return pa.table({"user": _plain(batch.users), **lists})


def _plain(values: pa.Array) -> pa.Array:
    """Text with 32-bit offsets, which every reader knows."""
    return values.cast(pa.string()) if pa.types.is_large_string(values.type) else values


class ParquetPart:
    """Writes tables of one schema as row groups."""

    def __init__(self, file: BinaryIO, identity: str) -> None:
        self._file, self._identity = file, identity
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        table = table.replace_schema_metadata({IDENTITY_KEY: self._identity.encode()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class JsonLinesPart:
    """Writes tables as lines; scores with as many digits as a float32 needs."""

    def __init__(self, file: BinaryIO, identity: str = "") -> None:
        self._file = file

    def write(self, table: pa.Table) -> None:
        self._file.write(json_lines(table))

    def close(self) -> None:
        pass


def json_lines(table: pa.Table) -> bytes:
    """A line for each user."""
    table = table.combine_chunks()
    scores = table["scores"].chunk(0)
    texts = iter(pc.cast(scores.flatten(), pa.string()).to_pylist())
    lengths = scores.value_lengths().to_pylist()
    titles = table["titles"].to_pylist() if "titles" in table.column_names else None
    lines = []
    for place, (user, items) in enumerate(zip(table["user"].to_pylist(), table["item_ids"].to_pylist(), strict=True)):
        listed = ", ".join(next(texts) for _ in range(lengths[place]))
        line = f'{{"user": {_json(user)}, "item_ids": {_json(items)}, "scores": [{listed}]'
        lines.append(line + (f', "titles": {_json(titles[place])}}}\n' if titles is not None else "}\n"))
    return "".join(lines).encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def parquet_identity(path: Path) -> tuple[int, str]:
    """Number of users of a Parquet part, and the identity that it was written with."""
    metadata = pq.read_metadata(path)
    found: Mapping[bytes, bytes] = metadata.metadata or {}
    return metadata.num_rows, found.get(IDENTITY_KEY, b"").decode()
