"""The store as its readers see it: stock webdataset, one block at a time, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.store import files
from fmrl_dist.data.store.block_arrays import parse_block
from fmrl_dist.data.store.files import SourceError
from fmrl_dist.data.store.manifest import MANIFEST_FILE, VOCAB_FILE, Manifest
from fmrl_dist.data.store.reader import Store
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.stores import all_blocks
from tests.fixtures.tars import member, npy, tar_bytes, without_end


def load(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def test_stock_webdataset_reads_the_same_arrays(store: Store) -> None:
    assert len(store.manifest.shards) > 4
    for shard in store.manifest.shards:
        blocks = [block for block in all_blocks(store.manifest) if block.shard == shard.name]
        dataset = webdataset.WebDataset(str(store.path / shard.name), shardshuffle=False, empty_check=False)
        with (store.path / shard.name).open("rb") as file:
            by_file = list(group_by_keys(tar_file_expander([{"url": shard.name, "stream": file}])))
        for samples in (list(dataset), by_file):
            assert len(samples) == len(blocks) == shard.samples
            for sample, block in zip(samples, blocks, strict=True):
                fields = {key: load(data) for key, data in sample.items() if not key.startswith("__")}
                ours = store.read_block(block)
                assert {f"{field}.npy" for field in ours} == set(fields)
                for field, array in ours.items():
                    np.testing.assert_array_equal(array, fields[f"{field}.npy"], strict=True)


def test_manifest_survives_json(store: Store) -> None:
    text = store.manifest.to_json()
    again = Manifest.from_json(text)
    assert again == store.manifest
    assert again.sha256 == json.loads(text)["sha256"]


THREADS_AROUND = """
import sys
import threading
from pathlib import Path
from fmrl_dist.data.item_statistics import popularity_table
from fmrl_dist.data.store.reader import Store
from shards.store.problems import store_problems

def threads():  # that are not Python's, but for the one that jemalloc, pyarrow's allocator, starts when first used
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return len(names) - names.count("jemalloc_bg_thd") - threading.active_count()

store, before = Store.open(sys.argv[1]), threads()
assert list(store_problems(store)) == [] and len(popularity_table(store, 0.5)) == store.manifest.num_items
print(before, threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux's /proc")
def test_tables_are_read_without_threads(store: Store) -> None:
    """A thread of pyarrow that holds Python's bytes while Python exits aborts the process: rare, but exit code -6."""
    words = [sys.executable, "-c", THREADS_AROUND, str(store.path)]
    ended = subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    before, after = ended.stdout.splitlines()[-1].split()
    assert before == after


def write_manifest(store: Store, **changes: object) -> None:
    """Change the manifest and sign it again, as a forger could."""
    (store.path / "manifest.json").write_text(dataclasses.replace(store.manifest, **changes).to_json())  # type: ignore[arg-type]


def test_another_schema_version_names_both(store: Store) -> None:
    write_manifest(store, schema_version=7)
    with pytest.raises(UserError, match="version 7.*versions 2 to 4.*--overwrite"):
        Store.open(store.path)


def test_an_edited_manifest_is_refused(store: Store) -> None:
    file = store.path / "manifest.json"
    file.write_text(file.read_text().replace('"num_dropped_users": 1', '"num_dropped_users": 0'))
    with pytest.raises(UserError, match="changed after it was written"):
        Store.open(store.path)


@pytest.mark.parametrize("name", ["pipe:touch pwned", "/etc/passwd", "../items-000000.tar", "items-000000.tar.gz", ""])
def test_a_signed_manifest_cannot_name_other_files(
    store: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = (dataclasses.replace(store.manifest.shards[0], name=name), *store.manifest.shards[1:])
    write_manifest(store, shards=shards)
    with pytest.raises(UserError, match="plain file name"):
        Store.open(store.path)
    with pytest.raises(UserError, match="no such shard"):
        store.read_block(dataclasses.replace(store.manifest.items[0], shard=name))
    assert not (tmp_path / "pwned").exists()


def test_a_manifest_that_does_not_add_up_is_refused(store: Store) -> None:
    write_manifest(store, num_items=store.manifest.num_items + 1)
    with pytest.raises(UserError, match="num_items is 7 but its blocks hold 6"):
        Store.open(store.path)
    beyond = dataclasses.replace(store.manifest.items[0], num_bytes=10**9)
    write_manifest(store, items=(beyond, *store.manifest.items[1:]))
    with pytest.raises(UserError, match="no such shard"):
        Store.open(store.path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', "\0", "[" * 9])
def test_what_is_not_a_manifest_is_refused(store: Store, text: str) -> None:
    (store.path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest"):
        Store.open(store.path)


def test_missing_store_and_other_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; build it"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a store"):
        Store.open(tmp_path)


def test_every_flipped_byte_of_a_block_is_noticed(store: Store) -> None:
    """Tar headers and padding included: the hash covers the block's whole byte range."""
    block = store.manifest.splits["train"][1]
    path = store.path / block.shard
    whole = path.read_bytes()
    places = {0, 100, 511, 512, 520, block.num_bytes - 1, *range(7, block.num_bytes, 97)}
    for place in sorted(places):
        data = bytearray(whole)
        data[block.offset + place] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"byte {block.offset} of shard .*{block.shard} is damaged.*shards.verify"):
            store.read_block(block)
    path.write_bytes(whole)
    store.read_block(block)


def test_truncated_and_missing_shard(store: Store) -> None:
    block = store.manifest.splits["test"][0]
    path = store.path / block.shard
    os.truncate(path, block.offset + block.num_bytes - 1)
    with pytest.raises(UserError, match="is truncated"):
        store.read_block(block)
    path.unlink()
    with pytest.raises(UserError, match="no such shard"):
        store.read_block(block)


PLAIN = npy(np.arange(3))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(member("000000.ids.npy"), npy(np.array([{}], object), allow_pickle=True))], "cannot be read"),
        ([(member("000000.ids.npy", tarfile.SYMTYPE), b"")], "odd member"),
        ([(member("000000.ids.npy", tarfile.FIFOTYPE), b"")], "odd member"),
        ([(member("../000000.ids.npy"), PLAIN)], "odd member"),
        ([(member("000000.ids.pkl"), PLAIN)], "odd member"),
        ([(member("000000.ids.npy"), PLAIN), (member("000000.ids.npy"), PLAIN)], "odd member"),
        ([(member("000000.ids.npy"), PLAIN), (member("000001.text.npy"), PLAIN)], "2 blocks"),
        ([(member("000000.ids.npy"), PLAIN[:-3])], "cannot be read"),
        ([(member("000000.ids.npy"), b"PK\x03\x04 an archive")], "cannot be read"),
    ],
)
def test_members_that_are_not_plain_arrays_are_refused(
    members: list[tuple[tarfile.TarInfo, bytes]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_block(without_end(tar_bytes(*members)), "here")
    assert "\n" not in str(caught.value)


def test_what_the_system_cannot_read_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file behind the link fails as a broken disk does; it is not skipped, as the block may be intact elsewhere."""
    block, memory = store.manifest.items[0], Path("/proc/self/mem")
    with memory.open("rb") as file, pytest.raises(OSError, match="Input/output error"):
        file.read(1)
    for name in (block.shard, VOCAB_FILE, MANIFEST_FILE):
        (store.path / name).unlink()
        (store.path / name).symlink_to(memory)
    monkeypatch.setattr(files.os, "fstat", lambda _: os.stat_result((0,) * 6 + (1 << 30,) + (0,) * 3))
    block = dataclasses.replace(block, offset=0)
    skipping = Store(store.files, store.manifest, StoreConfig(on_bad_shard="skip"))
    reason = r"cannot be read \(Input/output error\); check its disk, and this user's rights to the file$"
    with pytest.raises(SourceError, match=f"^block at byte 0 of shard {store.path}/{block.shard} {reason}"):
        skipping.read_or_skip(block)
    with pytest.raises(UserError, match=f"^store {store.path}: {VOCAB_FILE} {reason}"):
        store.read_table(VOCAB_FILE)
    with pytest.raises(UserError, match=f"^store {store.path}: {MANIFEST_FILE} {reason}"):
        Store.open(store.path)
