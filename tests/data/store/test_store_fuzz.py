"""Hundreds of damaged, forged and senseless stores and configs: refused in one line, or read as what they were.

Never another exception, a hang, or data that nobody wrote. Two kinds of damage: bytes that changed under a manifest
that did not, where the hashes tell; and stores that somebody signed again, where only the structure can.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist import train
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import json_sha256
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.manifest import SPLITS, Manifest
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from shards.store.problems import store_problems
from tests.fixtures.training import make_shop, refusal, run_module

DAMAGED, FORGED_ROUNDS = 250, 3

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def files(shop: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (shop.parent / "store").iterdir()}


@pytest.fixture(scope="module")
def expected(shop: Path) -> str:
    return everything(shop.parent / "store")


def everything(folder: Path) -> str:
    """Hash of all that training and evaluation read of a store."""
    store, digest = Store.open(folder), hashlib.sha256()
    table = load_item_table(store, None)
    arrays = [table.values.numpy(), table.present.numpy()]
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    stream = TrainStream(store, order, WindowRule(50, "all", True))
    for step in range(order.steps_per_epoch):
        batch = stream.batch(0, step, range(16))
        arrays += [tensor.numpy() for tensor in batch.tensors.values()]
    for split in ("valid", "test"):
        for block in evaluation_blocks(store, split, 50, range(len(store.manifest.splits[split]))):
            arrays += [tensor.numpy() for tensor in block.tensors.values()]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def outcome(folder: Path) -> str:
    """What reading everything comes to: its hash, or the one line with which it is refused."""
    try:
        return everything(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
        return f"refused: {error}"


def is_refused_by_verify(folder: Path) -> bool:
    try:
        problems = list(store_problems(Store.open(folder)))
    except UserError as error:
        problems = [str(error)]
    assert not any("\n" in problem for problem in problems)
    return bool(problems)


def damage(files: dict[str, bytes], generator: np.random.Generator) -> tuple[str, dict[str, bytes]]:
    """One file changed, and what was done to it."""
    name = str(generator.choice(sorted(files)))
    data = bytearray(files[name])
    place = int(generator.integers(len(data)))
    kind = str(
        generator.choice(["flip", "flip", "flip", "cut", "empty", "delete", "swap", "append", "zeros", "double"])
    )
    changed = dict(files)
    if kind == "flip":
        data[place] ^= 1 << int(generator.integers(8))
    elif kind == "cut":
        del data[place:]
    elif kind == "empty":
        data.clear()
    elif kind == "append":
        data += generator.bytes(700)
    elif kind == "zeros":
        data[place : place + 600] = bytes(len(data[place : place + 600]))
    elif kind == "double":
        data *= 2
    elif kind == "swap":
        other = str(generator.choice(sorted(set(files) - {name})))
        changed[other], data = files[name], bytearray(files[other])
    changed[name] = bytes(data)
    if kind == "delete":
        del changed[name]
    return f"{kind} {name} at byte {place}", changed


def write(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(f"{folder}.derived", ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_damaged_files(files: dict[str, bytes], expected: str, tmp_path: Path) -> None:
    refused = 0
    for seed in range(DAMAGED):
        what, changed = damage(files, np.random.default_rng(seed))
        folder = write(tmp_path / "store", changed)
        found = outcome(folder)
        assert found == expected or found.startswith("refused: "), f"seed {seed}: {what}: read as something else"
        refused += found != expected
        if any(changed.get(name) != data for name, data in files.items() if name.endswith(".tar")):
            assert is_refused_by_verify(folder), f"seed {seed}: {what}"
    assert refused > DAMAGED / 3


class Bomb:
    """An object whose unpickling makes a file."""

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


def forge(store: Store, split: str, number: int, tar: bytes, claims: dict[str, int]) -> dict[str, bytes]:
    """The shard and manifest of a store whose block is replaced by ``tar`` and signed, with other counts if claimed."""
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
    entry |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | claims
    (shard,) = (shard for shard in raw["shards"] if shard["name"] == entry["shard"])
    shard |= {"num_bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    return {path.name: new, "manifest.json": json.dumps(raw | {"sha256": json_sha256(raw)}).encode()}


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


def check_forged(store: Store, files: dict[str, bytes], what: str, forged: dict[str, bytes], folder: Path) -> None:
    write(folder, files | forged)
    found = outcome(folder)
    assert found.startswith("refused: "), f"{what}: accepted"
    assert is_refused_by_verify(folder), f"{what}: verify accepts it"


@pytest.mark.parametrize("split", ["items", *SPLITS])
def test_forged_blocks(split: str, shop: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    store = Store.open(shop.parent / "store")
    blocks = store.manifest.items if split == "items" else store.manifest.splits[split]
    changes = EVERY | (ITEMS if split == "items" else USERS)
    for round_number in range(FORGED_ROUNDS):
        number = round_number % len(blocks)
        arrays = store.read_block(blocks[number])
        for what, change in changes.items():
            forged = forge(store, split, number, tar_of(members_of(arrays | change(arrays))), {})
            check_forged(store, files, f"{split} {number}: {what}", forged, tmp_path / "store")
        for claim in ("count", "events"):
            claims = {claim: getattr(blocks[number], claim) + 1}
            check_forged(
                *(store, files, f"{split} {number}: other {claim}"),
                *(forge(store, split, number, tar_of(members_of(arrays)), claims), tmp_path / "store"),
            )
        bomb = {next(iter(arrays)): np.array([Bomb(tmp_path / "exploded")], object)}
        forged = forge(store, split, number, tar_of(members_of(arrays | bomb)), {})
        check_forged(store, files, f"{split} {number}: a pickle", forged, tmp_path / "store")
        assert not (tmp_path / "exploded").exists()
        odd = {name: [*members_of(arrays), (name, tarfile.REGTYPE, npy(np.arange(3)))] for name in ODD_NAMES}
        (name, _, _), *others = members_of(arrays)
        odd |= {f"type {kind!r}": [(name, kind, b""), *others] for kind in ODD_TYPES}
        for what, members in odd.items():
            forged = forge(store, split, number, tar_of(members), {})
            check_forged(store, files, f"{split} {number}: {what}", forged, tmp_path / "store")
        tar = bytearray(tar_of(members_of(arrays)))
        tar[124:135], tar[148:156] = b"77777777777", b" " * 8  # a member of 8 GiB
        tar[148:156] = b"%06o\0 " % sum(tar[:512])
        forged = forge(store, split, number, bytes(tar), {})
        check_forged(store, files, f"{split} {number}: oversize", forged, tmp_path / "store")


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
    "feature dim": lambda m: m["features"][0].update(dim=10**9),
    "shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "hash": lambda m: m["items"][0].update(sha256="../../etc/passwd"),
    "short hash": lambda m: m["items"][0].update(sha256="ab"),
    "version": lambda m: m.update(schema_version=99),
    "nested version": lambda m: m.update(schema_version=[[1]]),
    "tables": lambda m: m["tables"].update({"/etc/passwd": ""}),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES.values(), ids=MANIFEST_CHANGES)
def test_forged_manifests(change: Callable[[dict[str, Any]], Any], files: dict[str, bytes], tmp_path: Path) -> None:
    raw = json.loads(files["manifest.json"])
    del raw["sha256"]
    change(raw)
    text = json.dumps(raw | {"sha256": json_sha256(raw)})
    folder = write(tmp_path / "store", files | {"manifest.json": text.encode()})
    assert outcome(folder).startswith("refused: ")
    assert is_refused_by_verify(folder)


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
def test_manifests_that_are_none(data: bytes, files: dict[str, bytes], tmp_path: Path) -> None:
    assert outcome(write(tmp_path / "store", files | {"manifest.json": data})).startswith("refused: ")


names = st.sampled_from([field.name for field in dataclasses.fields(Manifest)])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=9))


@settings(max_examples=60, deadline=None)
@given(anything)
def test_any_json_is_no_manifest(value: Any) -> None:
    with pytest.raises(UserError) as error:
        Manifest.from_json(json.dumps(value))
    assert "\n" not in str(error.value)


odd_numbers = st.integers(-5, 5) | st.sampled_from([2**70, 1e308, math.nan, math.inf, -math.inf])
values = st.recursive(
    st.none() | st.booleans() | odd_numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
sections = {name: value for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}
keys = st.sampled_from(
    [(name, key) for name, section in sections.items() for key in (*vars(section), "unknown")] + [("unknown", "key")]
)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(keys, values), min_size=1, max_size=2))
def test_senseless_configs(
    changes: list[tuple[tuple[str, str], Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any value of any key: a config, or one line."""
    raw: dict[str, Any] = {}
    for (section, key), value in changes:
        raw.setdefault(section, {})[key] = value
    path = tmp_path_factory.getbasetemp() / "senseless.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    try:
        config = load_config(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert load_config(path).hash == config.hash


@pytest.mark.parametrize("seed", range(6))
def test_the_training_command_refuses_damage(seed: int, shop: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """Whatever is damaged among what training reads: exit code 2, one line, and no run that looks finished."""
    generator = np.random.default_rng(seed)
    name = str(generator.choice([name for name in sorted(files) if name.endswith(".tar")]))
    folder = write(tmp_path / "store", files | {name: files[name][: len(files[name]) // 3]})
    words = ["--config", shop, "--store.path", folder, "--run.dir", tmp_path / "run", "--train.epochs", 1]
    assert name in refusal(train.main, *words)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    verified = run_module("shards.verify", folder) if seed == 0 else None
    assert verified is None or (verified.returncode == 2 and "Traceback" not in verified.stderr)
