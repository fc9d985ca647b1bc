"""What is computed from a store once and kept beside it, in ``<store>.derived/``: item frequencies, alias tables.

Each file's name carries the manifest's hash and what it was computed with, so a store that is built again has others.
Files are written aside and renamed; processes that compute the same one at once write the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fmrl_dist.data.alias import ROW, alias_table
from fmrl_dist.data.store import VOCAB_FILE, Store
from fmrl_dist.data.windows import ragged_rows, target_windows
from fmrl_dist.errors import UserError
from fmrl_dist.files import write_atomically


def popularity_table(store: Store, power: float) -> np.ndarray:
    """Alias table of shares ∝ (train_count + 1)^power, memory-mapped [V]."""

    def compute() -> np.ndarray:
        weights, begin = np.empty(store.manifest.num_items), 0
        with pq.ParquetFile(store.path / VOCAB_FILE) as file:
            for batch in file.iter_batches(columns=["train_count"]):
                counts = batch.column(0).to_numpy()
                weights[begin : begin + len(counts)] = (counts + 1.0) ** power
                begin += len(counts)
        return alias_table(weights)

    return _derived(store, f"popularity-{power:g}", ROW, compute)


def target_log_shares(store: Store, max_length: int, windows: str, predict_first: bool) -> np.ndarray:
    """Log of each item's share of an epoch's training targets, memory-mapped float32 [V]; -inf where it is none."""

    def compute() -> np.ndarray:
        counts = np.zeros(store.manifest.num_items, np.int64)
        for block in store.manifest.splits["train"]:
            arrays = store.read_block(block)
            begins = arrays["starts"][:-1]
            owner, first, last = target_windows(np.diff(arrays["starts"]), max_length, windows, predict_first)
            np.add.at(counts, arrays["items"][ragged_rows(begins[owner] + first, last - first)], 1)
        with np.errstate(divide="ignore"):
            return np.log(counts / counts.sum()).astype(np.float32)

    return _derived(store, f"targets-{max_length}-{windows}-{int(predict_first)}", np.dtype(np.float32), compute)


def _derived(store: Store, name: str, dtype: np.dtype, compute: Callable[[], np.ndarray]) -> np.ndarray:
    path = Path(f"{store.path}.derived") / f"{name}-{store.manifest.sha256[:16]}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, compute(), allow_pickle=False)
        write_atomically(path, buffer.getvalue())
    try:
        table: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, it will be made again") from None
    if table.dtype != dtype or table.shape != (store.manifest.num_items,):
        raise UserError(
            f"{path} holds {table.dtype} {table.shape}; expected {dtype} ({store.manifest.num_items},): delete it, "
            "it will be made again"
        )
    return table
