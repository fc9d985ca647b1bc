"""The histories of a data set, and what of them a model may read for each split.

U users, V items, L events. Needs NumPy and pyarrow only: rivals import it in environments of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fmrl_dist.base.errors import require

HIDDEN = {"train": 2, "valid": 2, "test": 1}  # events at the end of each history that a split may not read
SPLITS = ("valid", "test")
Histories = list[np.ndarray]  # of each user, int64: items numbered from 0, oldest first


def read_histories(folder: Path) -> tuple[Histories, int]:
    """All histories of a data set, in the order of ``sequences.parquet``, and its number of items.

    Raises:
        UserError: a history is too short to be split, or has an item that is not in the item table.
    """
    column = pq.read_table(folder / "sequences.parquet", columns=["item_ids"])["item_ids"].combine_chunks()
    num_items = pq.read_metadata(folder / "items.parquet").num_rows
    items = column.values.to_numpy().astype(np.int64) - 1
    starts = column.offsets.to_numpy()
    require(np.diff(starts).min() > HIDDEN["train"], f"{folder} has a history of less than three events")
    require(items.min() >= 0 and items.max() < num_items, f"{folder} has item ids beyond its {num_items} items")
    return np.split(items, starts[1:-1]), num_items


def readable(histories: Histories, split: str) -> Histories:
    """The part of each history that a model may read for a split."""
    return [history[: -HIDDEN[split]] for history in histories]


def targets(histories: Histories, split: str) -> np.ndarray:
    """The item after what is readable, int64 [U]."""
    return np.array([history[-HIDDEN[split]] for history in histories])


def left_padded(histories: Sequence[np.ndarray], length: int, padding: int) -> np.ndarray:
    """The last ``length`` events of each history, after padding: int64 [U, L]."""
    rows = np.full((len(histories), length), padding, np.int64)
    for row, history in zip(rows, histories, strict=True):
        kept = history[-length:]
        row[length - len(kept) :] = kept
    return rows
