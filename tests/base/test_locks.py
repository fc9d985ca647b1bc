"""One process at a time holds a lock, and a process that ends releases it."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fmrl_dist.base.locks import lock_file


def hold(path: str, across_machines: bool, pipe: Connection) -> None:
    with open(path, "a") as file:
        lock_file(file.fileno(), patience_s=0, across_machines=across_machines)
        pipe.send("locked")
        pipe.recv()


@pytest.mark.parametrize("across_machines", [False, True])
def test_a_second_process_waits_or_is_refused(tmp_path: Path, across_machines: bool) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    path = tmp_path / "lock"
    process = context.Process(target=hold, args=(str(path), across_machines, theirs))
    process.start()
    assert ours.recv() == "locked"
    waits: list[float] = []
    with path.open("a") as file:
        with pytest.raises(TimeoutError, match="locked by another process"):
            lock_file(file.fileno(), patience_s=0.1, poll_s=0.02, across_machines=across_machines, on_wait=waits.append)
        assert len(waits) >= 2 and waits == sorted(waits)
        os.kill(process.pid or 0, 9)
        lock_file(file.fileno(), patience_s=10, across_machines=across_machines)
    process.join()
