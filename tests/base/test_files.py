"""A folder that is replaced: in one step, by one process at a time, with nothing of others removed or left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fmrl_dist.base import files
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import replaced_folder

FORK = multiprocessing.get_context("fork")


def fill(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)


def write_slowly(target: Path, pipe: Connection) -> None:
    with replaced_folder(target) as folder:
        fill(folder, "other")
        pipe.send("filling")
        pipe.recv()


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=write_slowly, args=(tmp_path / "target", theirs))
    process.start()
    assert ours.recv() == "filling"
    message = rf"process {process.pid} of \S+ is writing {tmp_path / 'target'}; wait until it ends"
    with pytest.raises(UserError, match=message), replaced_folder(tmp_path / "target"):
        pass
    ours.send("go on")
    process.join()
    assert (tmp_path / "target" / "file").read_text() == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=write_slowly, args=(tmp_path / "target", theirs))
    process.start()
    assert ours.recv() == "filling"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (tmp_path / ".target.mine").mkdir()  # of another name: not ours to remove
    assert len(list(tmp_path.iterdir())) == 3
    with replaced_folder(tmp_path / "target") as folder:
        fill(folder, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.mine", "target"]
    assert (tmp_path / "target" / "file").read_text() == "new"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_the_old_folder_stays_until_the_new_one_is_there(
    in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_step:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for text in ("old", "new"):
        with replaced_folder(tmp_path / "target") as folder:
            fill(folder, text)
        assert (tmp_path / "target" / "file").read_text() == text
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "target") as folder:
        fill(folder, "failed")
        raise RuntimeError
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_others_add_meanwhile_is_kept(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replaced_folder(tmp_path / "target") as folder:
            fill(folder, text)
            if text == "new":
                (tmp_path / "target" / "notes").mkdir()
                (tmp_path / "target" / "notes" / "README.md").write_text("mine")
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert (tmp_path / "target" / "notes" / "README.md").read_text() == "mine"


def replace_forever(target: Path) -> None:
    for number in range(10**6):
        with replaced_folder(target) as folder:
            fill(folder, str(number))


def test_killed_at_any_time_a_whole_folder_is_there(tmp_path: Path) -> None:
    """Where the kernel swaps folders in one step, no instant is without one."""
    with replaced_folder(tmp_path / "target") as folder:
        fill(folder, "first")
    for round_number in range(12):
        process = FORK.Process(target=replace_forever, args=(tmp_path / "target",))
        process.start()
        time.sleep(0.05 + 0.007 * round_number)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert (tmp_path / "target" / "file").read_text()
    with replaced_folder(tmp_path / "target") as folder:
        fill(folder, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
