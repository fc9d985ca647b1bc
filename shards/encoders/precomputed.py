"""A feature that was computed elsewhere: a ``.npy`` array [rows, dim]. It stays on disk, memory-mapped.

Its rows are those of the item table. They are taken as they are. A row of zeros is how such an array says that an item
lacks the feature (or that whatever wrote it died): the item is absent, and the build says how many are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import NpyFeature
from shards.encoders.item_feature import ItemFeature

FLOAT16_MAX = 65_504.0
FLOAT16_TINY = 2.0**-14  # smaller numbers lose digits, below 2**-25 all of them
VALUES_AT_ONCE = 1 << 22  # that are checked together


def read_precomputed(
    name: str, config: NpyFeature, root: Path, num_items: int, sha256: str, source_rows: np.ndarray | None = None
) -> ItemFeature:
    """The array of feature ``name``, a row for each of the ``num_items`` of the item table; ``sha256`` is its file's.

    Args:
        source_rows: the items of the store, see :class:`ItemFeature`; None: those of the table.

    Raises:
        UserError: the file cannot be read, does not fit the items or ``config.dim``, or holds numbers that are not
            finite, or too large or too small for float16.
    """
    path, rows = open_precomputed(name, config, root, num_items)
    present = _check_values(name, path, rows)
    num_added = 0
    if source_rows is not None:
        num_added = int((source_rows < 0).sum())
        present = np.append(present, False)[source_rows]  # -1 is the last
    num_zeros = len(present) - int(present.sum()) - num_added
    notes = [f"{num_zeros:,} rows of zeros: these items lack it"] if num_zeros else []
    notes += [f"{num_added:,} items are not in the item table, and lack it"] if num_added else []
    note = "; ".join(notes)
    return ItemFeature(
        name, rows, present, encoder="npy", revision=sha256, recipe={}, note=note, source_rows=source_rows
    )


def open_precomputed(name: str, config: NpyFeature, root: Path, num_items: int) -> tuple[Path, np.ndarray]:
    """The file of feature ``name`` and its array, memory-mapped, of which only type and shape are checked.

    Raises:
        UserError: the file cannot be read, or does not fit the items or ``config.dim``.
    """
    path = root / config.path
    if not path.is_file():
        raise UserError(f"feature {name!r}: {path} does not exist; check data.root and data.features.{name}.path")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"feature {name!r}: {path} is not a plain .npy array ({error}); save it with numpy.save"
        ) from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f" or rows.shape[1] == 0:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "an archive"
        raise UserError(f"feature {name!r}: {path} holds {found}; expected floats [items, dim]")
    if len(rows) != num_items:
        raise UserError(
            f"feature {name!r}: {path} has {len(rows)} rows but there are {num_items} items; expected a row for each"
        )
    if config.dim not in (0, rows.shape[1]):
        raise UserError(
            f"feature {name!r}: {path} has {rows.shape[1]} columns but its dim is {config.dim}; make them equal, or "
            "set dim to 0"
        )
    return path, rows


def _check_values(name: str, path: Path, rows: np.ndarray) -> np.ndarray:
    """Which rows are not all zero, bool [V]."""
    present = np.empty(len(rows), np.bool_)
    step = max(1, VALUES_AT_ONCE // rows.shape[1])
    for low in range(0, len(rows), step):
        part = rows[low : low + step]
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            row = low + int(np.argmin(finite))
            raise UserError(f"feature {name!r}: {path} row {row} holds NaN or infinity; expected finite numbers")
        largest = np.abs(part).max(axis=1)
        present[low : low + step] = largest > 0
        if (largest > FLOAT16_MAX).any():
            row = int(np.argmax(largest))
            raise UserError(
                f"feature {name!r}: {path} row {low + row} holds {largest[row]:g}, which overflows float16 "
                f"(at most {FLOAT16_MAX:g}); scale the array down"
            )
        tiny = (largest > 0) & (largest < FLOAT16_TINY)
        if tiny.any():
            row = int(np.argmax(tiny))
            raise UserError(
                f"feature {name!r}: {path} row {low + row} holds at most {largest[row]:g}, too small for float16 "
                f"(at least {FLOAT16_TINY:.2g} keeps its digits); scale the array up, or set such rows to zero"
            )
    return present
