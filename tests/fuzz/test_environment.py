"""Each command under a minimal environment: no HOME, no LANG, closed input, a strict umask, no current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.fixtures.processes import REPOSITORY
from tests.fuzz.commands import COMMANDS, Command
from tests.fuzz.expected import Expected
from tests.fuzz.mounts import can_mount, read_only
from tests.fuzz.running import check_end, start
from tests.fuzz.seeds import repeatable, seeds
from tests.fuzz.world import prepare_for

MINIMAL = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
NEEDS_ROOT_FOLDER = "launch."  # such a module's scripts are found from the repository's root
REAL = ("build", "train", "evaluate", "submit --dry-run")  # one of each kind of imports
OTHERS = ("LANG", "LC_ALL", "TERM", "TZ", "HOME", "USER", "LOGNAME", "TMPDIR", "SHELL", "PWD", "XDG_CACHE_HOME")


@contextmanager
def stripped(number: int, folder: Path) -> Iterator[None]:
    """A random part of the misfortunes below, by the bits of ``number``."""
    for bit, name in enumerate(OTHERS):
        if number >> bit & 1:
            os.environ.pop(name, None)
    number >>= len(OTHERS)
    if number & 1:
        os.umask(0o077)
    if number & 2:
        os.close(0)
    if number & 4:
        os.environ["HOME"] = "/nowhere"
    if number & 8:
        os.environ["LC_ALL"] = "POSIX"
    yield


@contextmanager
def in_a_folder_that_is_gone(folder: Path) -> Iterator[None]:
    """The current folder has been removed."""
    gone = folder.with_name("gone")
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    yield


@contextmanager
def in_a_read_only_folder(folder: Path) -> Iterator[None]:
    """The current folder cannot be written."""
    here = folder.with_name("here")
    here.mkdir()
    with read_only(here):
        os.chdir(here)
        yield


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.starts_processes], ids=lambda command: command.name)
def test_stripped_environments(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    folder = prepare_for(command, world, tmp_path / "gone" / "case")
    ended = start(command, folder, tmp_path / "logs", in_a_folder_that_is_gone).wait()
    assert not check_end(command, ended) and "the current folder has been removed" in ended.stderr
    if can_mount() and not command.module.startswith(NEEDS_ROOT_FOLDER):
        folder = prepare_for(command, world, tmp_path / "read-only" / "case")
        ended = start(command, folder, tmp_path / "logs", in_a_read_only_folder).wait()
        assert (ended.code, ended.stderr) == (0, "")
        assert command.result(folder, ended.stdout) == expected.of(command)
    for seed in seeds(1):
        with repeatable(seed) as generator:
            folder = prepare_for(command, world, tmp_path / f"case-{seed}")
            number = int(generator.integers(1 << (len(OTHERS) + 4)))
            ended = start(command, folder, tmp_path / "logs", partial(stripped, number)).wait()
            assert (ended.code, ended.stderr) == (0, ""), f"{number:b}"
            assert command.result(folder, ended.stdout) == expected.of(command), f"{number:b}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.name in REAL], ids=lambda command: command.name)
def test_a_minimal_environment(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    """A real interpreter with nothing but PATH, no standard input, and a strict umask."""
    folder = prepare_for(command, world, tmp_path / "case")
    shell = 'umask 077; exec "$@" <&-'
    ended = subprocess.run(
        ["/bin/bash", "-c", shell, "bash", sys.executable, "-m", command.module, *command.argv(folder)],
        cwd=REPOSITORY if command.module.startswith(NEEDS_ROOT_FOLDER) else tmp_path,
        env=MINIMAL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert command.result(folder, ended.stdout) == expected.of(command)
