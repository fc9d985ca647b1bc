"""Blocks that were forged and signed again: their hashes agree, only their structure is wrong. All are refused."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrl_dist.data.store.manifest import SPLITS, manifest_sha256
from fmrl_dist.data.store.reader import Store
from tests.fixtures.damaged_stores import is_refused_by_verify, outcome, write_files

pytestmark = [pytest.mark.filterwarnings("error::ResourceWarning"), pytest.mark.usefixtures("no_flush")]


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


def header(text: str) -> bytes:
    """A version 1.0 header of any text, and no data."""
    padded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


PLAIN = "{'descr': '<i8', 'fortran_order': False, 'shape': "

Change = Callable[[dict[str, np.ndarray]], dict[str, Any]]  # of fields: an array, or a member's bytes

EVERY: dict[str, Change] = {
    "a field is missing": lambda a: {next(iter(a)): None},
    "an unknown field": lambda a: {"extra": np.arange(3)},
    "a member that is no array": lambda a: {next(iter(a)): b"PK\x03\x04"},
    "an empty member": lambda a: {next(iter(a)): b""},
    "a cut array": lambda a: {next(iter(a)): npy(next(iter(a.values())))[:-1]},
    "a longer array": lambda a: {next(iter(a)): npy(next(iter(a.values()))) + b"x"},
    "version 2.0": lambda a: {next(iter(a)): npy(next(iter(a.values())), (2, 0))},
    "a header of a huge shape": lambda a: {next(iter(a)): header(f"{PLAIN}(9223372036854775807,)" + "}")},
    "a header of a shape below 0": lambda a: {next(iter(a)): header(f"{PLAIN}(-1,)" + "}")},
    "a header that is code": lambda a: {next(iter(a)): header("__import__('os').abort()")},
    "a header of nested brackets": lambda a: {next(iter(a)): header("(" * 900 + ")" * 900)},
    "a header without a shape": lambda a: {next(iter(a)): header("{'descr': '<i8'}")},
    "complex numbers": lambda a: {next(iter(a)): next(iter(a.values())).astype(complex)},
    "strings": lambda a: {next(iter(a)): np.array(["a"])},
    "big-endian numbers": lambda a: {next(iter(a)): next(iter(a.values())).astype(">i8")},
    "a scalar": lambda a: {next(iter(a)): np.int64(3)},
}
ITEMS: dict[str, Change] = {
    "ids of int32": lambda a: {"ids": a["ids"].astype(np.int32)},
    "an id below 0": lambda a: {"ids": np.where(a["ids"] == a["ids"][0], -1, a["ids"])},
    "an id above all": lambda a: {"ids": np.where(a["ids"] == a["ids"][0], 40, a["ids"])},
    "an id twice": lambda a: {"ids": np.where(a["ids"] == a["ids"][0], a["ids"][1], a["ids"])},
    "features of float32": lambda a: {"vector": a["vector"].astype(np.float32)},
    "features in Fortran order": lambda a: {"vector": np.asfortranarray(a["vector"])},
    "features of another dim": lambda a: {"vector": a["vector"][:, 1:]},
    "a NaN": lambda a: {"vector": np.where(a["vector"] == a["vector"][0, 0], np.float16("nan"), a["vector"])},
    "an infinity": lambda a: {"colour": np.where(a["colour"] == a["colour"][0, 0], np.float16("inf"), a["colour"])},
    "a mask that nobody promised": lambda a: {"vector.mask": np.ones(len(a["ids"]), bool)},
    "fewer items": lambda a: {name: array[1:] for name, array in a.items()},
    "no items": lambda a: {name: array[:0] for name, array in a.items()},
}
USERS: dict[str, Change] = {
    "starts in two dimensions": lambda a: {"starts": a["starts"][:, None]},
    "starts that fall": lambda a: {"starts": a["starts"][::-1]},
    "starts from 1": lambda a: {"starts": np.concatenate(([1], a["starts"][1:]))},
    "starts past the end": lambda a: {"starts": np.concatenate((a["starts"][:-1], [a["starts"][-1] + 1]))},
    "starts short of the end": lambda a: {"starts": np.concatenate((a["starts"][:-1], [a["starts"][-1] - 1]))},
    "a start missing": lambda a: {"starts": a["starts"][:-1]},
    "an empty history": lambda a: {"starts": np.concatenate(([0, 0], a["starts"][2:]))},
    "floating starts": lambda a: {"starts": a["starts"].astype(float)},
    "an item below 0": lambda a: {"items": np.where(a["items"] == a["items"][0], -1, a["items"])},
    "an item above all": lambda a: {"items": np.where(a["items"] == a["items"][0], 40, a["items"])},
    "items of int32": lambda a: {"items": a["items"].astype(np.int32)},
    "an item missing": lambda a: {"items": a["items"][:-1]},
    "a user below 0": lambda a: {"users": np.where(a["users"] == a["users"][0], -1, a["users"])},
    "a user above all": lambda a: {"users": np.where(a["users"] == a["users"][0], 113, a["users"])},
    "a user twice": lambda a: {"users": np.where(a["users"] == a["users"][0], a["users"][1], a["users"])},
    "times of too few events": lambda a: {"times": a["items"][:-1]},
    "no users": lambda a: {"users": a["users"][:0], "starts": a["starts"][:1], "items": a["items"][:0]},
}
ODD_NAMES = [
    "../000000.ids.npy",
    "/etc/000000.ids.npy",
    "000000.ids.pkl",
    "000000.ids.pyd",
    "000000.ids",
    "x",
    "000000.IDS.npy",
]
ODD_TYPES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"7", b"S"]


def forge(store: Store, split: str, number: int, tar: bytes, claims: dict[str, int] | None = None) -> dict[str, bytes]:
    """Shard and manifest of a store whose block was replaced by ``tar`` and signed; ``claims`` replace its counts."""
    raw = json.loads(store.manifest.to_json())
    del raw["sha256"]
    entries = raw["items"] if split == "items" else raw["splits"][split]
    entry = entries[number]
    data = tar.rstrip(b"\0")
    data += bytes(-len(data) % 512)
    path = store.path / entry["shard"]
    old = path.read_bytes()
    begin, end = entry["offset"], entry["offset"] + entry["num_bytes"]
    new = old[:begin] + data + old[end:]
    for other in entries:
        if other["shard"] == entry["shard"] and other["offset"] > begin:
            other["offset"] += len(data) - (end - begin)
    entry |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | (claims or {})
    (shard,) = (shard for shard in raw["shards"] if shard["name"] == entry["shard"])
    shard |= {"num_bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    return {path.name: new, "manifest.json": json.dumps(raw | {"sha256": manifest_sha256(raw)}).encode()}


def tar_of(members: list[tuple[str, bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members_of(arrays: dict[str, Any]) -> list[tuple[str, bytes, bytes]]:
    return [
        (f"000000.{name}.npy", tarfile.REGTYPE, value if isinstance(value, bytes) else npy(np.asarray(value)))
        for name, value in arrays.items()
        if value is not None
    ]


def forgeries(arrays: dict[str, np.ndarray], changes: dict[str, Change], trap: Path) -> Iterator[tuple[str, bytes]]:
    """What was done to a block, and its tar; unpickling creates the file ``trap``."""
    for what, change in changes.items():
        yield what, tar_of(members_of(arrays | change(arrays)))
    yield "a pickle", tar_of(members_of(arrays | {next(iter(arrays)): np.array([Bomb(trap)], object)}))
    for name in ODD_NAMES:
        yield name, tar_of([*members_of(arrays), (name, tarfile.REGTYPE, npy(np.arange(3)))])
    (first, _, _), *others = members_of(arrays)
    for kind in ODD_TYPES:
        yield f"type {kind!r}", tar_of([(first, kind, b""), *others])
    tar = bytearray(tar_of(members_of(arrays)))
    tar[124:135], tar[148:156] = b"77777777777", b" " * 8  # a member of 8 GiB
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    yield "oversize", bytes(tar)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("split", ["items", *SPLITS])
def test_forged_blocks(split: str, number: int, shop: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    store = Store.open(shop.parent / "store")
    block = (store.manifest.items if split == "items" else store.manifest.splits[split])[number]
    arrays = store.read_block(block)

    def check(what: str, forged: dict[str, bytes]) -> None:
        folder = write_files(tmp_path / "store", files | forged)
        assert outcome(folder, split).startswith("refused: "), f"{what}: accepted"
        assert is_refused_by_verify(folder), f"{what}: verify accepts it"

    sound = tar_of(members_of(arrays))
    folder = write_files(tmp_path / "store", files | forge(store, split, number, sound))
    assert not outcome(folder).startswith("refused: ") and not is_refused_by_verify(folder)
    for claim in ("count", "events"):
        check(f"other {claim}", forge(store, split, number, sound, {claim: getattr(block, claim) + 1}))
    trap = tmp_path / "unpickled"
    for what, tar in forgeries(arrays, EVERY | (ITEMS if split == "items" else USERS), trap):
        check(what, forge(store, split, number, tar))
        assert not trap.exists(), what
