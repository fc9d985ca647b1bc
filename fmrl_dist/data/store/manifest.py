"""The manifest of a shard store: its schema, and the checks before anything in it is trusted.

A store is a folder of plain tar shards with a ``manifest.json`` that indexes every block (one tar sample) by shard,
byte range and sha256. ``docs/format.md`` describes the files; ``shards.build`` writes them and
:mod:`fmrl_dist.data.store.reader` reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Set
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import json_sha256
from fmrl_dist.config.data_section import FEATURE_NAME
from fmrl_dist.data.store.built_from import BuiltFrom
from fmrl_dist.data.store.cache import SHA256

SCHEMA_VERSION = 3
# Version 2 has no recipe of a feature, no fits and no built_from.
WITHOUT_RECORD = 2
# Version 4 is version 3 with another split than leave-one-out, and says which: no older program mistakes it.
WITH_SPLIT_RULE = 4
LEAVE_ONE_OUT = "leave-one-out"
MANIFEST_FILE = "manifest.json"
VOCAB_FILE = "vocab.parquet"
USERS_FILE = "users.parquet"
SPLITS = ("train", "valid", "test")
ROW_BYTES = 8  # of an id: every item, user or event takes at least as many
SHARD_NAME = re.compile(r"[a-z]+-\d{6}\.tar", re.ASCII)

CODES = "pq"  # source of features that are codes
UNHASHED = ("sha256", "built_from", "table_files")  # what names no store

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

    @property
    def split(self) -> str:
        """items, train, valid or test."""
        return self.shard.partition("-")[0]


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
    revision: str  # of the encoder's weights or code, or the sha256 of the array that it was taken from
    present: int  # items that have it
    masked: bool  # blocks carry "<name>.mask", because some items lack it
    # with the revision, all that makes a row of an item's text or image: source, settings, precision; None: unrecorded
    recipe: dict[str, Any] | None = None

    @property
    def num_codes(self) -> int:
        """Of a feature of codes (source ``pq``), how many a code can be; 0 for vectors."""
        recipe = self.recipe or {}
        codes = recipe.get("codes")
        return codes if recipe.get("source") == CODES and isinstance(codes, int) else 0

    @property
    def codes_of(self) -> str:
        """The feature that it is codes of; "" for vectors."""
        return str((self.recipe or {}).get("of", "")) if self.num_codes else ""


@dataclass(frozen=True)
class Manifest:
    """Index of a store. Two stores with the same ``sha256`` hold the same bytes in their shards.

    ``num_events`` counts the whole histories of the ``num_users`` users that were kept; ``num_dropped_users`` are in no
    split: with leave-one-out, they had fewer than 2 events.
    ``tables`` maps each Parquet file to the digest of its rows, ``fits`` each feature that was fitted to
    its items to the sha256 of :func:`fit_file`. ``built_from`` has a hash of its own: other tables can give the same
    store. ``table_files`` maps each Parquet file to its sha256, which depends on its writer and so names no store.
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
    fits: dict[str, str]
    built_from: BuiltFrom | None  # None in a store of schema version 2
    table_files: dict[str, str] = field(default_factory=dict)  # empty in a store of an older version
    split_rule: str = LEAVE_ONE_OUT  # in words

    @cached_property
    def sha256(self) -> str:
        """:func:`manifest_sha256` of this manifest: it names the store."""
        return manifest_sha256(self._raw())

    def to_json(self) -> str:
        return json.dumps(self._raw() | {"sha256": self.sha256}, indent=1, sort_keys=True) + "\n"

    def _raw(self) -> dict[str, Any]:
        raw = asdict(self)
        if not self.table_files:
            del raw["table_files"]
        if self.schema_version != WITH_SPLIT_RULE:
            del raw["split_rule"]
        if self.schema_version == WITHOUT_RECORD:
            del raw["fits"], raw["built_from"]
            for feature in raw["features"]:
                del feature["recipe"]
        elif self.built_from is not None:
            raw["built_from"]["sha256"] = self.built_from.sha256
        return raw

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            UserError: not a manifest, another schema version, changed since it was written, or inconsistent.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the manifest is not JSON ({error}); build the store again") from None
        if not isinstance(raw, dict) or "schema_version" not in raw:
            raise UserError("the manifest has no schema_version; expected the manifest.json that shards.build writes")
        if raw["schema_version"] not in (WITHOUT_RECORD, SCHEMA_VERSION, WITH_SPLIT_RULE):
            raise UserError(
                f"the store has schema version {raw['schema_version']!r}, this program reads versions {WITHOUT_RECORD} "
                f"to {WITH_SPLIT_RULE}; build the store again with python -m shards.build --overwrite"
            )
        claimed = raw.pop("sha256", None)
        if claimed != manifest_sha256(raw):
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


def manifest_sha256(raw: dict[str, Any]) -> str:
    """Hash of a manifest's canonical JSON without this hash, ``built_from`` and ``table_files``."""
    return json_sha256({key: value for key, value in raw.items() if key not in UNHASHED})


def dropped_why(split_rule: str) -> str:
    """Why a split leaves users out of a store."""
    return "fewer than 2 events" if split_rule == LEAVE_ONE_OUT else "no event to train on or to predict"


def fit_file(feature: str) -> str:
    """Name of the file that holds what a feature was fitted to."""
    return f"fit-{feature}.safetensors"


def block_sha256(data: bytes) -> str:
    """Hash of a block's whole byte range, tar headers and padding included."""
    return hashlib.sha256(data).hexdigest()


def _parse_manifest(raw: dict[str, Any]) -> Manifest:
    missing = ({"table_files"} - raw.keys()) | ({"split_rule"} if raw["schema_version"] != WITH_SPLIT_RULE else set())
    if raw["schema_version"] == WITHOUT_RECORD:
        values = dict(_check_fields(Manifest, raw, "manifest", missing | {"fits", "built_from"}))
        values |= {"fits": {}, "built_from": None}
        values["features"] = _parse_list(Feature, values["features"], "features", {"recipe"})
    else:
        values = dict(_check_fields(Manifest, raw, "manifest", missing))
        values["built_from"] = BuiltFrom.from_raw(values["built_from"])
        values["features"] = _parse_list(Feature, values["features"], "features")
    splits, tables = values["splits"], values["tables"]
    if not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise UserError(f"the manifest's splits are not {', '.join(SPLITS)}")
    if not isinstance(tables, dict) or set(tables) != {VOCAB_FILE, USERS_FILE}:
        raise UserError(f"the manifest's tables are not {VOCAB_FILE}, {USERS_FILE}")
    files = values.get("table_files", {})
    if not isinstance(files, dict) or not all(type(value) is str for pair in files.items() for value in pair):
        raise UserError("the manifest's table_files are not hashes by file; build the store again")
    values["items"] = _parse_list(Block, values["items"], "items")
    values["shards"] = _parse_list(Shard, values["shards"], "shards")
    values["splits"] = {name: _parse_list(Block, splits[name], f"splits.{name}") for name in SPLITS}
    return Manifest(**values)


def _parse_list(kind: type[T], raw: Any, where: str, without: Set[str] = frozenset()) -> tuple[T, ...]:
    if not isinstance(raw, list):
        raise UserError(f"the manifest's {where} is not a list")
    return tuple(kind(**_check_fields(kind, value, f"{where}[{i}]", without)) for i, value in enumerate(raw))


def _check_fields(kind: type, raw: Any, where: str, without: Set[str] = frozenset()) -> dict[str, Any]:
    """``raw`` if it has exactly the fields of dataclass ``kind``, with scalars of their types and not negative.

    Fields of ``without`` are those that an older version does not have.
    """
    names = {f.name: f.type for f in fields(kind) if f.name not in without}
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
    """Refuse names that could leave the folder, blocks outside their shard, and totals that do not agree."""
    if not isinstance(manifest.fits, dict) or not all(
        isinstance(sha256, str) and SHA256.fullmatch(sha256) for sha256 in manifest.fits.values()
    ):
        raise UserError("the manifest's fits are not hashes by feature; build the store again")
    unknown = manifest.fits.keys() - {feature.name for feature in manifest.features}
    if unknown:
        raise UserError(f"the manifest has a fit of {min(unknown)[:60]!r}, which is none of its features")
    for feature in manifest.features:
        if manifest.schema_version != WITHOUT_RECORD and not isinstance(feature.recipe, dict):
            raise UserError(f"the manifest's feature {feature.name[:60]!r} has no recipe; build the store again")
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
    row_bytes = ROW_BYTES + sum(2 * feature.dim + feature.masked for feature in manifest.features)
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
            if split == "items" and block.count * row_bytes > block.num_bytes:
                raise UserError(
                    f"the manifest's item block at byte {block.offset} of {block.shard!r} has {block.count} rows of "
                    f"{row_bytes} bytes in {block.num_bytes} bytes; build the store again"
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
    }
    users = {split: sum(block.count for block in blocks) for split, blocks in manifest.splits.items()}
    if manifest.schema_version == WITH_SPLIT_RULE:
        if max(users.values()) > manifest.num_users or sum(users.values()) < manifest.num_users:
            raise UserError(f"the manifest's num_users is {manifest.num_users} but its splits hold {users}")
    else:
        totals |= {"num_users": (manifest.num_users, users["train"]), "valid users": (users["valid"], users["test"])}
    for name, (claimed, found) in totals.items():
        if claimed != found:
            raise UserError(f"the manifest's {name} is {claimed} but its blocks hold {found}")
