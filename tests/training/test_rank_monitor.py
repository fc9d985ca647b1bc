"""Each rank's time and memory, named stragglers, and a hanging run that ends with every rank's stack."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.training.monitoring.rank_monitor import COLUMNS, FILE, describe_slow_ranks
from tests.fixtures.processes import launch, run_processes
from tests.fixtures.training import STEPS_PER_EPOCH, make_shop, train_here


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("watch"))


def lines_of(run: Path) -> list[dict[str, list[float]]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def test_one_rank_reports_its_time_and_memory(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 5, "--train.log_every_steps", 2)
    train_here(shop, run, "--train.max_steps", 9, "--train.log_every_steps", 2, "--resume", "auto")
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 9]
    for line in lines:
        assert line.keys() == {"step", *COLUMNS}
        (step_s,), (wait_s,), (forward_s,), (meeting_s,), (memory_mb,) = (line[name] for name in COLUMNS)
        assert 0 < forward_s < step_s and 0 <= meeting_s < step_s and 0 <= wait_s < step_s
        assert wait_s + forward_s + meeting_s <= step_s
        assert 50 < memory_mb < 50_000


def test_records_after_the_checkpoint_are_cut_off(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 4)
    with (run / FILE).open("a") as file:
        file.write('{"step": 5}\n{"step": 6')
    train_here(shop, run, "--train.max_steps", 6, "--resume", "auto")
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]


def train_with_a_straggler(config: str, run: str, slow_rank: int) -> str:
    """The output of this rank."""
    printed = io.StringIO()
    batches = BatchFeed.batches

    def slowly(self: BatchFeed, step: int) -> object:
        if dist.get_rank() == slow_rank:
            time.sleep(0.15)
        return batches(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchFeed, "batches", slowly)
        patch.setattr("fmrl_dist.training.monitoring.rank_monitor.JUDGED_EVERY_S", 0.5)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            train_here(Path(config), Path(run), "--train.epochs", 1)
    return printed.getvalue()


@pytest.mark.alone
@pytest.mark.multiproc
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_straggler_is_named(slow_rank: int, shop: Path, tmp_path: Path) -> None:
    said = run_processes(2, train_with_a_straggler, str(shop), str(tmp_path / "run"), slow_rank)
    assert [text.count(f"waiting for rank {slow_rank}: ") for text in said] == [1, 0], "once while it is the same"
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, STEPS_PER_EPOCH + 1)]
    for line in lines:
        assert all(len(line[name]) == 2 for name in COLUMNS)
        assert line["data_wait_s"][slow_rank] >= 0.15
        assert describe_slow_ranks(line["data_wait_s"], line["forward_s"]).startswith(f"waiting for rank {slow_rank}:")
    others_wait = [line["meeting_s"][1 - slow_rank] for line in lines]
    assert sorted(others_wait)[len(others_wait) // 2] > 0.05


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([0.1], ""),
        ([0.1, 0.14, 0.12, 0.13], ""),
        ([0.001, 0.004], ""),  # four times as long, but too short to matter
        ([0.1, 0.1, 0.1, 0.3], "waiting for rank 3: rank 3 0.300 s per step (0.200 s of it waiting for data), "),
        ([0.3, 0.1], "waiting for rank 0: rank 0 0.300 s per step"),
        ([0.1, 0.5, 0.1, 0.3, 0.1], "waiting for rank 1, 3: rank 1 0.500 s per step"),
    ],
)
def test_who_is_slow(own: list[float], expected: str) -> None:
    forward = [min(seconds, 0.1) for seconds in own]
    waits = [seconds - part for seconds, part in zip(own, forward, strict=True)]
    found = describe_slow_ranks(waits, forward)
    assert found.startswith(expected) and bool(found) == bool(expected)


HANG = """
import os, sys, time
from fmrl_dist import train
from fmrl_dist.data.feed import BatchFeed
batches = BatchFeed.batches

def stuck_at_step_3(self, step):
    while step == 3 and os.environ["RANK"] == "1":
        time.sleep(1)
    return batches(self, step)

BatchFeed.batches = stuck_at_step_3
train.main(sys.argv[1:])
"""


@pytest.mark.alone
@pytest.mark.multiproc
def test_a_hang_ends_with_the_stack_of_every_rank(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    began = time.monotonic()
    words = [tmp_path / "hang.py", "--config", shop, "--run.dir", tmp_path / "run", "--train.hang_timeout_s", 4]
    result = launch(2, [*map(str, words)], timeout_s=120)
    assert result.returncode != 0
    assert time.monotonic() - began < 90
    for rank in (0, 1):
        assert f"error: rank {rank} has not completed a step for 4 s (train.hang_timeout_s)" in result.stderr
    assert "stuck_at_step_3" in result.stderr, "where the one rank is stuck"
    assert " in agree" in result.stderr, "where the other waits for it"
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]
