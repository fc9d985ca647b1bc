"""Statistics computed once per store and kept (``Store.derived_folder``): item frequencies, alias tables,
training counts.

Each file's name contains the manifest's hash and the parameters, so a rebuilt store gets new files. A file is written
under a temporary name and renamed; processes that compute it at once write the same bytes. A file is a ``.npy``
followed by its sha256. The hash is checked when the file is opened (about 1 s for 100 million items and a table of 12
bytes each); then the file is memory-mapped.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import write_atomically
from fmrl_dist.data.alias import ROW, alias_table
from fmrl_dist.data.store.derived import check_appended_hash
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.windows import WindowRule, ragged_rows, target_windows


def popularity_table(store: Store, power: float) -> np.ndarray:
    """Alias table of shares ∝ (train_count + 1)^power, memory-mapped [V].

    Raises:
        UserError: the vocabulary is missing or damaged, or the table cannot be written or read.
    """
    return _computed_once(
        store, f"popularity-{power!r}", ROW, lambda: alias_table((_train_counts(store) + 1.0) ** power)
    )


def train_counts(store: Store) -> np.ndarray:
    """How often each item occurs in training histories, memory-mapped int64 [V].

    Raises:
        UserError: the vocabulary is missing or damaged, or the table cannot be written or read.
    """
    return _computed_once(store, "train-counts", np.dtype(np.int64), lambda: _train_counts(store))


def scored_items(store: Store, score_untrained: bool) -> np.ndarray | None:
    """Whether a softmax in training scores each item, bool [V]; None for all.

    An item without a training event is never a target. Scored, it would be a negative alone, and its features would
    learn that whatever looks like it is wrong.

    Args:
        store: an open store.
        score_untrained: ``loss.score_untrained``.

    Raises:
        UserError: as :func:`train_counts`.
    """
    if score_untrained:
        return None
    scored = train_counts(store) > 0
    return None if scored.all() else scored


def target_log_shares(store: Store, rule: WindowRule) -> np.ndarray:
    """Log of each item's share of an epoch's training targets, float32 [V]; -inf if never a target.

    It is memory-mapped, unless damaged blocks are left out: what can be read then may change from start to start, so it
    is counted at each, and not kept.
    """

    def compute() -> np.ndarray:
        counts = np.zeros(store.manifest.num_items, np.int64)
        for items, begins, first, last in _target_windows_of_all(store, rule):
            np.add.at(counts, items[ragged_rows(begins + first, last - first)], 1)
        with np.errstate(divide="ignore"):
            return np.log(counts / counts.sum()).astype(np.float32)

    if store.skips_damaged:
        return compute()
    return _computed_once(store, f"targets-{_name(rule)}", np.dtype(np.float32), compute)


def trained_items(store: Store, rule: WindowRule) -> np.ndarray:
    """Whether a training position reads or predicts each item, bool [V]; a pass over the users.

    It is memory-mapped, unless damaged blocks are left out (see :func:`target_log_shares`).
    """

    def compute() -> np.ndarray:
        trained = np.zeros(store.manifest.num_items, np.bool_)
        for items, begins, first, last in _target_windows_of_all(store, rule):
            first = np.maximum(first - 1, 0)  # the input of the first target; item 1 has none
            trained[items[ragged_rows(begins + first, last - first)]] = True
        return trained

    if store.skips_damaged:
        return compute()
    return _computed_once(store, f"trained-{_name(rule)}", np.dtype(np.bool_), compute)


def _target_windows_of_all(
    store: Store, rule: WindowRule
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Windows of an epoch, block by block: items [N], and where each window's user begins in them; its first target,
    and the end of its targets, counted from there.
    """
    for block in store.manifest.splits["train"]:
        arrays = store.read_or_skip(block)
        if arrays is None:
            continue
        owner, first, last = target_windows(np.diff(arrays["starts"]), rule)
        yield arrays["items"], arrays["starts"][:-1][owner], first, last


def _name(rule: WindowRule) -> str:
    return f"{rule.max_length}-{rule.windows}-{int(rule.predict_first)}"


def _train_counts(store: Store) -> np.ndarray:
    """How often each item occurs in training histories, int64 [V]."""
    path = f"{store.location}/{VOCAB_FILE}"
    counts, read = np.empty(store.manifest.num_items, np.int64), 0
    try:
        with pq.ParquetFile(pa.BufferReader(store.read_table(VOCAB_FILE))) as file:
            num_rows = file.metadata.num_rows
            require(
                num_rows == len(counts),
                f"{path} has {num_rows} rows; expected the store's {len(counts)} items: rebuild the store",
            )
            for batch in file.iter_batches(columns=["train_count"], use_threads=False):  # see Store.read_table
                counts[read : read + len(batch)] = batch.column(0).to_numpy()
                read += len(batch)
    except (OSError, pa.ArrowException, IndexError) as error:  # IndexError: the column is missing
        problem = " ".join(str(error).split())
        raise UserError(f"the store's vocabulary {path} cannot be read ({problem}); rebuild the store") from None
    return counts


def _computed_once(store: Store, name: str, dtype: np.dtype, compute: Callable[[], np.ndarray]) -> np.ndarray:
    path = store.derived_folder / f"{name}-{store.manifest.sha256[:16]}.npy"
    if not path.exists():
        _write(path, compute())
    table = _read(path)
    if table.dtype != dtype or table.shape != (store.manifest.num_items,):
        raise UserError(
            f"{path} holds {table.dtype} {table.shape}; expected {dtype} ({store.manifest.num_items},): delete it, "
            "it will be rebuilt"
        )
    return table


def _write(path: Path, table: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    digest = hashlib.sha256(buffer.getbuffer()).digest()
    buffer.write(digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make {path.parent} a writable folder with free space"
        ) from None


def _read(path: Path) -> np.ndarray:
    try:
        check_appended_hash(path)
        table: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, it will be rebuilt") from None
    return table
