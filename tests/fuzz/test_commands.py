"""The table itself: each command succeeds, twice with the same result, and writes only what its row says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.commands import QUICK, Command
from tests.fuzz.expected import Expected
from tests.fuzz.running import start
from tests.fuzz.world import prepare_for


@pytest.mark.parametrize("command", QUICK, ids=lambda command: command.name)
def test_a_command_repeats_itself(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    folder = prepare_for(command, world, tmp_path / "case")
    before = {path.name for path in folder.iterdir()}
    started = start(command, folder, tmp_path / "logs")
    ended = started.wait()
    assert (ended.code, ended.stderr) == (0, "")
    assert command.result(folder, ended.stdout) == expected.of(command)
    assert {path.name for path in folder.iterdir()} - before <= set(command.writes)
    assert started.left() == []
