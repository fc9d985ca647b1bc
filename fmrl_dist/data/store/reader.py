"""Reading a shard store, block by block.

The manifest (:mod:`fmrl_dist.data.store.manifest`) indexes every block by shard, byte range and sha256. A reader
therefore fetches exactly the blocks it wants, checks them before it parses them, and never scans a shard.

Shards are opened by checked plain file names, in a folder or at a URL (:mod:`fmrl_dist.data.store.files`), and parsed
from memory: webdataset's ``gopen`` would run a shell for a manifest that names ``pipe:...``. Arrays are read without
pickle.

Cost: one open (or request), one read and one sha256 (about 1 GB/s) per block.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.parquet import memory_bytes
from fmrl_dist.base.urls import is_url
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.store.block_arrays import item_problems, parse_block, user_problems
from fmrl_dist.data.store.cache import RangeCache
from fmrl_dist.data.store.files import LocalFiles, SourceError, StoreFiles
from fmrl_dist.data.store.manifest import (
    LEAVE_ONE_OUT,
    MANIFEST_FILE,
    ROW_BYTES,
    SHARD_NAME,
    Block,
    Manifest,
    fit_file,
)
from fmrl_dist.data.store.remote import RemoteFiles, checked_url, default_cache_folder
from fmrl_dist.data.store.tables import checked_table

FETCHED_AT_ONCE = 8  # blocks, from a URL


class Store:
    """A built store, open for reading."""

    def __init__(self, files: StoreFiles, manifest: Manifest, access: StoreConfig | None = None) -> None:
        self.files = files
        self.manifest = manifest
        self._access = access or StoreConfig()

    @property
    def location(self) -> str:
        """The store's folder or URL without credentials, to be shown and recorded."""
        return self.files.location

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        if not isinstance(self.files, LocalFiles):
            raise UserError(f"store {self.location} is not a local folder; copy it to one")
        return self.files.folder

    @property
    def skips_damaged(self) -> bool:
        """Whether users of damaged blocks are left out; otherwise damage ends the run."""
        return self._access.on_bad_shard == "skip"

    @property
    def max_lost_share(self) -> float:
        """Largest share of a split's users that skipped blocks may cost."""
        return self._access.max_lost_share

    @property
    def derived_folder(self) -> Path:
        """Folder for what is computed from this store once, under names that carry the manifest's hash."""
        beside = self._folder_beside
        if beside is not None and os.access(beside if beside.exists() else beside.parent, os.W_OK):
            return beside
        return _cache_folder(self._access)

    @property
    def derived_folders(self) -> list[Path]:
        """All folders in which runs of this user, or beside the store those of others, have put such files."""
        beside = [self._folder_beside] if self._folder_beside is not None else []
        with contextlib.suppress(UserError):  # there is no home folder, and so no cache in it
            return [folder for folder in {*beside, self.derived_folder} if folder.is_dir()]
        return beside

    @property
    def _folder_beside(self) -> Path | None:
        if self._access.cache_dir or not isinstance(self.files, LocalFiles):
            return None
        return Path(f"{self.files.folder}.derived")

    @classmethod
    def open(cls, path: str | Path, access: StoreConfig | None = None) -> Store:
        """Read the manifest of the store at ``path``.

        Args:
            path: a folder or a URL (http, https, s3, gs, file, memory).
            access: how to read from a URL (time, tries, cache), and what to do about damage. Its own ``path`` is
                ignored.

        Raises:
            UserError: there is nothing at ``path``, it is not a store, or its manifest is refused.
        """
        access = access or StoreConfig()
        files = _open_files(path, access)
        if isinstance(files, LocalFiles) and files.folder.is_file():
            raise UserError(f"store {files.location} is a file; expected the folder that shards.build writes")
        if isinstance(files, LocalFiles) and not files.folder.is_dir():
            raise UserError(
                f"store {files.location} does not exist; build it with python -m shards.build --config CONFIG"
            )
        try:
            manifest = files.read(MANIFEST_FILE, Manifest.from_bytes)
            _check_memory(manifest)
            return cls(files, manifest, access)
        except FileNotFoundError:
            raise UserError(
                f"{files.location} is not a store: it has no {MANIFEST_FILE}; build one with python -m shards.build"
            ) from None
        except UserError as error:
            raise UserError(f"store {files.location}: {error}") from None

    def read_block(self, block: Block) -> dict[str, np.ndarray]:
        """Read one block, checked against its hash and the manifest; the arrays are read-only.

        Returns:
            Arrays by field. Items: ``ids`` int64 [n], ``<feature>`` float16 [n, dim] and, where some item lacks it,
            ``<feature>.mask`` bool [n] (true: present). Users: ``users`` int64 [n], ``starts`` int64 [n + 1],
            ``items`` int64 [events] and, where the raw data has them, ``times`` int64 [events]. Users of an inline
            store: also ``block_items`` int64 [k], the distinct items sorted, ``block_counts`` int64 [k], how often each
            occurs in all training histories, and their features, as in a block of items.

        Raises:
            UserError: the shard is missing, its bytes are not those that were written, or not what the manifest says.
        """
        where = f"{self.location}/{block.shard} at byte {block.offset}"
        arrays = parse_block(self.read_bytes(block), where)
        find_problems = item_problems if block.split == "items" else user_problems
        for problem in find_problems(arrays, block, self.manifest):
            raise UserError(f"block {where}: {problem}; build the store again")
        return arrays

    def read_or_skip(self, block: Block) -> dict[str, np.ndarray] | None:
        """:meth:`read_block`; None for a damaged block if the store was opened with ``on_bad_shard: skip``.

        Raises:
            SourceError: the store cannot be reached; such a block is never skipped.
            UserError: the block is damaged, and damaged blocks are not to be skipped.
        """
        try:
            return self.read_block(block)
        except SourceError:
            raise
        except UserError:
            if not self.skips_damaged:
                raise
            return None

    def read_each(self, blocks: Sequence[Block]) -> Iterator[dict[str, np.ndarray] | None]:
        """:meth:`read_or_skip` for each block, in order; from a URL several are fetched at once, to hide its latency.

        Raises:
            UserError: a block cannot be read, and is not to be skipped; no more blocks are fetched.
        """
        if isinstance(self.files, LocalFiles):
            yield from map(self.read_or_skip, blocks)
        else:
            with ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="fetch") as pool:
                yield from pool.map(self.read_or_skip, blocks)

    def read_bytes(self, block: Block) -> bytes:
        """The checked byte range of ``block``."""
        where = f"block at byte {block.offset} of shard {self.location}/{block.shard}"
        mend = f"see python -m shards.verify {self.location}, then python -m shards.build --overwrite"
        if block.events:
            mend += ", or leave its users out by --store.on_bad_shard skip"
        if SHARD_NAME.fullmatch(block.shard) is None:
            raise UserError(f"{where}: no such shard; {mend}")
        try:
            return self.files.read_range(block.shard, block.offset, block.num_bytes, block.sha256)
        except FileNotFoundError:
            if isinstance(self.files, LocalFiles) and not (self.files.folder / MANIFEST_FILE).exists():
                raise SourceError(f"store {self.location} is gone; mount it again, then resume") from None
            raise UserError(f"{where}: no such shard; {mend}") from None
        except SourceError as error:
            raise SourceError(f"{where} {error}") from None
        except UserError as error:
            raise UserError(f"{where} {error}; {mend}") from None

    def item_bytes(self) -> int:
        """Length of all item shards that are there, in bytes."""

        def size(name: str) -> int:
            try:
                return self.files.size(name)
            except FileNotFoundError:
                return 0

        names = [shard.name for shard in self.manifest.shards if shard.name.startswith("items-")]
        with ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="size") as pool:
            return sum(pool.map(size, names))

    def read_table(self, name: str, checked: bool = True) -> bytes:
        """The bytes of the Parquet file of the vocabulary or of the users, its rows held against the manifest.

        Let pyarrow decode them with ``use_threads=False``. These bytes belong to Python: a thread of pyarrow's pool
        that still holds them while Python exits crashes the process (apache/arrow#34314).

        Args:
            name: of the file.
            checked: false for ``shards.verify``, which says itself what is wrong.

        Raises:
            UserError: it is missing, cannot be fetched, or its rows are not those that were written.
        """
        rows, file = self.manifest.tables[name], self.manifest.table_files.get(name, "")
        try:
            return self.files.read(name, partial(checked_table, name=name, rows=rows, file=file) if checked else bytes)
        except FileNotFoundError:
            raise UserError(f"store {self.location} has no {name}; build the store again") from None
        except UserError as error:
            raise UserError(f"store {self.location}: {error}") from None

    def read_fit(self, feature: str) -> bytes:
        """The file that holds what a feature was fitted to, held against the manifest.

        Raises:
            UserError: it is missing, cannot be fetched or is damaged.
        """
        name, expected = fit_file(feature), self.manifest.fits[feature]

        def checked(data: bytes) -> bytes:
            if hashlib.sha256(data).hexdigest() != expected:
                raise UserError(f"{name} is damaged: its sha256 is not the manifest's {expected[:12]}")
            return data

        try:
            return self.files.read(name, checked)
        except FileNotFoundError:
            raise UserError(f"store {self.location} has no {name}; build the store again") from None
        except UserError as error:
            raise UserError(f"store {self.location}: {error}; build the store again") from None


def require_users(store: Store, split: str) -> None:
    """Refuse a store without a user to evaluate.

    Raises:
        UserError: ``split`` has none.
    """
    rule = store.manifest.split_rule
    why = "all histories are shorter than 3 events" if rule == LEAVE_ONE_OUT else f"the split is {rule}"
    require(
        len(store.manifest.splits[split]) > 0,
        f"store {store.location} has no {split} users ({why}); build it from more events, or by another data.split",
    )


def check_lost_users(num_lost: int, num_users: int, split: str, store: Store) -> None:
    """Refuse to go on with what is left of a split.

    Raises:
        UserError: damaged blocks cost more than ``store.max_lost_share`` of its users, or all of them.
    """
    if num_lost == num_users or num_lost > store.max_lost_share * num_users:
        raise UserError(
            f"damaged blocks cost {num_lost:,} of {num_users:,} {split} users; expected at most "
            f"{store.max_lost_share:.0%} (store.max_lost_share): see python -m shards.verify {store.location}, then "
            "build the store again"
        )


def _check_memory(manifest: Manifest) -> None:
    """Refuse more users, or items that are not inline, than this machine could hold an id of."""
    for kind, count in (("users", manifest.num_users), ("items", 0 if manifest.inline else manifest.num_items)):
        if count * ROW_BYTES > memory_bytes():
            raise UserError(f"the manifest claims {count:,} {kind}, more than this machine's memory can hold")


def _open_files(path: str | Path, access: StoreConfig) -> StoreFiles:
    """The folder or URL behind ``path``."""
    if not is_url(str(path)):
        return LocalFiles(Path(path))
    url = checked_url(str(path))
    if url.lower().startswith("file://"):
        return LocalFiles(Path(url[len("file://") :]))
    cache = None
    if access.cache_gb > 0:
        cache = RangeCache(_cache_folder(access), round(access.cache_gb * 1e9))
    return RemoteFiles(url, access.timeout_s, access.retries, cache)


def _cache_folder(access: StoreConfig) -> Path:
    try:
        return Path(access.cache_dir or default_cache_folder(dict(os.environ))).expanduser()
    except RuntimeError:
        raise UserError(
            f"store.cache_dir is {access.cache_dir}, but there is no such home folder; write it out"
        ) from None
