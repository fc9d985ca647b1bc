"""Problems of a store: every byte is checked, and what hashes cannot show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrl_dist.data.store.manifest import Manifest, block_sha256
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from shards.store.problems import store_problems
from tests.fixtures.stores import all_blocks, tiny_config, write_raw
from tests.fixtures.tars import member, npy, tar_bytes, without_end

Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def test_notices_every_byte_of_every_shard(store: Store) -> None:
    """Including those after the last block, which no reader of blocks ever reads."""
    for shard in store.manifest.shards:
        path = store.path / shard.name
        whole = path.read_bytes()
        for place in range(3, len(whole), 1999):
            data = bytearray(whole)
            data[place] ^= 1
            path.write_bytes(data)
            assert any(shard.name in problem for problem in store_problems(store)), f"{shard.name} byte {place}"
        path.write_bytes(whole)
    assert list(store_problems(store)) == []


@pytest.mark.parametrize("tail", [b"", bytes(512), bytes(600) + b"x" + bytes(423)])
def test_checks_the_end_of_the_archive(store: Store, tail: bytes) -> None:
    """With hashes that agree: the bytes after the last block are none, too few, or not zero."""
    shard = store.manifest.shards[0]
    end = max(block.offset + block.num_bytes for block in all_blocks(store.manifest) if block.shard == shard.name)
    data = (store.path / shard.name).read_bytes()[:end] + tail
    (store.path / shard.name).write_bytes(data)
    signed = dataclasses.replace(shard, num_bytes=len(data), sha256=block_sha256(data))
    manifest = dataclasses.replace(store.manifest, shards=(signed, *store.manifest.shards[1:]))
    (problem,) = store_problems(Store(store.files, manifest))
    assert f"{shard.name}: the end-of-archive bytes after byte {end}" in problem


def forge(store: Store, split: str, **fields: np.ndarray) -> Store:
    """Replace fields of the split's first block, alone in its shard, and sign again: only the contents are wrong."""
    manifest = store.manifest
    blocks = list(manifest.items if split == "items" else manifest.splits[split])
    block = blocks[0]
    arrays = store.read_block(block) | fields
    data = tar_bytes(*((member(f"000000.{name}.npy"), npy(array)) for name, array in arrays.items()))
    sized = without_end(data)
    (store.path / block.shard).write_bytes(data)
    blocks[0] = dataclasses.replace(block, num_bytes=len(sized), sha256=block_sha256(sized))
    shards = tuple(
        dataclasses.replace(shard, num_bytes=len(data), sha256=block_sha256(data))
        if shard.name == block.shard
        else shard
        for shard in manifest.shards
    )
    change = {"items": tuple(blocks)} if split == "items" else {"splits": manifest.splits | {split: tuple(blocks)}}
    return Store(store.files, dataclasses.replace(manifest, shards=shards, **change))


def nan_in_vector(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"vector": np.where(np.arange(4) == 1, np.float16("nan"), arrays["vector"])}


def zeros_in_vector(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"vector": arrays["vector"] * (arrays["ids"] != arrays["ids"][1])[:, None]}


def without_last_block(manifest: Manifest, split: str) -> dict[str, Any]:
    return {"splits": manifest.splits | {split: manifest.splits[split][:-1]}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: {"num_events": m.num_events + 1}, "do not add up to the manifest's 16"),
        (lambda m: {"features": (dataclasses.replace(m.features[0], present=5),)}, "vector: 6 items have it"),
        (lambda m: without_last_block(m, "train"), "train: 2 of 4 users are in no block"),
        (lambda m: without_last_block(m, "test"), "valid and test do not hold the same users"),
        (lambda m: {"tables": m.tables | {"vocab.parquet": "0" * 64}}, "vocab.parquet: its rows are not those"),
        (lambda m: {"shards": (dataclasses.replace(m.shards[0], count=3), *m.shards[1:])}, "not what its entry says"),
    ],
)
def test_compares_the_manifest_with_what_is_there(
    store: Store, change: Callable[[Manifest], dict[str, Any]], problem: str
) -> None:
    manifest = dataclasses.replace(store.manifest, **change(store.manifest))
    problems = list(store_problems(Store(store.files, manifest)))
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize(
    ("split", "change", "problem"),
    [
        ("items", nan_in_vector, r"vector of item \d holds NaN"),
        ("items", zeros_in_vector, r"vector of item \d is all zero, though the item is said to have it"),
        ("items", lambda a: {"vector": a["vector"].astype(np.float32)}, "vector is float32"),
        ("items", lambda a: {"vector": a["vector"][:, :3]}, r"vector is float16 \[2, 3\], expected float16 \[2, 4\]"),
        ("items", lambda a: {"ids": a["ids"][[0, 0]]}, "not in exactly one block"),
        ("items", lambda a: {"ids": a["ids"] + 6}, "item ids outside 0 ... 5"),
        ("items", lambda a: {"extra": a["ids"]}, "fields"),
        ("train", lambda a: {"starts": a["starts"][::-1].copy()}, "starts do not rise"),
        ("train", lambda a: {"items": a["items"] - 6}, "item ids outside 0 ... 5"),
        ("train", lambda a: {"items": (a["items"] + 1) % 6}, "train_count is not what the train blocks hold"),
        ("train", lambda a: {"users": a["users"] * 0}, "train block 0 .* occurs twice in train"),
        ("train", lambda a: {"users": a["users"] + 2}, "train block 1 .* occurs twice in train"),
        ("test", lambda a: {"users": a["users"] + 9}, "user ids outside 0 ... 3"),
    ],
)
def test_looks_past_the_hashes(tmp_path: Path, split: str, change: Change, problem: str) -> None:
    write_raw(tmp_path / "raw")
    config = tiny_config(tmp_path / "raw", tmp_path / "store")
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, blocks_per_shard=1))
    store = build_store(config)[0]
    block = store.manifest.items[0] if split == "items" else store.manifest.splits[split][0]
    changed = change(store.read_block(block))
    store = forge(store, split)
    assert list(store_problems(store)) == []
    problems = list(store_problems(forge(store, split, **changed)))
    assert any(re.search(problem, line) for line in problems), problems
