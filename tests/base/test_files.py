"""A folder that is replaced: in one step, by one process at a time, with nothing of others removed or left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fmrl_dist.base import files, locks
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import final_name, replaced_folder, write_atomically

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


@pytest.mark.parametrize("name", ["target", "lists[1-9]*"])
def test_what_a_killed_writer_left_is_removed_by_the_next(name: str, tmp_path: Path) -> None:
    """Also in a folder whose name looks like a pattern."""
    target = tmp_path / name
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=write_slowly, args=(target, theirs))
    process.start()
    assert ours.recv() == "filling"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (tmp_path / f".{name}.mine").mkdir()  # of another name: not ours to remove
    assert len(list(tmp_path.iterdir())) == 3
    with replaced_folder(target) as folder:
        fill(folder, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{name}.mine", name]
    assert (target / "file").read_text() == "new"


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


def test_what_is_of_the_old_folder_goes_with_it(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replaced_folder(tmp_path / "target", is_kept=lambda name: name != "figures") as folder:
            fill(folder, text)
            if text == "new":
                fill_others(tmp_path / "target")
    assert {path.name: path.read_text() for path in (tmp_path / "target").iterdir()} == {"file": "new", "notes": "mine"}


def fill_others(folder: Path) -> None:
    (folder / "figures").write_text("of what was")
    (folder / "notes").write_text("mine")


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


def replace_and_die_in_between(target: Path) -> None:
    """Where the kernel cannot swap folders: killed after the old one was moved aside."""
    files.ctypes.CDLL = lambda *_, **__: object()  # type: ignore[assignment, misc]
    rename = Path.rename

    def rename_once(path: Path, to: Path) -> Path:
        rename(path, to)
        os.kill(os.getpid(), signal.SIGKILL)
        return to

    with replaced_folder(target) as folder:
        fill(folder, "new")
        Path.rename = rename_once  # type: ignore[method-assign, assignment]


def test_an_old_folder_that_was_moved_aside_is_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is filled: the next writer may fail too."""
    target = tmp_path / "target"
    with replaced_folder(target) as folder:
        fill(folder, "old")
    process = FORK.Process(target=replace_and_die_in_between, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not target.exists()
    with pytest.raises(RuntimeError), replaced_folder(target):
        raise RuntimeError
    assert f"{target} had been moved aside by a process that was killed; it is put back" in capsys.readouterr().out
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_process_of_another_machine_may_be_filling_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some network file systems are mounted without locks between machines; after a week it is abandoned."""
    left, lock = tmp_path / f".target.{'ab' * 8}", tmp_path / ".target.lock"
    left.mkdir()
    fill(left, "theirs")
    lock.write_text("process 7 of elsewhere\n")
    with replaced_folder(tmp_path / "target") as folder:
        fill(folder, "ours")
    assert f"{left} is left alone: process 7 of elsewhere may still be filling it" in capsys.readouterr().out
    assert (left / "file").read_text() == "theirs" and (tmp_path / "target" / "file").read_text() == "ours"
    for path in (left / "file", left):
        os.utime(path, (1e9, 1e9))
    lock.write_text("process 7 of elsewhere\n")
    with replaced_folder(tmp_path / "target") as folder:
        fill(folder, "ours again")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_system_without_locks_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    with replaced_folder(tmp_path / "target") as folder:
        fill(folder, "new")
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'target'} cannot be locked: nothing prevents a second process from writing it\n"
    assert (tmp_path / "target" / "file").read_text() == "new"


def write_and_die(path: Path) -> None:
    """Killed before the temporary file gets its name."""
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    write_atomically(path, b"{}")


def test_a_temporary_file_has_a_final_name(tmp_path: Path) -> None:
    process = FORK.Process(target=write_and_die, args=(tmp_path / "evaluation.json",))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    assert left.name != "evaluation.json"
    names = (left.name, "evaluation.json", ".hidden", ".a.b")
    assert [final_name(name) for name in names] == ["evaluation.json", "evaluation.json", ".hidden", ".a.b"]
