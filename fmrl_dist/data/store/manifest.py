"""The shard store as both sides see it: the manifest's schema, and a reader of one block.

A store is a folder of plain tar shards with a ``manifest.json`` that indexes every block (one tar sample) by shard,
byte range and sha256. A reader therefore fetches exactly the blocks it wants, checks them before it parses them, and
never scans a shard. ``docs/format.md`` describes the files; ``shards.build`` writes them.

Shards are opened by checked plain file names, in a folder or at a URL (:mod:`fmrl_dist.data.store_files`), and parsed
from memory: handing a manifest's name to webdataset's ``gopen`` would let a manifest that says ``pipe:...`` run a
shell. Arrays are read without pickle.

Cost: one open (or request), one read and one sha256 (about 1 GB/s) per block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fmrl_dist.config import FEATURE_NAME, StoreConfig
from fmrl_dist.data.block_arrays import item_problems, parse_block, user_problems
from fmrl_dist.data.cache import SHA256, RangeCache
from fmrl_dist.data.remote import RemoteFiles, checked_url, default_cache_folder
from fmrl_dist.data.store_files import LocalFiles, SourceError, StoreFiles
from fmrl_dist.errors import UserError
from fmrl_dist.files import json_sha256
from fmrl_dist.urls import is_url

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
VOCAB_FILE = "vocab.parquet"
USERS_FILE = "users.parquet"
SPLITS = ("train", "valid", "test")
ROW_BYTES = 8  # of an id: the least that an item, a user or an event takes
FETCHED_AT_ONCE = 8  # blocks, from a URL
SHARD_NAME = re.compile(r"[a-z]+-\d{6}\.tar", re.ASCII)

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """One tar sample: a run of items, or of users with their histories."""

    shard: str  # file name of the tar that holds it
    offset: int  # bytes before its first tar header
    num_bytes: int  # headers and padding included
    sha256: str  # of that byte range
    count: int  # items or users in it
    events: int  # sum of its histories' lengths; 0 for items


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    num_bytes: int  # end-of-archive blocks included
    sha256: str  # of the whole file
    samples: int  # blocks in it
    count: int  # items or users in it
    events: int


@dataclass(frozen=True)
class Feature:
    """One frozen item feature."""

    name: str
    dim: int
    dtype: str  # "float16"
    encoder: str  # what made it
    revision: str  # which version of that, or the sha256 of the array it was taken from
    present: int  # items that have it
    masked: bool  # blocks carry "<name>.mask", since some items lack it


@dataclass(frozen=True)
class Manifest:
    """Index of a store. Two stores with the same ``sha256`` hold the same bytes in their shards.

    ``num_events`` counts the whole histories of the ``num_users`` users kept; ``num_dropped_users`` had fewer than 2
    events. ``tables`` maps each Parquet file to the digest of its rows.
    """

    schema_version: int
    num_items: int
    num_users: int
    num_dropped_users: int
    num_events: int
    inline: bool  # user blocks carry the features of their items
    features: tuple[Feature, ...]
    items: tuple[Block, ...]
    splits: dict[str, tuple[Block, ...]]  # train, valid, test
    shards: tuple[Shard, ...]
    tables: dict[str, str]

    @cached_property
    def sha256(self) -> str:
        """Hash of the manifest's canonical JSON without this field."""
        return json_sha256(asdict(self))

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"sha256": self.sha256}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            UserError: not a manifest, another schema version, changed since it was written, or not consistent.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the manifest is not JSON ({error}); build the store again") from None
        if not isinstance(raw, dict) or "schema_version" not in raw:
            raise UserError("the manifest has no schema_version; expected the manifest.json that shards.build writes")
        if raw["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"the store has schema version {raw['schema_version']!r}, this program reads version {SCHEMA_VERSION}; "
                "build the store again with python -m shards.build --overwrite"
            )
        claimed = raw.pop("sha256", None)
        if claimed != json_sha256(raw):
            raise UserError(
                f"the manifest was changed after it was written (sha256 is not {claimed}); build the store again"
            )
        manifest = _parse_manifest(raw)
        _check_consistency(manifest)
        return manifest

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """:meth:`from_json` of a file's bytes."""
        try:
            return cls.from_json(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{MANIFEST_FILE} is not UTF-8; build the store again") from None


class Store:
    """A built store, open for reading."""

    def __init__(self, files: StoreFiles, manifest: Manifest, access: StoreConfig | None = None) -> None:
        self.files = files
        self.manifest = manifest
        self._access = access or StoreConfig()

    @property
    def location(self) -> str:
        """The store's folder or URL, as it may be shown and recorded: without credentials."""
        return self.files.location

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        if not isinstance(self.files, LocalFiles):
            raise UserError(f"store {self.location} is no local folder; copy it to one")
        return self.files.folder

    @property
    def skips_damaged(self) -> bool:
        """Whether users of damaged blocks are left out; else damage ends the run."""
        return self._access.on_bad_shard == "skip"

    @property
    def derived_folder(self) -> Path:
        """Where what is made of this store once is kept, under names that carry the manifest's hash."""
        if not self._access.cache_dir and isinstance(self.files, LocalFiles):
            beside = Path(f"{self.files.folder}.derived")
            if os.access(beside if beside.exists() else beside.parent, os.W_OK):
                return beside
        return _cache_folder(self._access)

    @classmethod
    def open(cls, path: str | Path, access: StoreConfig | None = None) -> Store:
        """Read the manifest of the store at ``path``.

        Args:
            path: a folder or a URL (http, https, s3, gs, file, memory).
            access: how to read from a URL (time, tries, cache), and what to do about damage. Its own ``path`` is not
                looked at.

        Raises:
            UserError: nothing is there, it is not a store, or its manifest is refused.
        """
        access = access or StoreConfig()
        files = _open_files(path, access)
        if isinstance(files, LocalFiles) and not files.folder.is_dir():
            raise UserError(
                f"store {files.location} does not exist; build it with python -m shards.build --config CONFIG"
            )
        try:
            return cls(files, files.read(MANIFEST_FILE, Manifest.from_bytes), access)
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
            stands in all training histories, and their features as of items.

        Raises:
            UserError: the shard is missing, its bytes are not those that were written, or not what the manifest says.
        """
        where = f"{self.location}/{block.shard} at byte {block.offset}"
        arrays = parse_block(self.read_bytes(block), where)
        kind, manifest = block.shard.partition("-")[0], self.manifest
        features = {feature.name: (feature.dim, feature.masked) for feature in manifest.features}
        if kind == "items":
            problems = item_problems(arrays, block.count, features, manifest.num_items)
        else:
            sizes = (manifest.num_users, manifest.num_items)
            inline = features if manifest.inline else None
            problems = user_problems(arrays, block.count, block.events, kind, *sizes, inline)
        for problem in problems:
            raise UserError(f"block {where}: {problem}; build the store again")
        return arrays

    def read_or_skip(self, block: Block) -> dict[str, np.ndarray] | None:
        """:meth:`read_block`; None of a damaged block where the store was opened with ``on_bad_shard: skip``.

        Raises:
            SourceError: the store cannot be reached, whatever is asked for damaged blocks.
            UserError: the block is damaged, and not to be skipped.
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
        """:meth:`read_or_skip` of each block, in order; from a URL several are fetched at once, to hide its latency.

        Raises:
            UserError: a block cannot be read, and is not to be skipped; no further ones are fetched.
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
                raise SourceError(f"store {self.location} is gone; mount it again, then go on") from None
            raise UserError(f"{where}: no such shard; {mend}") from None
        except SourceError as error:
            raise SourceError(f"{where} {error}") from None
        except UserError as error:
            raise UserError(f"{where} {error}; {mend}") from None

    def read_table(self, name: str) -> bytes:
        """The Parquet file of the vocabulary or of the users, as it is.

        Let pyarrow decode it with ``use_threads=False``: a thread of its pool that still holds these bytes, which are
        Python's, while Python ends takes the process down (apache/arrow#34314).

        Raises:
            UserError: it is missing or cannot be fetched.
        """
        try:
            return self.files.read(name, bytes)
        except FileNotFoundError:
            raise UserError(f"store {self.location} has no {name}; build the store again") from None
        except UserError as error:
            raise UserError(f"store {self.location}: {error}") from None


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
    return Path(access.cache_dir or default_cache_folder(dict(os.environ))).expanduser()


def block_sha256(data: bytes) -> str:
    """Hash of a block's whole byte range, tar headers and padding included."""
    return hashlib.sha256(data).hexdigest()


def _parse_manifest(raw: dict[str, Any]) -> Manifest:
    values = dict(_check_fields(Manifest, raw, "manifest"))
    splits, tables = values["splits"], values["tables"]
    if not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise UserError(f"the manifest's splits are not {', '.join(SPLITS)}")
    if not isinstance(tables, dict) or set(tables) != {VOCAB_FILE, USERS_FILE}:
        raise UserError(f"the manifest's tables are not {VOCAB_FILE}, {USERS_FILE}")
    values["features"] = _parse_list(Feature, values["features"], "features")
    values["items"] = _parse_list(Block, values["items"], "items")
    values["shards"] = _parse_list(Shard, values["shards"], "shards")
    values["splits"] = {name: _parse_list(Block, splits[name], f"splits.{name}") for name in SPLITS}
    return Manifest(**values)


def _parse_list(kind: type[T], raw: Any, where: str) -> tuple[T, ...]:
    if not isinstance(raw, list):
        raise UserError(f"the manifest's {where} is not a list")
    return tuple(kind(**_check_fields(kind, value, f"{where}[{i}]")) for i, value in enumerate(raw))


def _check_fields(kind: type, raw: Any, where: str) -> dict[str, Any]:
    """``raw`` if it has exactly the fields of dataclass ``kind``, its scalars of their types and not negative."""
    names = {f.name: f.type for f in fields(kind)}
    if not isinstance(raw, dict) or set(raw) != set(names):
        raise UserError(f"the manifest's {where} does not have the fields {', '.join(names)}")
    scalars = {"int": int, "str": str, "bool": bool}
    for name, annotation in names.items():
        expected = scalars.get(str(annotation))
        if expected is None:
            continue
        if type(raw[name]) is not expected or (expected is int and not 0 <= raw[name] < 2**63):
            raise UserError(f"the manifest's {where}.{name} is {str(raw[name])[:60]!r}; expected {expected.__name__}")
    return raw


def _check_consistency(manifest: Manifest) -> None:
    """Refuse names that could leave the folder, blocks outside their shard, and sums that do not agree."""
    for feature in manifest.features:
        if FEATURE_NAME.fullmatch(feature.name) is None or feature.dtype != "float16":
            raise UserError(
                f"the manifest's feature {feature.name!r} of {feature.dtype} is not known; expected float16"
            )
    shards = {shard.name: shard for shard in manifest.shards}
    names = [feature.name for feature in manifest.features]
    for kind, several in (("features", names), ("shards", [shard.name for shard in manifest.shards])):
        if len(set(several)) < len(several):
            raise UserError(f"the manifest names one of its {kind} twice; build the store again")
    for name in shards:
        if SHARD_NAME.fullmatch(name) is None:
            raise UserError(f"the manifest names shard {name!r}; expected a plain file name such as train-000000.tar")
    ends = dict.fromkeys(shards, 0)
    for split, blocks in {"items": manifest.items, **manifest.splits}.items():
        for block in blocks:
            if block.offset != ends.get(block.shard, block.offset) or (split == "items" and block.events):
                raise UserError(
                    f"the manifest's {split} block at byte {block.offset} of {block.shard!r} does not follow the one "
                    "before it, or has events though it holds items; build the store again"
                )
            ends[block.shard] = block.offset + block.num_bytes
            if SHA256.fullmatch(block.sha256) is None:  # names a file of the cache
                raise UserError(f"the manifest's {split} block has sha256 {block.sha256!r}; expected 64 hex digits")
            if not 0 < block.count <= block.num_bytes // ROW_BYTES or block.events > block.num_bytes // ROW_BYTES:
                raise UserError(
                    f"the manifest's {split} block at byte {block.offset} of {block.shard!r} has {block.count} rows, "
                    f"{block.events} events in {block.num_bytes} bytes; expected at least 1 row, of {ROW_BYTES} bytes"
                )
            shard = shards.get(block.shard)
            if (
                shard is None
                or not block.shard.startswith(f"{split}-")
                or block.offset + block.num_bytes > shard.num_bytes
            ):
                raise UserError(
                    f"the manifest's {split} block at byte {block.offset} of {block.shard!r} is in no such shard"
                )
    totals = {
        "num_items": (manifest.num_items, sum(block.count for block in manifest.items)),
        "num_users": (manifest.num_users, sum(block.count for block in manifest.splits["train"])),
        "valid users": (sum(b.count for b in manifest.splits["valid"]), sum(b.count for b in manifest.splits["test"])),
    }
    for name, (claimed, found) in totals.items():
        if claimed != found:
            raise UserError(f"the manifest's {name} is {claimed} but its blocks hold {found}")
