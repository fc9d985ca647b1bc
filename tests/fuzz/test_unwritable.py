"""Read-only and full file systems, and outputs where none can be: one line, nothing half-written, nothing lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.fixtures.training import contents
from tests.fuzz.commands import QUICK, Command
from tests.fuzz.expected import Expected
from tests.fuzz.leftovers import leftovers
from tests.fuzz.mounts import CANNOT_MOUNT, almost_full, can_mount, read_only
from tests.fuzz.running import check_end, start
from tests.fuzz.seeds import repeatable, seeds
from tests.fuzz.world import prepare_for

MAX_SPARE_PAGES = 60
needs_mounts = pytest.mark.skipif(not can_mount(), reason=CANNOT_MOUNT)
all_commands = pytest.mark.parametrize("command", QUICK, ids=lambda command: command.name)


@needs_mounts
@all_commands
def test_a_read_only_file_system(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    folder = prepare_for(command, world, tmp_path / "case")
    before = contents(folder)
    started = start(command, folder, tmp_path / "logs", read_only)
    ended = started.wait()
    assert check_end(command, ended) == (not command.writes), ended
    if not command.writes:
        assert command.result(folder, ended.stdout) == expected.of(command)
    assert contents(folder) == before
    assert started.left() == []


@needs_mounts
@all_commands
def test_a_full_file_system(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    """Full after a random number of pages; with room again, the same command succeeds."""
    for seed in seeds(1):
        with repeatable(seed) as generator:
            folder = prepare_for(command, world, tmp_path / f"case-{seed}")
            before = contents(folder)
            spare_pages = int(generator.integers(MAX_SPARE_PAGES))
            started = start(command, folder, tmp_path / "logs", partial(almost_full, spare_pages))
            ended = started.wait()
            assert leftovers(folder) == [] and started.left() == []
            if not check_end(command, ended):
                after = contents(folder)
                assert {name: after.get(name) for name in before} == before, f"{spare_pages} pages: lost or changed"
                again = start(command, folder, tmp_path / "logs", words=command.again).wait()
                assert (again.code, again.stderr) == (0, ""), (spare_pages, ended, again)
                ended = again
            assert command.result(folder, ended.stdout) == expected.of(command), spare_pages


@all_commands
def test_a_file_in_the_place_of_an_output(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    for name in command.writes:
        folder = prepare_for(command, world, tmp_path / f"case-{name}")
        if (folder / name).exists():
            continue
        (folder / name).write_text("a file of somebody's")
        before = contents(folder)
        ended = start(command, folder, tmp_path / "logs").wait()
        if check_end(command, ended):
            assert command.result(folder, ended.stdout) == expected.of(command)
        after = contents(folder)
        assert {path: after.get(path) for path in before} == before, f"{name}: lost or changed"
        assert leftovers(folder) == []
