"""One damaged file: the figures and bytes of the undamaged one, or one line; never other ones, never a traceback."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fmrl_dist.base.errors import run_command
from tests.fixtures.commands import Ended
from tests.fixtures.training import run_here
from tests.fuzz.commands import BY_NAME, Command
from tests.fuzz.damage import damage
from tests.fuzz.expected import Expected
from tests.fuzz.running import check_end
from tests.fuzz.seeds import repeatable, seeds
from tests.fuzz.world import PARTS, prepare

# A command, and a part of the world that it reads.
READERS = [
    ("verify", "store"),
    ("inspect", "store"),
    ("train", "store"),
    ("train", "derived"),
    ("train --resume", "partial"),
    ("train --resume, finished", "run"),
    ("evaluate", "run"),
    ("evaluate", "store"),
    ("evaluate", "derived"),
    ("evaluate an export", "export"),
    ("evaluate an export", "store"),
    ("evaluate --part", "run"),
    ("export", "run"),
    ("export", "store"),
    ("add_items --remove", "export"),
]


def run(command: Command, folder: Path, patch: pytest.MonkeyPatch) -> Ended:
    """A command in this process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    patch.setattr(sys, "argv", [command.module, *command.argv(folder)])
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run_here(lambda _: run_command(import_module(command.module).main), [])
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, stdout.getvalue(), stderr.getvalue())


@pytest.mark.parametrize(("name", "part"), READERS, ids=[f"{name}, {part}" for name, part in READERS])
def test_damaged_files(
    name: str, part: str, world: Path, expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = BY_NAME[name]
    wanted, refused = expected.of(command), 0
    for seed in seeds(2):
        with repeatable(seed) as generator:
            folder = prepare(world, tmp_path / "case", *dict.fromkeys((*command.needs, part)))
            what = damage(folder / PARTS[part], generator)
            ended = run(command, folder, monkeypatch)
            if check_end(command, ended):
                assert command.result(folder, ended.stdout) == wanted, what
            else:
                refused += 1
            shutil.rmtree(folder)
