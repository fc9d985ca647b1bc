"""A segment: some encoded rows in one file, which is complete or absent and never changes.

    <sha256>.safetensors    keys uint8 [n, 32], rows float16 [n, dim], notes uint8 [n];
                            failed uint8 [m, 32], causes uint8 [m]

Its name is the sha256 of its bytes. It tells whether the file is whole, and makes any number of writers safe: two that
encode the same write the same file.

``n`` contents that have a row, ``m`` that cannot be encoded, ``dim`` the rows' width.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from fmrl_dist.base.files import write_atomically
from shards.encodings.content_keys import KEY

SEGMENT_FILE = re.compile(r"[0-9a-f]{64}\.safetensors", re.ASCII)


class DamagedSegmentError(ValueError):
    """A file is not the segment that its name says."""


class Segment(NamedTuple):
    """What one file holds."""

    keys: np.ndarray  # KEY [n]
    rows: np.ndarray  # float16 [n, dim], of the keys
    notes: np.ndarray  # uint8 [n], what the encoder has to say of each row; 0: nothing
    failed: np.ndarray  # KEY [m], of contents that cannot be encoded
    causes: np.ndarray  # uint8 [m], why, as the encoder numbers causes


def write_segment(folder: Path, segment: Segment) -> str:
    """Write a segment into ``folder``; returns the name of its file."""
    data = save(
        {
            "keys": np.ascontiguousarray(segment.keys).view(np.uint8).reshape(-1, KEY.itemsize),
            "rows": np.ascontiguousarray(segment.rows),
            "notes": np.ascontiguousarray(segment.notes),
            "failed": np.ascontiguousarray(segment.failed).view(np.uint8).reshape(-1, KEY.itemsize),
            "causes": np.ascontiguousarray(segment.causes),
        }
    )
    name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
    write_atomically(folder / name, data)
    return name


def read_segment(path: Path, dim: int) -> Segment:
    """The segment in a file, with rows of ``dim`` numbers.

    Raises:
        DamagedSegmentError: the file cannot be read, was changed after it was written, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedSegmentError(f"it cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise DamagedSegmentError("its sha256 is not the one in its name")
    try:
        arrays = load(data)
        keys, rows, failed, causes = (arrays[name] for name in ("keys", "rows", "failed", "causes"))
        notes = arrays.get("notes", np.zeros(len(keys), np.uint8))  # of older versions, whose encoders had none
    except Exception as error:  # noqa: BLE001 - a file of others can make the parser raise anything
        raise DamagedSegmentError(f"it is no segment: {error}") from None
    found = [(array.dtype, array.shape) for array in (keys, rows, notes, failed, causes)]
    n, m, width = keys.shape[:1], failed.shape[:1], KEY.itemsize
    of_rows = [(np.uint8, (*n, width)), (np.float16, (*n, dim)), (np.uint8, n)]
    if found != [*of_rows, (np.uint8, (*m, width)), (np.uint8, m)]:
        raise DamagedSegmentError(f"it holds {rows.dtype} {list(rows.shape)}, expected float16 {[*n, dim]}")
    return Segment(_as_keys(keys), rows, notes, _as_keys(failed), causes)


def _as_keys(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(KEY)
