"""A process group that is left has no threads any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fixtures.processes import REPOSITORY, clean_environment

PROGRAM = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from fmrl_dist.distributed import processes

def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
module(torch.ones(1, 2)).sum().backward()
before = threads()
del module
dist.destroy_process_group()
print(sum("gloo" in name for name in before), sum("gloo" in name for name in threads()))
"""


def test_no_thread_outlives_the_group_of_ddp(tmp_path: Path) -> None:
    """In a fresh interpreter: what is imported after the group has begun can keep it."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    before, after = map(int, result.stdout.split())
    assert before > 0 == after
