"""Stores at URLs, from a real server that drops, stalls, cuts and lies: the right bytes, or one line in time."""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.store import remote
from fmrl_dist.data.store.files import SourceError
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from shards import inspect as inspect_command
from shards.store.builder import build_store
from shards.store.problems import store_problems
from shards.verify import main as verify_main
from tests.fixtures.forked import call_in_processes
from tests.fixtures.http_store import FAULTS, StoreServer, serve
from tests.fixtures.processes import free_port
from tests.fixtures.stores import all_blocks, tiny_config, write_raw
from tests.fixtures.training import contents, refusal

pytest.importorskip("aiohttp", reason="stores at http:// need aiohttp (extra: remote)")

from fmrl_dist.data.store import bounded_client

LATE_S = 1.5  # for a busy machine


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries: the server is on this machine."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.02)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("remote")
    write_raw(root / "raw")
    return build_store(tiny_config(root / "raw", root / "store"))[0]


@pytest.fixture
def server(built: Store) -> Iterator[StoreServer]:
    with serve(built.path) as running:
        yield running


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache is this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fmrl-dist"


def access(timeout_s: float = 6.0, retries: int = 3, cache_gb: float = 0.0, cache_dir: str = "") -> StoreConfig:
    return StoreConfig(timeout_s=timeout_s, retries=retries, cache_gb=cache_gb, cache_dir=cache_dir)


def patience_s(fault: str) -> float:
    """The limit of a test in which the fault passes; a source that stalls uses up its share of it at each try."""
    return 3.0 if fault == "stall" else 6.0


def tar_requests(server: StoreServer) -> list[str]:
    return [path for path in server.requests if path.endswith(".tar")]


def test_the_same_arrays_from_the_manifest_and_block_ranges_alone(built: Store, server: StoreServer) -> None:
    store = Store.open(server.url, access())
    assert store.manifest == built.manifest
    for block in all_blocks(built.manifest):
        assert store.read_bytes(block) == built.read_bytes(block)
    table, expected = load_item_table(store, None), load_item_table(built, None)
    np.testing.assert_array_equal(table.values, expected.values)
    names = {"manifest.json", *(shard.name for shard in built.manifest.shards)}
    assert {path for path in server.requests} == {f"/shop/{name}" for name in names}
    assert len(tar_requests(server)) == len(all_blocks(built.manifest)) + len(built.manifest.items)


def test_blocks_are_fetched_several_at_once(built: Store, server: StoreServer) -> None:
    """And still come in order; a damaged one ends the reading, or is skipped."""
    blocks = [*built.manifest.splits["train"]] * 5
    store, skipping = (
        Store.open(server.url, StoreConfig(timeout_s=6, retries=0, cache_gb=0, on_bad_shard=on_bad))
        for on_bad in ("stop", "skip")
    )
    server.latency_s = 0.1
    for found, block in zip(store.read_each(blocks), blocks, strict=True):
        assert found is not None
        np.testing.assert_array_equal(found["users"], built.read_block(block)["users"])
    assert 4 <= server.most_at_once <= 8
    server.faults = ["flip"]
    assert [found is None for found in skipping.read_each(blocks)].count(True) == 1
    server.faults, asked_before = ["forever", "flip"], len(server.requests)
    with pytest.raises(UserError, match="python -m shards.verify"):
        list(store.read_each(blocks * 4))
    assert len(server.requests) - asked_before < 2 * len(blocks)


def test_ranges_are_passed_by_keyword(built: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs has a version argument before the range."""

    class Versioned(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        def cat_file(self, path, version_id=None, start=None, end=None, **rest):  # type: ignore[no-untyped-def]
            assert version_id is None
            return super().cat_file(path, start, end, **rest)

    memory = fsspec.filesystem("memory")
    for name, data in contents(built.path).items():
        memory.pipe(f"/shop/{name}", data)
    try:
        monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: Versioned())
        store = Store.open("memory://shop")
        for block in all_blocks(built.manifest):
            assert store.read_bytes(block) == built.read_bytes(block)
    finally:
        memory.rm("/shop", recursive=True)


@pytest.mark.parametrize("fault", ["500", "drop", "401"])
def test_an_outage_is_not_damage(built: Store, server: StoreServer, fault: str) -> None:
    """Otherwise a run that skips damaged blocks would lose all users when the source is away for a while."""
    store = Store.open(server.url, StoreConfig(timeout_s=2, retries=1, cache_gb=0, on_bad_shard="skip"))
    block = built.manifest.splits["train"][0]
    server.faults = ["forever", "flip"]
    assert store.read_or_skip(block) is None
    server.faults = ["forever", fault]
    with pytest.raises(SourceError, match="cannot be fetched"):
        store.read_or_skip(block)


def test_a_folder_that_is_gone_is_not_damage(built: Store, tmp_path: Path) -> None:
    shutil.copytree(built.path, tmp_path / "store")
    store = Store.open(tmp_path / "store", StoreConfig(on_bad_shard="skip"))
    block = store.manifest.splits["train"][0]
    (tmp_path / "store" / block.shard).unlink()
    assert store.read_or_skip(block) is None
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(SourceError, match="is gone; mount it again"):
        store.read_or_skip(block)


def test_other_protocols(built: Store, own_cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, data in contents(built.path).items():
        memory.pipe(f"/shop/{name}", data)
    try:
        for url in ("memory://shop", "memory:///shop/", f"file://{built.path}"):
            store = Store.open(url)
            for block in all_blocks(built.manifest):
                assert store.read_bytes(block) == built.read_bytes(block)
            assert list(store_problems(store)) == []
        memory.rm("/shop/vocab.parquet")
        assert any("vocab.parquet" in problem for problem in store_problems(Store.open("memory://shop")))
    finally:
        memory.rm("/shop", recursive=True)


def test_no_shard_name_becomes_another_request(built: Store, server: StoreServer) -> None:
    store = Store.open(server.url, access())
    before = list(server.requests)
    for name in ("pipe:touch pwned", "../shop/manifest.json", f"{server.url}/items-000000.tar", "x?.tar", ""):
        block = built.manifest.items[0]
        forged = dataclasses.replace(block, shard=name)
        with pytest.raises(UserError, match="no such shard"):
            store.read_block(forged)
        with pytest.raises(UserError, match="is not a file of a store"):
            store.files.size(name)
    assert server.requests == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes(built: Store, server: StoreServer, fault: str) -> None:
    store = Store.open(server.url, access(timeout_s=patience_s(fault)))
    block = built.manifest.splits["train"][0]
    server.faults = [fault, fault]
    assert store.read_bytes(block) == built.read_bytes(block)
    assert len(tar_requests(server)) == 3


@pytest.mark.alone
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays(server: StoreServer, fault: str) -> None:
    """One line that names the shard, all tries made, within the time that was set."""
    store = Store.open(server.url, access(timeout_s=3, retries=2))
    block = store.manifest.splits["train"][0]
    server.faults = ["forever", fault]
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        store.read_bytes(block)
    assert time.monotonic() - begin < 3 + LATE_S
    text = {
        "drop": "ServerDisconnectedError",
        "half": "ClientPayloadError",
        "short": f"is truncated: {block.num_bytes // 2} of {block.num_bytes} bytes",
        "flip": "is damaged: its sha256 is not",
        "stall": "did not answer in time",
        "500": "HTTP status 500",
        "429": "HTTP status 429",
    }[fault]
    message = str(caught.value)
    assert text in message and f"{server.url}/{block.shard}" in message and "3 of 3 tries" in message
    assert "\n" not in message and "store.timeout_s" in message
    assert len(tar_requests(server)) == (6 if fault == "drop" else 3)  # aiohttp itself retries on a new connection


@pytest.mark.parametrize(
    ("fault", "text"),
    [("404", "no such shard"), ("403", "HTTP status 403; check the credentials"), ("whole", "must serve ranges")],
)
def test_what_another_try_cannot_solve(server: StoreServer, fault: str, text: str) -> None:
    store = Store.open(server.url, access())
    server.faults = ["forever", fault]
    with pytest.raises(UserError, match=text):
        store.read_bytes(store.manifest.items[1])
    assert len(tar_requests(server)) == 1


def test_no_more_is_read_than_was_asked_for(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an answer without an end: of a range, its bytes; of a whole file, what half of the memory holds."""
    store = Store.open(server.url, access())
    server.faults = ["forever", "endless"]
    block = store.manifest.items[1]
    with pytest.raises(UserError, match=f"more bytes came than a range of {block.num_bytes:,}; the server must serve"):
        store.read_bytes(block)
    assert len(tar_requests(server)) == 1
    server.faulty = ""
    monkeypatch.setattr(bounded_client, "memory_bytes", lambda: 4 << 20)
    with pytest.raises(UserError, match="vocab.parquet: cannot be fetched: more bytes came than at most 2,097,152"):
        store.read_table(VOCAB_FILE)
    assert server.endless_bytes < 64 << 20


@pytest.mark.alone
@pytest.mark.parametrize("fault", FAULTS)
def test_the_manifest_likewise(built: Store, server: StoreServer, fault: str) -> None:
    server.faulty, server.faults = "manifest", [fault]
    assert Store.open(server.url, access(timeout_s=patience_s(fault))).manifest == built.manifest
    server.faults = ["forever", fault]
    begin = time.monotonic()
    with pytest.raises(UserError, match=re.escape(f"store {server.url}: manifest.json: ")) as caught:
        Store.open(server.url, access(timeout_s=1.5, retries=1))
    assert time.monotonic() - begin < 1.5 + LATE_S
    assert "\n" not in str(caught.value)


@pytest.mark.alone
def test_nothing_there(server: StoreServer, tmp_path: Path) -> None:
    with serve(tmp_path) as empty:
        assert "is not a store: it has no manifest.json" in refusal(inspect_command.main, empty.url)
    begin = time.monotonic()
    with pytest.raises(UserError, match="ClientConnectorError"):
        Store.open(f"http://127.0.0.1:{free_port()}/shop", access(timeout_s=2, retries=1))
    assert time.monotonic() - begin < 2 + LATE_S


def test_pauses_leave_the_seeded_generator_alone(server: StoreServer) -> None:
    store = Store.open(server.url, access())
    state = random.getstate()
    server.faults = ["500"]
    store.read_bytes(store.manifest.items[0])
    assert random.getstate() == state


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match="s3:// needs the package s3fs; pip install s3fs"):
        Store.open("s3://bucket/shop", access())


def test_a_second_epoch_makes_no_request(built: Store, server: StoreServer, own_cache: Path) -> None:
    for cache_dir, folder in (("", own_cache), (str(own_cache.parent / "mine"), own_cache.parent / "mine")):
        store = Store.open(server.url, access(cache_gb=1, cache_dir=cache_dir))
        for epoch in range(2):
            before = len(server.requests)
            for block in all_blocks(built.manifest):
                assert store.read_bytes(block) == built.read_bytes(block)
            assert len(server.requests) - before == (0 if epoch else len(all_blocks(built.manifest)))
        hashes = {block.sha256 for block in all_blocks(built.manifest)}
        assert {path.name for path in folder.iterdir()} == {"total-bytes"} | hashes


def test_a_damaged_cache_is_fetched_again(built: Store, server: StoreServer, own_cache: Path) -> None:
    store = Store.open(server.url, access(cache_gb=1))
    block = built.manifest.items[0]
    store.read_bytes(block)
    (own_cache / block.sha256).write_bytes(bytes(block.num_bytes))
    for requests in (2, 2):
        assert store.read_bytes(block) == built.read_bytes(block)
        assert len(tar_requests(server)) == requests


def test_the_cache_stays_within_its_size(built: Store, server: StoreServer, own_cache: Path) -> None:
    limit = 3 * max(block.num_bytes for block in all_blocks(built.manifest))
    store = Store.open(server.url, access(cache_gb=limit / 1e9))
    for _ in range(2):
        for block in all_blocks(built.manifest):
            assert store.read_bytes(block) == built.read_bytes(block)
            assert sum(path.stat().st_size for path in own_cache.iterdir() if len(path.name) == 64) <= limit
    assert len(tar_requests(server)) > len(all_blocks(built.manifest))


def read_everything(process: int, url: str, folder: str) -> int:
    store = Store.open(url, access(cache_gb=1, cache_dir=folder))
    return sum(len(store.read_bytes(block)) for _ in range(3) for block in all_blocks(store.manifest))


def test_two_processes_share_the_cache(built: Store, server: StoreServer, tmp_path: Path) -> None:
    """Each block is requested once, or twice if both want it at the same time; a third process requests none."""
    num_bytes = 3 * sum(block.num_bytes for block in all_blocks(built.manifest))
    assert call_in_processes(2, read_everything, server.url, str(tmp_path / "both")) == [num_bytes] * 2
    asked = len(tar_requests(server))
    assert len(all_blocks(built.manifest)) <= asked <= 2 * len(all_blocks(built.manifest))
    read_everything(2, server.url, str(tmp_path / "both"))
    assert len(tar_requests(server)) == asked


def test_verify_streams_the_shards(server: StoreServer, capsys: pytest.CaptureFixture[str]) -> None:
    verify_main([server.url])
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"ok: {server.url}: ")
    server.faults = ["500", "half", "drop"]
    assert list(store_problems(Store.open(server.url, access()))) == []
    inspect_command.main([server.url])
    assert f"store   {server.url}\n" in capsys.readouterr().out


def test_verify_sees_through_to_the_source(built: Store, server: StoreServer, tmp_path: Path) -> None:
    server.folder = tmp_path / "copy"
    server.folder.mkdir()
    files = contents(built.path)
    first, second = (shard.name for shard in built.manifest.shards[:2])
    for name, data in files.items():
        assert isinstance(data, bytes)
        if name == first:
            data = data[:-1] + b"x"  # after the last block
        if name not in (second, "users.parquet"):
            (server.folder / name).write_bytes(data)
    problems = list(store_problems(Store.open(server.url, access(retries=0))))
    for words in (
        f"{first}: the file's sha256",
        f"{first}: the end-of-archive",
        f"{second}: missing",
        "users.parquet",
    ):
        assert any(words in problem for problem in problems), problems


@pytest.mark.alone
def test_verify_ends_where_the_source_dies(server: StoreServer) -> None:
    store = Store.open(server.url, access(timeout_s=1, retries=1))
    server.faults = ["forever", "stall"]
    begin = time.monotonic()
    with pytest.raises(UserError, match="did not answer in time"):
        list(store_problems(store))
    assert time.monotonic() - begin < 1 + LATE_S


def test_a_signed_url_is_neither_shown_nor_changed(server: StoreServer, built: Store) -> None:
    """The signature reaches the server as it is, for each file, and stays out of every message."""
    url = server.url.replace("://", "://me:secret@") + "?X-Sig=secret%2Fsecret%3D&b=%20"
    store = Store.open(url, access(timeout_s=1, retries=0))
    store.read_bytes(built.manifest.items[0])
    assert {path.partition("?")[2] for path in server.requests} == {"X-Sig=secret%2Fsecret%3D&b=%20"}
    shown = server.url.replace("://", "://***@") + "?***"
    assert store.location == shown
    for fault in (*FAULTS, "401", "403", "404", "whole"):
        server.faults = ["forever", fault]
        with pytest.raises(UserError) as caught:
            store.read_bytes(built.manifest.items[1])
        assert "secret" not in str(caught.value) and shown in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
