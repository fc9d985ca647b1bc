"""The file between a rival and the judge: the scores of all users for all items, as two factors.

U users, V items, D factors. The score of an item is the product of a user's output with the item's vector, plus the
item's bias. A bias of minus infinity says that the rival cannot score the item. An ``.npz`` file without pickles:

    valid, test   float32 [U, D], each user's output for a split, in the order of ``sequences.parquet``
    items         float32 [V, D], in the order of item ids
    bias          float32 [V]
    record        JSON: the rival, its settings, and the training that it took
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals.histories import SPLITS
from fmrl_dist.base.errors import UserError, require


@dataclass(frozen=True)
class Scores:
    """Factors of the scores; see above."""

    users: dict[str, np.ndarray]  # of each split
    items: np.ndarray
    bias: np.ndarray


def write_scores(path: Path, scores: Scores, record: dict[str, Any]) -> None:
    arrays = {**scores.users, "items": scores.items, "bias": scores.bias}
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, record=np.array(json.dumps(record)), **single)  # type: ignore[arg-type]


def read_scores(path: Path, num_users: int, num_items: int) -> tuple[Scores, dict[str, Any]]:
    """Scores and their record.

    Raises:
        UserError: the file is not one of scores, or not of so many users and items.
    """
    try:
        with np.load(path) as arrays:
            record = json.loads(str(arrays["record"]))
            scores = Scores({split: arrays[split] for split in SPLITS}, arrays["items"], arrays["bias"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a file of scores: {error}; expected one that a rival's runner wrote") from None
    shapes = [scores.users[split].shape[:1] for split in SPLITS] + [scores.items.shape[:1], scores.bias.shape]
    expected = [(num_users,), (num_users,), (num_items,), (num_items,)]
    require(shapes == expected, f"{path} has scores of {shapes}, expected {expected}: --data names another data set")
    return scores, record
