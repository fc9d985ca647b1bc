"""The unpacked item table: written once per node by real processes, complete or absent, never held in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.store.derived import damaged_files
from fmrl_dist.data.store.manifest import Block
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from shards.verify import main as verify_main
from tests.fixtures.processes import REPOSITORY, run_processes
from tests.fixtures.stores import write_histories, write_items
from tests.fixtures.training import make_shop

NUM_ITEMS, DIM = 40_000, 768  # 61 MB in float16


def anonymous_mb() -> float:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1000


def unpack(folder: str, stops: bool = False) -> list[float]:
    """The number of blocks read, the growth of anonymous memory in MB, and the table's sum; may stop halfway."""
    store, reads = Store.open(folder), 0
    before, read = anonymous_mb(), store.read_block

    def note(block: Block) -> dict[str, np.ndarray]:
        nonlocal reads
        reads += 1
        if reads == 2 and stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        return read(block)

    store.read_block = note  # type: ignore[method-assign]
    table = load_item_table(store, None)
    return [reads, anonymous_mb() - before, float(table.values.sum(dtype=torch.float64))]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store with many items."""
    root = tmp_path_factory.mktemp("large")
    write_items(root / "items.parquet", [f"i{item}" for item in range(NUM_ITEMS)])
    write_histories(root / "sequences.parquet", {f"u{user}": ["i0", "i1", "i2"] for user in range(8)})
    values = np.random.default_rng(0).standard_normal((NUM_ITEMS, DIM), np.float32).astype(np.float16)
    np.save(root / "vector.npy", values)
    words = ["--data.root", str(root), "--store.path", str(root / "store"), "--model.feature_scale", "none"]
    words += ["--data.demo", "null", "--data.sequences.path", "sequences.parquet", "--data.items.path", "items.parquet"]
    words += ["--data.sequences.times", "''", "--data.items.title", "''"]
    build_store(load_config(None, [*words, "--data.features", "{vector: {source: npy, path: vector.npy}}"]))
    return root / "store"


@pytest.fixture
def store(large: Path, tmp_path: Path) -> Path:
    """A link to that store, with nothing unpacked beside it."""
    (tmp_path / "store").symlink_to(large)
    return tmp_path / "store"


def start(store: Path, stops: bool = False) -> subprocess.Popen[str]:
    program = f"from {__name__} import unpack; print(*unpack({str(store)!r}, {stops}))"
    return subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[float]:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return [float(word) for word in output.splitlines()[-1].split()]


@pytest.mark.multiproc
def test_one_of_several_processes_unpacks_in_little_memory(store: Path) -> None:
    results = run_processes(4, unpack, str(store))
    num_blocks = len(Store.open(store).manifest.items)
    assert sorted(reads for reads, _, _ in results) == [0, 0, 0, num_blocks]
    expected = np.load(store.resolve().parent / "vector.npy").astype(np.float64).sum()
    assert [total for _, _, total in results] == pytest.approx([expected] * 4)
    grown = max(grown for _, grown, _ in results)
    assert grown < 30, f"{grown} MB of anonymous memory for a table of {NUM_ITEMS * DIM * 2 / 1e6} MB"
    assert sorted(path.suffix for path in Path(f"{store}.derived").iterdir()) == [".lock", ".npy", ".npy", ".sha256"]


@pytest.mark.multiproc
def test_another_process_takes_over_from_one_that_is_killed(store: Path) -> None:
    killed = start(store, stops=True)
    while psutil.Process(killed.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.05)
    waiting = start(store)
    assert waiting.stdout is not None
    assert waiting.stdout.readline().startswith("waiting for another process of this node to unpack the item table")
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    reads, _, total = finish(waiting)
    assert reads == len(Store.open(store).manifest.items)
    assert total == pytest.approx(np.load(store.resolve().parent / "vector.npy").astype(np.float64).sum())
    derived = Path(f"{store}.derived")
    left = list(derived.glob(".*.npy.*"))
    assert left, "the files that the killed process had started"
    for path in left:
        os.utime(path, (0, 0))
    for path in derived.glob("[!.]*.npy"):
        path.unlink()
    load_item_table(Store.open(store), None)
    assert len(list(derived.iterdir())) == 4


def test_the_table_is_in_the_cache_folder(tmp_path: Path) -> None:
    make_shop(tmp_path / "shop")
    folder = tmp_path / "shop" / "store"
    load_item_table(Store.open(folder), None)
    assert sorted(path.name.split("-")[0] for path in Path(f"{folder}.derived").glob("*.npy")) == ["items", "items"]
    elsewhere = tmp_path / "node" / "cache"
    first = load_item_table(Store.open(folder, StoreConfig(cache_dir=str(elsewhere))), ("colour",))
    assert len(list(elsewhere.glob("items-*.npy"))) == 2
    whole = load_item_table(Store.open(folder), None)
    assert torch.equal(first.values, whole.values[:, 6:]) and torch.equal(first.present, whole.present[:, 1:])


def test_writing_to_the_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    make_shop(tmp_path / "shop")
    store = Store.open(tmp_path / "shop" / "store")
    load_item_table(store, None).values.zero_()
    assert load_item_table(store, None).values.any()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: b"\x00" * len(data),
    "a half of zeros": lambda data: data[: len(data) // 2] + bytes(-(-len(data) // 2)),
    "a flipped bit": lambda data: data[:-40] + bytes([data[-40] ^ 2]) + data[-39:],
    "longer": lambda data: data + b"\x00" * 4096,
}


@pytest.mark.parametrize("part", ["values.npy", "present.npy", "sha256"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_unpacked_again(
    damage: Callable[[bytes], bytes], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shop(tmp_path / "shop")
    store = Store.open(tmp_path / "shop" / "store")
    table = load_item_table(store, None)
    values, present = table.values.clone(), table.present.clone()
    (path,) = store.derived_folder.glob(f"items-*.{part}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="is sound, but 1 files made from it are damaged; delete these"):
        verify_main([str(store.path)])
    assert f"/{path.name.partition('.')[0]}.values.npy: " in capsys.readouterr().out
    found = load_item_table(store, None)
    assert torch.equal(found.values, values) and torch.equal(found.present, present)
    assert "; it is unpacked again\n" in capsys.readouterr().out
    load_item_table(store, None)
    assert "unpacked" not in capsys.readouterr().out
    verify_main([str(store.path)])


def test_damage_anywhere_in_a_large_table(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A start compares a sample: it finds a zeroed half. ``shards.verify`` finds a single bit."""
    expected = load_item_table(Store.open(store), None).values.clone()
    (path,) = Path(f"{store}.derived").glob("items-*.values.npy")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(bytes(size // 2))
    assert torch.equal(load_item_table(Store.open(store), None).values, expected)
    assert "holds other bytes than were written, after byte" in capsys.readouterr().out
    begin = time.perf_counter()
    assert not list(damaged_files(Store.open(store)))
    with path.open("r+b") as file:
        file.seek(size // 3)
        byte = file.read(1)
        file.seek(size // 3)
        file.write(bytes([byte[0] ^ 1]))
    (line,) = damaged_files(Store.open(store))
    assert f"after byte {size // 3 >> 20 << 20}; delete it" in line
    assert time.perf_counter() - begin < 30


def test_an_unwritable_cache_folder_is_refused(tmp_path: Path) -> None:
    make_shop(tmp_path / "shop")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written or read .*; free space, or choose another folder"):
        load_item_table(Store.open(tmp_path / "shop" / "store", StoreConfig(cache_dir=str(tmp_path / "file"))), None)


def test_a_damaged_block_leaves_no_table(tmp_path: Path) -> None:
    make_shop(tmp_path / "shop")
    store = Store.open(tmp_path / "shop" / "store")
    path = tmp_path / "shop" / "store" / store.manifest.items[-1].shard
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="is truncated"):
        load_item_table(store, None)
    assert [file.suffix for file in store.derived_folder.iterdir()] == [".lock"]


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shop(tmp_path / "shop")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of a container: no entry in the list of users
    monkeypatch.setattr(os, "access", lambda *_: False)
    store = Store.open(tmp_path / "shop" / "store")
    with pytest.raises(UserError, match=r"no home folder to keep a cache in; set store.cache_dir, or HOME"):
        load_item_table(store, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_item_table(store, None).values.any()
    assert len(list((tmp_path / "cache" / "fmrl-dist").glob("items-*.values.npy"))) == 1
