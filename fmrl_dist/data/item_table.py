"""The item table: every item's frozen features in one matrix, unpacked from the store's item shards to a mapped file.

V items, F features' total dim, M features. One process per node writes the file once, in ``Store.derived_folder``,
under a lock; all processes of the node map it and so share its pages. Its name contains the hashes of manifest and
features, and it gets that name once it is complete and on disk. Every block is checked against the manifest when it is
unpacked. Every start compares a sample of the file with its hashes (:mod:`fmrl_dist.data.store.piece_hashes`); a file
that is damaged is unpacked again.

Cost: every item block is read once, its rows are written at scattered places in the file, and the file is read once to
be hashed. Memory holds only one flag per item and the pages that the system chooses to cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import flush
from fmrl_dist.base.locks import lock_file
from fmrl_dist.data.store.derived import table_damage
from fmrl_dist.data.store.piece_hashes import write_hashes
from fmrl_dist.data.store.reader import Store

LEFT_BEHIND_S = 600.0  # without a write: then the writer of a temporary file is dead
SMALL_TABLE_BYTES = 1 << 28
ANNOUNCE_AFTER_S = 5.0  # of waiting for another process, announce it


@dataclass(frozen=True)
class ItemTable:
    """Features of the whole catalogue; the tensors may be memory-mapped, their pages read on use."""

    dims: Mapping[str, int]  # feature → dim, in the order of the columns
    values: Tensor  # float16 [V, F]; absent features are zero
    present: Tensor  # bool [V, M]


def load_item_table(store: Store, features: Sequence[str] | None) -> ItemTable:
    """The features of all items, unpacked unless a process of this node has already done so and they are intact.

    Args:
        store: an open store.
        features: names, in this order; None for all of the store's.

    Raises:
        UserError: a feature is not in the store, a shard is damaged, or the table cannot be written.
    """
    dims, num_items = feature_dims(store, features), store.manifest.num_items
    names = list(dims)
    if not names or not num_items:
        return ItemTable(dims, torch.zeros(num_items, 0, dtype=torch.float16), torch.zeros(num_items, 0).bool())
    stem = f"items-{hashlib.sha256(','.join(names).encode()).hexdigest()[:8]}-{store.manifest.sha256[:16]}"
    values, present = (store.derived_folder / f"{stem}.{part}.npy" for part in ("values", "present"))
    try:
        if table_damage(values) is not None:
            values.parent.mkdir(parents=True, exist_ok=True)
            with _locked(values.with_suffix(".lock")):
                if (damage := table_damage(values)) is not None:
                    if values.exists():
                        print(f"the item table {values} is damaged ({damage}); it is unpacked again", flush=True)
                    _unpack(store, dims, values, present)
        return ItemTable(
            dims,
            _map(values, np.dtype(np.float16), (num_items, sum(dims.values()))),
            _map(present, np.dtype(np.bool_), (num_items, len(dims))),
        )
    except OSError as error:
        raise UserError(
            f"the item table {values} cannot be written or read ({error.strerror or error}); free space, or choose "
            "another folder with --store.cache_dir"
        ) from None


def feature_dims(store: Store, features: Sequence[str] | None) -> dict[str, int]:
    """Dims of some features of a store, in this order; None for all of them.

    Raises:
        UserError: a feature is not in the store.
    """
    known = {feature.name: feature.dim for feature in store.manifest.features}
    for name in features or ():
        if name not in known:
            raise UserError(
                f"model.features names {name!r}; the store {store.location} has: {', '.join(known) or 'none'}"
            )
    return known if features is None else {name: known[name] for name in features}


def _unpack(store: Store, dims: Mapping[str, int], values_path: Path, present_path: Path) -> None:
    """Write files and hashes under temporary names, then rename them, the values last."""
    stem = values_path.stem.partition(".")[0]
    for left in values_path.parent.glob(f".{stem}.*"):  # left behind by a killed process
        if time.time() - left.stat().st_mtime > LEFT_BEHIND_S:
            left.unlink(missing_ok=True)
    row_bytes = 2 * sum(dims.values()) + len(dims)
    _check_claim(store, store.manifest.num_items * row_bytes, values_path.parent)
    paths = {present_path: (np.bool_, len(dims)), values_path: (np.float16, sum(dims.values()))}
    # Random names: without a working lock, as on some network file systems, two processes can do this side by side.
    asides = [path.with_name(f".{path.name}.{secrets.token_hex(8)}") for path in paths]
    try:
        present, values = (
            np.lib.format.open_memmap(aside, "w+", dtype, (store.manifest.num_items, width))
            for aside, (dtype, width) in zip(asides, paths.values(), strict=True)
        )
        _reserve(asides)
        seen = np.zeros(store.manifest.num_items, np.bool_)
        for block in store.manifest.items:
            arrays = store.read_block(block)
            ids = arrays["ids"]
            seen[ids] = True
            values[ids] = np.concatenate([arrays[name] for name in dims], 1)
            present[ids] = np.stack([arrays.get(f"{name}.mask", np.ones(len(ids), np.bool_)) for name in dims], 1)
        missing = int((~seen).sum())
        require(missing == 0, f"store {store.location}: {missing} items are in no block; rebuild the store")
        for array in (present, values):
            array.flush()
        hashes_path = values_path.with_name(f"{stem}.sha256")
        hashes = hashes_path.with_name(f".{hashes_path.name}.{secrets.token_hex(8)}")
        asides.append(hashes)
        write_hashes(hashes, asides[:2])
        for aside, path in ((asides[0], present_path), (hashes, hashes_path), (asides[1], values_path)):
            flush(aside)
            aside.rename(path)
        flush(values_path.parent)
    except BaseException:
        for aside in asides:
            aside.unlink(missing_ok=True)
        raise


def _check_claim(store: Store, num_bytes: int, folder: Path) -> None:
    """Refuse a table that the item shards, as long as they really are, cannot hold, or the disk: before it is reserved.

    Raises:
        UserError: likewise.
    """
    if num_bytes > SMALL_TABLE_BYTES:  # for a smaller one, thousands of shards need not be asked for their length
        there = store.item_bytes()
        require(
            num_bytes <= there,
            f"store {store.location}: the manifest claims an item table of {num_bytes:,} bytes, but the item shards "
            f"have {there:,}; see python -m shards.verify {store.location}",
        )
    free = shutil.disk_usage(folder).free
    require(
        num_bytes <= free,
        f"the item table takes {num_bytes:,} bytes, but {folder} has {free:,} free; free space, or choose another "
        "folder with --store.cache_dir",
    )


def _reserve(paths: Sequence[Path]) -> None:
    """Allocate the disk space: if none is left when a page of a mapped file is written, SIGBUS kills the process."""
    for path in paths:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _map(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> Tensor:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write: a tensor must be writable
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, it will be rebuilt") from None
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}; expected {dtype} {shape}: delete it, it will be rebuilt"
        )
    return torch.from_numpy(array)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of this node; it is released if the process dies."""
    announced = False

    def announce(waited_s: float) -> None:
        nonlocal announced
        if not announced and waited_s > ANNOUNCE_AFTER_S:
            print(f"waiting for another process of this node to unpack the item table (lock {path})", flush=True)
            announced = True

    with path.open("a") as file:
        with contextlib.suppress(OSError):  # a file system that does not support locks
            lock_file(file.fileno(), patience_s=math.inf, on_wait=announce)
        yield
