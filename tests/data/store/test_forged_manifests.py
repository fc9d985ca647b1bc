"""Manifests that were forged and signed again, and files that are not manifests: refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.store.manifest import Manifest, manifest_sha256
from tests.fixtures.damaged_stores import is_refused_by_verify, outcome, write_files

pytestmark = [pytest.mark.filterwarnings("error::ResourceWarning"), pytest.mark.usefixtures("no_flush")]


MANIFEST_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pipe": lambda m: m["shards"][0].update(name="pipe:touch exploded"),
    "absolute": lambda m: m["items"][0].update(shard="/etc/passwd"),
    "parent": lambda m: m["items"][0].update(shard="../items-000000.tar"),
    "url": lambda m: m["items"][0].update(shard="http://127.0.0.1/items-000000.tar"),
    "other split": lambda m: m["splits"]["train"][0].update(m["splits"]["test"][0]),
    "overlap": lambda m: m["items"][1].update(m["items"][0]),
    "offset below 0": lambda m: m["items"][0].update(offset=-512),
    "offset 2^70": lambda m: m["items"][0].update(offset=2**70),
    "bytes 2^62": lambda m: m["items"][0].update(num_bytes=2**62),
    "bytes 2^62 everywhere": lambda m: [e.update(num_bytes=2**62) for e in (m["items"][0], m["shards"][0])],
    "bytes 0": lambda m: m["items"][0].update(num_bytes=0),
    "count 0": lambda m: m["items"][0].update(count=0),
    "float": lambda m: m["items"][0].update(offset=0.5),
    "nan": lambda m: m.update(num_items=math.nan),
    "bool": lambda m: m.update(num_items=True),
    "null": lambda m: m.update(num_items=None),
    "string": lambda m: m.update(num_items="40"),
    "many items": lambda m: m.update(num_items=10**15),
    "many users": lambda m: m.update(num_users=10**15),
    "list": lambda m: m.update(items={}),
    "splits": lambda m: m["splits"].pop("valid"),
    "extra": lambda m: m.update(extra=1),
    "feature twice": lambda m: m["features"].append(m["features"][0]),
    "feature path": lambda m: m["features"][0].update(name="../vector"),
    "feature dtype": lambda m: m["features"][0].update(dtype="object"),
    "feature dim": lambda m: m["features"][0].update(dim=7),
    # More than can be mapped: a table that only the disk refuses would fill it for a moment.
    "feature dim 10^13": lambda m: m["features"][0].update(dim=10**13),
    "shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "hash": lambda m: m["items"][0].update(sha256="../../etc/passwd"),
    "short hash": lambda m: m["items"][0].update(sha256="ab"),
    "version": lambda m: m.update(schema_version=99),
    "nested version": lambda m: m.update(schema_version=[[1]]),
    "tables": lambda m: m["tables"].update({"/etc/passwd": ""}),
    "recipe": lambda m: m["features"][0].update(recipe=None),
    "fits": lambda m: m.update(fits=[]),
    "fit of no feature": lambda m: m["fits"].update({"../vector": "0" * 64}),
    "fit's hash": lambda m: m["fits"].update({m["features"][0]["name"]: "../../etc/passwd"}),
    "no record": lambda m: m.update(built_from=None),
    "a part of the record": lambda m: m["built_from"].pop("files"),
    "another record": lambda m: m["built_from"]["keys"].update({"store.users_per_block": 1}),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES.values(), ids=MANIFEST_CHANGES)
def test_forged_manifests(change: Callable[[dict[str, Any]], Any], files: dict[str, bytes], tmp_path: Path) -> None:
    raw = json.loads(files["manifest.json"])
    del raw["sha256"]
    change(raw)
    text = json.dumps(raw | {"sha256": manifest_sha256(raw)})
    folder = write_files(tmp_path / "store", files | {"manifest.json": text.encode()})
    assert outcome(folder).startswith("refused: ")
    assert is_refused_by_verify(folder)


def claim_items(raw: dict[str, Any], count: int) -> None:
    """The last block of items holds ``count`` of them, in a shard that is long enough for their features."""
    block = raw["items"][-1]
    raw["num_items"] += count - block["count"]
    block["count"], block["num_bytes"] = count, 64 * count
    shard = next(shard for shard in raw["shards"] if shard["name"] == block["shard"])
    shard["num_bytes"] = block["offset"] + block["num_bytes"] + 1024


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (10**12, r"the manifest claims 1,000,000,0\d\d,\d{3} items, more than this machine's memory can hold"),
        (20_000_000, r"claims an item table of 44\d,\d{3},\d{3} bytes, but the item shards have \d{2},\d{3}; see"),
    ],
)
def test_a_catalogue_that_is_not_there_reserves_no_disk(
    count: int, message: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of the manifest agrees with the others."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("disk was reserved"))
    raw = json.loads(files["manifest.json"])
    del raw["sha256"]
    claim_items(raw, count)
    text = json.dumps(raw | {"sha256": manifest_sha256(raw)})
    folder = write_files(tmp_path / "store", files | {"manifest.json": text.encode()})
    assert re.search(message, outcome(folder, "items"))
    assert is_refused_by_verify(folder)


def test_a_table_larger_than_the_disk_is_not_begun(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "store", files)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    found = outcome(folder, "items")
    assert re.search(r"the item table takes \d+ bytes, but \S+ has 100 free; .* with --store.cache_dir", found)


SENSELESS = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"3",
    b"null",
    b"{}",
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b"1" * 10**5,
    b"NaN",
    b"\0" * 99,
]


@pytest.mark.parametrize("data", SENSELESS, ids=range(len(SENSELESS)))
def test_files_that_are_not_manifests(data: bytes, files: dict[str, bytes], tmp_path: Path) -> None:
    assert outcome(write_files(tmp_path / "store", files | {"manifest.json": data})).startswith("refused: ")


names = st.sampled_from([field.name for field in dataclasses.fields(Manifest)])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=9))


@settings(max_examples=60, deadline=None)
@given(anything)
def test_any_json_is_no_manifest(value: Any) -> None:
    with pytest.raises(UserError) as error:
        Manifest.from_json(json.dumps(value))
    assert "\n" not in str(error.value)
