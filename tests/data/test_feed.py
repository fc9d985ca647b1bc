"""Reading ahead: the same batches for any ranks and workers, from any step; dead, stalled and damaged sources."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from fmrl_dist import train
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.negatives import make_sampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.manifest import Block
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from tests.fixtures.processes import REPOSITORY, clean_environment, run_processes
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    evaluation,
    figures,
    make_shop,
    records,
    refusal,
    train_here,
)

TOTAL_STEPS = 2 * STEPS_PER_EPOCH + 3  # two epochs, including their last steps, and the start of another
SAMPLED = ["--loss.softmax", "sampled", "--loss.negatives", "mixed", "--loss.num_negatives", "5"]
NO_DROPOUT = ["--model.dropout", "0", "--model.lru_dropout", "0"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("feed"))


def make_stream(config: Config, access: StoreConfig | None = None, skipped: Sequence[int] = ()) -> TrainStream:
    store = Store.open(config.store.path, access)
    counts = [block.count for block in store.manifest.splits["train"]]
    order = Order(counts, config.train.histories_per_step, config.train.num_lanes, config.train.seed, pool_blocks=3)
    sampler, shared = make_sampler(config, store), config.loss.scope == "batch"
    return TrainStream(store, order, WindowRule(4, "all", True), sampler, shared, skipped)


def digest(batch: Packed) -> str:
    """Hash of all tensors of a batch and their dtypes."""
    arrays = [tensor.numpy() for tensor in batch.tensors.values()]
    return hashlib.sha256(b"".join(str(a.dtype).encode() + a.tobytes() for a in arrays)).hexdigest()


def read(stream: TrainStream, lanes: Sequence[int], workers: int, first: int = 0) -> list[Packed]:
    """The batches from step ``first`` to the end, read ahead by ``workers``."""
    with BatchFeed(stream, lanes, TOTAL_STEPS, workers, timeout_s=60) as feed:
        return [feed.batches(step)[0][0] for step in range(first, TOTAL_STEPS)]


def read_on_each_rank(config: str, words: list[str]) -> dict[str, list[Any]]:
    """Users of each step, and the numbers of workers whose batches differ from those read without workers."""
    lanes = range(dist.get_rank(), 16, dist.get_world_size())
    stream = make_stream(load_config(Path(config), words))
    expected = [stream.batch(*divmod(step, STEPS_PER_EPOCH), lanes) for step in range(TOTAL_STEPS)]
    found = {workers: read(stream, lanes, workers) for workers in (0, 1, 2)}
    return {
        "users": [batch.users.tolist() for batch in expected],
        "differ": [w for w, batches in found.items() if [*map(digest, batches)] != [*map(digest, expected)]],
    }


@pytest.mark.multiproc
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_batches_are_the_same_for_any_ranks_and_workers(ranks: int, shop: Path) -> None:
    scopes = {"lane": [], "batch": ["--loss.scope", "batch"]}
    words = [*SAMPLED, *scopes["batch" if ranks % 2 else "lane"]]
    results = run_processes(ranks, read_on_each_rank, str(shop), words)
    assert [result["differ"] for result in results] == [[]] * ranks
    alone = make_stream(load_config(shop))
    for step in range(TOTAL_STEPS):
        whole = alone.batch(*divmod(step, STEPS_PER_EPOCH), range(16)).users.tolist()
        assert sorted(user for result in results for user in result["users"][step]) == sorted(whole)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("lanes", [range(16), [3, 9, 15], [7]], ids=["all", "some", "one"])
def test_a_feed_starts_anywhere(workers: int, lanes: Sequence[int], shop: Path) -> None:
    """Even with more workers than lanes, and it can jump."""
    stream = make_stream(load_config(shop, SAMPLED))
    whole = [digest(stream.batch(*divmod(step, STEPS_PER_EPOCH), lanes)) for step in range(TOTAL_STEPS)]
    assert [*map(digest, read(stream, lanes, workers, first=STEPS_PER_EPOCH - 1))] == whole[STEPS_PER_EPOCH - 1 :]
    with BatchFeed(stream, lanes, TOTAL_STEPS, workers, timeout_s=60) as feed:
        assert [digest(feed.batches(step)[0][0]) for step in (5, 6, 2, 3, 18)] == [
            whole[step] for step in (5, 6, 2, 3, 18)
        ]


def test_starting_in_the_middle_reads_no_extra_blocks(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the blocks of its users' pools are read, each once: nothing is replayed."""
    was_read: list[Block] = []
    read_block = Store.read_block

    def note(self: Store, block: Block) -> Any:
        was_read.append(block)
        return read_block(self, block)

    stream = make_stream(load_config(shop))
    monkeypatch.setattr(Store, "read_block", note)
    with BatchFeed(stream, [5], TOTAL_STEPS, 0, timeout_s=60) as feed:
        feed.batches(STEPS_PER_EPOCH + 2)
        feed.batches(STEPS_PER_EPOCH + 3)
    windows = {window for step in (2, 3) for window, _, _ in stream.order.spans(1, step, 5)}
    assert sorted(block.offset for block in was_read) == sorted(
        Store.open(load_config(shop).store.path).manifest.splits["train"][number].offset
        for number in {int(number) for window in windows for number in stream.order.pool(1, window)[:, 0]}
    )


def test_workers_end_with_the_feed(shop: Path) -> None:
    before = set(psutil.Process().children())
    with BatchFeed(make_stream(load_config(shop)), range(16), TOTAL_STEPS, 2, timeout_s=60) as feed:
        feed.batches(0)
        assert len(set(psutil.Process().children()) - before) == 2
    assert set(psutil.Process().children()) == before


@pytest.mark.alone
@pytest.mark.parametrize(
    ("fate", "problem"), [(signal.SIGKILL, "exited unexpectedly|killed by"), (signal.SIGSTOP, "timed out")]
)
def test_a_worker_that_dies_or_stalls_ends_the_run_in_time(fate: int, problem: str, shop: Path) -> None:
    before = set(psutil.Process().children())
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=rf"died or sent nothing for 2 s \(.*({problem}).*; check for") as error,
        BatchFeed(make_stream(load_config(shop)), range(16), 10**6, 1, timeout_s=2) as feed,
    ):
        feed.batches(0)
        (worker,) = set(psutil.Process().children()) - before
        os.kill(worker.pid, fate)
        for step in range(1, 10**6):
            feed.batches(step)
            assert time.monotonic() - began < 30
    assert "\n" not in str(error.value)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 15


RANK = """
import os, signal, sys
from pathlib import Path
from tests.data.test_feed import TOTAL_STEPS, make_stream
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.feed import BatchFeed
from multiprocessing import active_children

with BatchFeed(make_stream(load_config(Path(sys.argv[1]))), range(16), TOTAL_STEPS, 2, timeout_s=60) as feed:
    feed.batches(0)
    stopped, running = active_children()
    os.kill(stopped.pid, signal.SIGSTOP)  # as one that waits for a disk, or for a pipe to be read
    print(stopped.pid, running.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_rank_that_is_killed(shop: Path) -> None:
    """They would hold its standard output, so that ``train … | tee log`` never returned."""
    command = [sys.executable, "-c", RANK, str(shop)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    deadline = time.monotonic() + 30  # an output is closed a moment before its process has ended
    while any(map(runs, map(int, result.stdout.split()))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, list[Block]]:
    """A shop with a flipped byte in one training block and a missing test shard; and the damaged block."""
    config = make_shop(tmp_path / "shop")
    folder = tmp_path / "shop" / "store"
    manifest = Store.open(folder).manifest
    block = manifest.splits["train"][3]
    path = folder / block.shard
    data = bytearray(path.read_bytes())
    data[block.offset + 700] ^= 1
    path.write_bytes(data)
    (folder / manifest.splits["test"][0].shard).unlink()
    return config, [block]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_damaged_shard_stops_the_run(workers: int, damaged: tuple[Path, list[Block]], tmp_path: Path) -> None:
    config, (block,) = damaged
    line = refusal(
        train.main, "--config", config, "--run.dir", tmp_path / "run", "--train.workers", workers, "--train.epochs", 1
    )
    assert f"block at byte {block.offset} of shard" in line and block.shard in line and "is damaged" in line
    assert "python -m shards.verify" in line and "--store.on_bad_shard skip" in line


def test_a_damaged_item_shard_is_never_skipped(shop: Path, tmp_path: Path) -> None:
    config = make_shop(tmp_path / "shop")
    (tmp_path / "shop" / "store" / "items-000000.tar").write_bytes(b"")
    words = ["--run.dir", tmp_path / "run", "--store.on_bad_shard", "skip"]
    line = refusal(train.main, "--config", config, *words)
    assert "items-000000.tar" in line and "is truncated" in line and "skip" not in line


def train_on_ranks(config: str, run: str, words: list[str]) -> None:
    train_here(Path(config), Path(run), *words)


@pytest.mark.multiproc
def test_a_skipped_block_is_left_out_on_all_ranks(
    damaged: tuple[Path, list[Block]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One and two ranks, with and without workers, whole and resumed: the same figures; the lost users are reported."""
    config, (block,) = damaged
    words = [*NO_DROPOUT, "--store.on_bad_shard", "skip", "--store.max_lost_share", 0.5]
    train_here(config, tmp_path / "alone", *words)
    said = capsys.readouterr().out
    assert f"1 damaged block(s) of {block.shard} left out: {block.count} of 113 training users are lost" in said
    test = Store.open(load_config(config).store.path).manifest.splits["test"]
    lost = sum(other.count for other in test if other.shard == test[0].shard)
    result = evaluation(tmp_path / "alone")
    assert result["users_lost"] == lost and result["users"] == sum(other.count for other in test) - lost
    assert f"({lost:,} more in damaged blocks)" in said

    for workers, run in ((0, "none"), (2, "two")):
        run_processes(2, train_on_ranks, str(config), str(tmp_path / run), [*words, "--train.workers", str(workers)])
        for left, right in zip(figures(tmp_path / run), figures(tmp_path / "alone"), strict=True):
            assert left.pop("split") == right["split"]
            assert left == pytest.approx({key: right[key] for key in left}, rel=1e-5)
        assert evaluation(tmp_path / run) == result

    halved = train_here(config, tmp_path / "halved", *words, "--train.max_steps", 11, "--eval.every_steps", 11)
    state = (halved / "checkpoints" / "latest" / "state.json").read_text()
    assert '"skipped_blocks": [\n   3\n  ]' in state
    train_here(config, halved, *words, "--eval.every_steps", 11, "--resume", "auto")
    whole = train_here(config, tmp_path / "whole", *words, "--eval.every_steps", 11)
    assert figures(halved) == figures(whole)


def test_blocks_found_damaged_one_after_the_other_all_stay_skipped(tmp_path: Path) -> None:
    """Pools of one block: the second is found long after the ranks agreed on the first."""
    config = make_shop(tmp_path / "shop")
    store = Store.open(tmp_path / "shop" / "store")
    for number in (2, 6):
        block = store.manifest.splits["train"][number]
        with (store.path / block.shard).open("r+b") as file:
            file.seek(block.offset + 700)
            file.write(b"\xff" * 8)
    words = [
        "--store.on_bad_shard",
        "skip",
        "--store.max_lost_share",
        0.5,
        "--train.shuffle_blocks",
        1,
        "--train.epochs",
        2,
        "--train.lanes",
        1,
    ]
    run = train_here(config, tmp_path / "run", *words, "--train.checkpoint_every_steps", 1)
    assert load_checkpoint(run / "checkpoints" / "latest").state.skipped_blocks == [2, 6]


def test_a_skipped_block_contributes_nothing_and_shifts_nothing(damaged: tuple[Path, list[Block]], shop: Path) -> None:
    config = load_config(damaged[0])
    access = StoreConfig(on_bad_shard="skip")
    whole = make_stream(load_config(shop))
    lost = set(Store.open(load_config(shop).store.path).read_block(damaged[1][0])["users"].tolist())
    for stream in (make_stream(config, access), make_stream(config, skipped=[3])):
        found = set()
        with BatchFeed(stream, range(16), STEPS_PER_EPOCH, 0, timeout_s=60) as feed:
            for step in range(STEPS_PER_EPOCH):
                (batch,), blocks = feed.batches(step)
                found |= set(blocks)
                expected = [user for user in whole.batch(0, step, range(16)).users.tolist() if user not in lost]
                assert batch.users.tolist() == expected
        assert found == (set() if stream._skipped else {3})


@pytest.mark.parametrize("workers", [0, 2])
def test_runs_do_not_depend_on_workers(workers: int, shop: Path, tmp_path: Path) -> None:
    one = train_here(shop, tmp_path / "one", "--train.epochs", 2)
    other = train_here(shop, tmp_path / "other", "--train.epochs", 2, "--train.workers", workers)
    assert figures(one) == figures(other)
    assert len(records(one)) == 2 * STEPS_PER_EPOCH
