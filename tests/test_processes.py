"""The helpers of :mod:`tests.processes` themselves, on ranks that work, die and hang."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.processes import launch, run_processes

pytestmark = pytest.mark.multiproc

SAY_WORLD = """
import sys
from accelerate import Accelerator
accelerator = Accelerator()
rank = f"{accelerator.process_index}/{accelerator.num_processes}"
print(f"{rank} {accelerator.device.type} {sys.argv[1]}\\n", end="", flush=True)  # in one piece: ranks share the pipe
accelerator.end_training()
"""
HANG = "import time\nprint('started', flush=True)\ntime.sleep(60)"


def sum_over_ranks(scale: float) -> list[float]:
    total = torch.tensor([dist.get_rank() + scale], dtype=torch.float64)
    dist.all_reduce(total)
    return [float(dist.get_rank()), total.item()]


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("this rank is broken")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def test_results_come_back_in_rank_order() -> None:
    third = 1 / 3
    assert run_processes(2, sum_over_ranks, third) == [[0.0, third + (1 + third)], [1.0, third + (1 + third)]]


def test_dead_rank_is_named() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 died with exit code 1:.*this rank is broken"):
        run_processes(2, fail_on_rank_one)


def test_hung_rank_is_told_from_the_rank_that_waits_for_it() -> None:
    with pytest.raises(AssertionError) as failure:
        run_processes(2, hang_on_rank_one, timeout_s=3)
    message = str(failure.value)
    assert "rank 0 hung for 3 s, waiting for other ranks:" in message
    assert "rank 1 hung for 3 s:" in message
    assert "in hang_on_rank_one" in message


def test_function_inside_a_function_is_refused() -> None:
    with pytest.raises(AssertionError, match="not defined at the top of its module"):
        run_processes(1, lambda: None)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_launch_starts_as_many_ranks_as_asked(num_processes: int, tmp_path: Path) -> None:
    (tmp_path / "say_world.py").write_text(SAY_WORLD)
    result = launch(num_processes, ["say_world.py", "word"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = [f"{rank}/{num_processes} cpu word" for rank in range(num_processes)]
    assert sorted(result.stdout.split("\n")) == ["", *expected]


def test_launch_returns_a_failure(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("raise SystemExit(3)")
    assert launch(1, ["fail.py"], cwd=tmp_path).returncode != 0


@pytest.mark.slow
def test_launch_kills_what_runs_too_long(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    with pytest.raises(AssertionError, match=r"(?s)ran longer than 20 s:.*started"):
        launch(2, ["hang.py"], cwd=tmp_path, timeout_s=20)
    left = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(tmp_path)]
    assert left == []


def test_no_launch_variable_reaches_a_test() -> None:
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"} & set(os.environ)
