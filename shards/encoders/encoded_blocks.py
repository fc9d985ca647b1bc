"""The finished blocks of an encoding, kept on disk: hours of encoding survive an interruption.

    <store>.encoding/<feature>-<key>/encoding.json     the recipe: what is encoded, and how; the key is its hash
                                     000000.npz        ids int64 [n] and rows float16 [n, dim] of one block, and
                                                       failed int64 [causes]: inputs that could not be encoded

A block's file is complete or absent. Anything that changes the rows (encoder, revision, settings, input) changes the
key, and so the folder: rows of another encoding are never mistaken for ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import write_atomically

RECIPE, ROWS = "encoding.json", "rows.npy"
FOLDER = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}", re.ASCII)
# Also what a killed process was writing.
OUR_FILE = re.compile(r"rows\.npy|encoding\.json|\d{6,}\.npz|\.(encoding\.json|\d{6,}\.npz)\.[0-9a-f]{16}", re.ASCII)


def encoding_folder(store: Path) -> Path:
    """Where the encodings of a store are kept until the store is complete."""
    return store.with_name(f"{store.name}.encoding")


def remove_encodings(parent: Path) -> None:
    """Remove all encodings in ``parent``, and ``parent`` where nothing else is in it: files of others stay."""
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if FOLDER.fullmatch(folder.name) and not folder.is_symlink() and (folder / RECIPE).is_file():
            for path in folder.iterdir():
                if OUR_FILE.fullmatch(path.name):
                    path.unlink()
            _remove_if_empty(folder)
    _remove_if_empty(parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


class EncodedBlocks:
    """The blocks of one feature, some of which are finished.

    Args:
        parent: :func:`encoding_folder` of the store.
        feature: its name.
        recipe: everything that the rows depend on, as JSON values.
        num_blocks: that the work is cut into.
    """

    def __init__(self, parent: Path, feature: str, recipe: dict[str, Any], num_blocks: int) -> None:
        text = json.dumps({"feature": feature, "num_blocks": num_blocks, **recipe}, indent=1, sort_keys=True)
        self.feature = feature
        self.folder = parent / f"{feature}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.num_blocks = num_blocks
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RECIPE, text.encode())

    def announce(self, encoder: str) -> None:
        """Print which encoder starts, and how many blocks an earlier build has finished."""
        print(f"feature {self.feature!r}: {encoder}", flush=True)
        if finished := self.num_blocks - len(self.missing()):
            print(f"feature {self.feature!r}: {finished} of {self.num_blocks} blocks were done before", flush=True)

    def missing(self) -> list[int]:
        """Numbers of the blocks that are not finished."""
        return [block for block in range(self.num_blocks) if not self._path(block).exists()]

    def save(self, block: int, ids: np.ndarray, rows: np.ndarray, failed: Sequence[int] = ()) -> None:
        """Keep a finished block.

        Args:
            block: its number.
            ids: int64 [n], of the items that have a row, each once.
            rows: float16 [n, dim], in the same order.
            failed: how many inputs of the block could not be encoded, by cause.
        """
        buffer = io.BytesIO()
        np.savez(buffer, ids=ids, rows=rows, failed=np.asarray(failed, np.int64))
        write_atomically(self._path(block), buffer.getvalue())

    def gather(self, num_items: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """All blocks together: float16 [V, dim], memory-mapped, and bool [V], true for the items that have a row.

        An item that occurs in several blocks keeps the row of the first.

        Raises:
            UserError: a block's file is damaged, or has another dim.
        """
        rows = np.lib.format.open_memmap(self.folder / ROWS, "w+", np.float16, (num_items, dim))
        present = np.zeros(num_items, np.bool_)
        for block in range(self.num_blocks):
            ids, block_rows, _ = self._read(block)
            if block_rows.shape != (len(ids), dim):
                raise self._damaged(block, f"rows are {list(block_rows.shape)}, expected {[len(ids), dim]}")
            if ((ids < 0) | (ids >= num_items)).any():
                raise self._damaged(block, f"it holds items outside 0 ... {num_items - 1}")
            new = ~present[ids]
            rows[ids[new]] = block_rows[new]
            present[ids] = True
        return rows, present

    def failed(self) -> np.ndarray:
        """How many inputs of all blocks could not be encoded, by cause, int64 [causes].

        Raises:
            UserError: a block's file is damaged.
        """
        return np.sum([self._read(block)[2] for block in range(self.num_blocks)], axis=0)

    def _read(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            with np.load(self._path(block), allow_pickle=False) as arrays:
                return arrays["ids"], arrays["rows"], arrays["failed"]
        except Exception as error:  # noqa: BLE001 - a damaged archive can make zipfile and NumPy raise anything
            raise self._damaged(block, error) from None

    def _damaged(self, block: int, what: object) -> UserError:
        return UserError(f"encoded block {self._path(block)} is damaged ({what}); remove it and build again")

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06d}.npz"
