"""One process at a time holds a lock, and a process that ends releases it."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fmrl_dist.base import locks
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.locks import lock_file, only_writer


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


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_refused_writer_leaves_nothing(has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the lock file nor folders that it has made; those that hold something stay."""

    def no_locks(*_: object, **__: object) -> None:
        raise OSError("no locks here")

    if not has_locks:
        monkeypatch.setattr(locks, "lock_file", no_locks)
    with pytest.raises(UserError), only_writer(tmp_path / "a" / "b" / "target") as is_locked:
        assert is_locked == has_locks
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a" / "b" / "target"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_full_disk_leaves_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("socket.gethostname", full)  # where the holder's name is written
    with pytest.raises(OSError, match="No space left"), only_writer(tmp_path / "target"):
        pass
    assert list(tmp_path.iterdir()) == []
