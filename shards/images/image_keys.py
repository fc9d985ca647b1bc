"""What the images of a table are found by, in units that parts of a build share out, and which of them an item gets.

The rows of a table form units of :data:`UNIT_ROWS`. The image of a row is found by its content
(``shards.encodings.kept_rows``); an item has its first image that can be used.

``V`` items, ``rows`` of the table, ``n`` of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmrl_dist.base.progress import Progress
from shards.encoders.item_images import FILES_AT_ONCE, ImageRows, ImageTable, read_image
from shards.encodings.content_keys import KEY, content_key
from shards.encodings.kept_rows import KeptRows
from shards.images.causes import CAUSES, ImageCounts, UnreadableImageError

UNIT_ROWS = 512  # at most a few minutes of SigLIP ViT-L on a CPU are lost; a GPU writes a file a second


@dataclass(frozen=True)
class ImageKeys:
    """What the images of some rows of a table are found by; the others have none."""

    keys: np.ndarray  # KEY [rows]
    given: np.ndarray  # bool [rows]: the row's item is known, and its image has bytes
    first: np.ndarray  # bool [rows]: likewise, and no earlier row has the same image
    causes: Counter[str]  # why rows of known items have none

    @classmethod
    def read(cls, name: str, table: ImageTable, units: Collection[int]) -> ImageKeys:
        """Read the images of all rows of ``units``, for feature ``name``: at the speed of the disk.

        Raises:
            UserError: the table cannot be read.
        """
        num_rows, causes = len(table.items), Counter[str]()
        keys, given, first = np.zeros(num_rows, KEY), np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
        progress = Progress("image", sum(len(rows_of(table, unit)) for unit in units), name=f"{name}, looked up")
        read = partial(_key_of_image, table.folder)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for unit, rows in rows_by_unit(table, units):
                low = unit * UNIT_ROWS
                known = np.flatnonzero(rows.items >= 0)
                for i, key in zip(known, pool.map(read, [rows.images[i] for i in known]), strict=True):
                    if isinstance(key, bytes):
                        keys[low + i], given[low + i] = key, True
                    else:
                        causes[key] += 1
                progress.advance(len(rows.items))
        progress.close()
        rows_given = np.flatnonzero(given)
        first[rows_given[np.unique(keys[rows_given], return_index=True)[1]]] = True
        return cls(keys, given, first, causes)

    def missing(self, kept: KeptRows, rows: np.ndarray) -> np.ndarray:
        """Those of ``rows`` whose image nobody has tried yet, each content once: int64 [n]."""
        rows = rows[self.first[rows]]
        return rows[kept.missing(self.keys[rows])]


def _key_of_image(folder: Path, image: bytes | str | None) -> bytes | str:
    """The key of an image, or the cause why it has no bytes."""
    try:
        return content_key(read_image(folder, image))
    except UnreadableImageError as problem:
        return problem.cause


def num_units(table: ImageTable) -> int:
    return -(-len(table.items) // UNIT_ROWS)


def rows_of(table: ImageTable, unit: int) -> np.ndarray:
    """The table's rows that form a unit, int64 [n]."""
    return np.arange(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, len(table.items)))


def rows_by_unit(table: ImageTable, units: Collection[int]) -> Iterator[tuple[int, ImageRows]]:
    """The rows of ``units``, in order; the table is read no further than the last of them."""
    last = max(units, default=-1)
    for unit, rows in enumerate(table.rows(UNIT_ROWS) if units else ()):
        if unit in units:
            yield unit, rows
        if unit == last:
            return


class UsableImages(NamedTuple):
    """The images that a feature is made of."""

    keys: np.ndarray  # KEY [V]; zeros where not present
    present: np.ndarray  # bool [V], which items have one
    counts: ImageCounts


def usable_images(table: ImageTable, images: ImageKeys, kept: KeptRows, num_items: int) -> UsableImages:
    """The first image of each item that has a row, once all were tried."""
    given = np.flatnonzero(images.given)
    readable = given[kept.has_row(images.keys[given])]
    items, first = np.unique(table.items[readable], return_index=True)
    keys, present = np.zeros(num_items, KEY), np.zeros(num_items, np.bool_)
    keys[items], present[items] = images.keys[readable][first], True
    failed = images.causes + Counter(CAUSES[cause] for cause in kept.causes(images.keys[given]))
    return UsableImages(keys, present, ImageCounts.of(len(table.items) - table.num_unknown, table.num_unknown, failed))
