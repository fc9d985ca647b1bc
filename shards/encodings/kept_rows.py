"""The rows of one feature's encoder, kept across builds: one new item encodes one item.

    <build folder>/encodings/<feature>-<key>/recipe.json            all that makes a row; the key is its hash
                                             <sha256>.safetensors   some rows (``shards.encodings.segments``)

A row is found by its content within its recipe: neither the item's id nor the other items play a part. Anything that
changes rows changes the recipe, and so the folder. Segments are only ever added; any number of processes, also of
several machines that share the file system, may add them at once. Rows that are no longer in use stay: to get their
space back, delete the folder, whole or one recipe's.

Memory holds 41 bytes for each kept row; rows are read segment by segment into a file that is mapped into memory.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import final_name, json_sha256, write_atomically
from fmrl_dist.config.data_section import StoreConfig
from shards.encodings.content_keys import KEY
from shards.encodings.segments import SEGMENT_FILE, DamagedSegmentError, Segment, read_segment, write_segment

RECIPE_FILE, ROW_FILE = "recipe.json", "rows.npy"
ABANDONED_S = 86_400.0  # without a change: whoever wrote a temporary file is dead; a segment takes seconds
LOOK_EVERY_S = 10.0  # for segments of other processes
NO_FAILURES = np.empty(0, KEY), np.empty(0, np.uint8)


def encodings_folder(store: StoreConfig) -> Path:
    """Where the encodings of a store are kept: below ``store.build_dir``, or ``<store.path>.build``."""
    return store.build_folder / "encodings"


class KeptRows:
    """The rows that are kept for one feature and recipe; opening reads and checks all of their segments.

    Args:
        parent: :func:`encodings_folder` of the store.
        feature: its name.
        recipe: everything that a row depends on besides its content, as JSON values.
        dim: width of a row.
    """

    def __init__(self, parent: Path, feature: str, recipe: Mapping[str, Any], dim: int) -> None:
        self.feature, self.dim = feature, dim
        recipe = {"feature": feature, "dim": dim, **recipe}
        self.folder = parent / f"{feature}-{json_sha256(recipe)[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(recipe, indent=1, sort_keys=True)
        write_atomically(self.folder / RECIPE_FILE, text.encode())
        self._remove_abandoned()
        self._names: list[str] = []  # of the segments
        self._seen: set[str] = set()  # the same, and those that are damaged
        self._keys = np.empty(0, KEY)  # sorted
        self._segments = np.empty(0, np.int32)  # of each key, a position in the names
        self._places = np.empty(0, np.int32)  # of each key, its row in the segment; -1 - cause, if it failed
        self._notes = np.empty(0, np.uint8)  # of each key; 0, if it failed
        self._looked = -LOOK_EVERY_S
        self.refresh(at_once=True)

    def refresh(self, at_once: bool = False) -> None:
        """Take in what other processes have added; looks every few seconds at most, unless ``at_once``."""
        if not at_once and time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        found = sorted(p.name for p in self.folder.iterdir() if SEGMENT_FILE.fullmatch(p.name))
        new = [(name, segment) for name in found if (segment := self._read_new(name)) is not None]
        self._take_in(new)
        self._looked = time.monotonic()

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Which of ``keys``, KEY [n], have neither a row nor are known to fail: bool [n]."""
        return self._find(keys) < 0

    def has_row(self, keys: np.ndarray) -> np.ndarray:
        """Which of ``keys``, KEY [n], have a row: bool [n]."""
        found = self._find(keys)
        has = found >= 0
        has[has] = self._places[found[has]] >= 0
        return has

    def causes(self, keys: np.ndarray) -> np.ndarray:
        """Why those of ``keys`` that are known to fail do, in their order: uint8 [m]."""
        found = self._find(keys)
        places = self._places[found[found >= 0]]
        return (-1 - places[places < 0]).astype(np.uint8)

    def notes(self, keys: np.ndarray) -> np.ndarray:
        """What was noted of the rows of ``keys``, KEY [n]: uint8 [n]; 0 where there is no row."""
        found = self._find(keys)
        notes = np.zeros(len(keys), np.uint8)
        notes[found >= 0] = self._notes[found[found >= 0]]
        return notes

    def add(
        self,
        keys: np.ndarray,
        rows: np.ndarray,
        failures: tuple[np.ndarray, np.ndarray] = NO_FAILURES,
        notes: np.ndarray | None = None,
    ) -> None:
        """Keep rows, in one new segment.

        Args:
            keys: KEY [n], of the contents, each once.
            rows: float16 [n, dim], of the keys.
            failures: KEY [m], of contents that cannot be encoded, so that nobody tries again, and uint8 [m], why.
            notes: uint8 [n], what later builds are to know of each row, too; None: nothing.
        """
        segment = Segment(keys, rows, np.zeros(len(keys), np.uint8) if notes is None else notes, *failures)
        name = write_segment(self.folder, segment)
        self._seen.add(name)
        self._take_in([(name, segment)])

    def gather(self, keys: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Rows by item: float16 [V, dim], memory-mapped; zeros where not present.

        Args:
            keys: KEY [V], of the items' contents; any value where not present.
            present: bool [V]; all of these contents have a row.

        Raises:
            UserError: a segment was damaged or removed since it was read.
        """
        rows = self._row_file(len(keys))
        items = np.flatnonzero(present)
        found = self._find(keys[items])
        assert (found >= 0).all(), "all are kept"
        segments = self._segments[found]
        order = np.argsort(segments, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(segments[order])) + 1):
            if not len(part):
                continue
            path = self.folder / self._names[segments[part[0]]]
            try:
                rows[items[part]] = read_segment(path, self.dim).rows[self._places[found[part]]]
            except DamagedSegmentError as error:
                raise UserError(f"{path} has changed during the build ({error}); build again") from None
        return rows

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Positions of ``keys`` among ours, int64 [n]; -1 for those that are not there."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, at, -1)

    def _read_new(self, name: str) -> Segment | None:
        """A segment that has not been read before; None for others, and for a damaged one, which is reported once."""
        if name in self._seen:
            return None
        self._seen.add(name)
        try:
            return read_segment(self.folder / name, self.dim)
        except DamagedSegmentError as error:
            print(
                f"feature {self.feature!r}: {self.folder / name} is damaged ({error}); it is ignored, and its rows are "
                "encoded again; remove it",
                flush=True,
            )
            return None

    def _take_in(self, new: list[tuple[str, Segment]]) -> None:
        keys, segments, places, notes = [self._keys], [self._segments], [self._places], [self._notes]
        for name, segment in new:
            keys += [segment.keys, segment.failed]
            segments.append(np.full(len(segment.keys) + len(segment.failed), len(self._names), np.int32))
            places += [np.arange(len(segment.keys), dtype=np.int32), -1 - segment.causes.astype(np.int32)]
            notes += [segment.notes, np.zeros(len(segment.failed), np.uint8)]
            self._names.append(name)
        if new:
            all_keys = np.concatenate(keys)
            order = np.argsort(all_keys, kind="stable")  # of equal keys, the first to come is found
            self._keys = all_keys[order]
            self._segments, self._places = np.concatenate(segments)[order], np.concatenate(places)[order]
            self._notes = np.concatenate(notes)[order]

    def _row_file(self, num_rows: int) -> np.ndarray:
        """Zeros float16 [num_rows, dim], mapped from a file that has no name any more: it ends with this process."""
        path = self.folder / f".{ROW_FILE}.{secrets.token_hex(8)}"
        rows = np.lib.format.open_memmap(path, "w+", np.float16, (num_rows, self.dim))
        path.unlink()
        return rows

    def _remove_abandoned(self) -> None:
        """Remove what killed processes were writing, once it is certain that nobody writes it any more."""
        for path in self.folder.iterdir():
            try:
                if final_name(path.name) != path.name and time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process has renamed or removed it
