"""Hostile values for every option of every command: done, or refused in one line; nothing else."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from pathlib import Path

import pytest

from fmrl_dist.base.errors import run_command
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import run_here
from tests.fuzz.commands import COMMANDS, Command
from tests.fuzz.seeds import repeatable, seeds
from tests.fuzz.world import prepare_for

VALUES = ["", " ", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "1" * 5000, "9" * 30, "0x10", "x", "a\nb", "\x1b[31m"]
VALUES += [
    "/",
    "..",
    "/dev/null",
    "/dev/null/below",
    "1/2",
    "0/0",
    "2/1",
    "-1/-1",
    "1/99999999999",
    "8,8",
    ",",
]
SAFE = {
    "plan",
    "inspect",
    "verify",
    "submit --dry-run",
    "sweep --dry-run",
    "evaluate",
    "export",
    "demo",
    "encode",
    "add_items --remove",
}


class Captured(BaseException):
    """Ends a command once its parser is known."""


def options_of(command: Command) -> list[str]:
    """The options of a command that take a value."""
    found: list[str] = []

    def capture(parser: argparse.ArgumentParser, *_: object) -> None:
        found.extend(a.option_strings[0] for a in parser._actions if a.option_strings and a.nargs is None and a.type)
        raise Captured

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Captured):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        importlib.import_module(command.module).main([])
    return found


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.name in SAFE], ids=lambda command: command.name)
def test_hostile_options(command: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(command)
    if not options:
        return
    main = importlib.import_module(command.module).main
    for seed in seeds(4):
        with repeatable(seed) as generator:
            option, value = options[generator.integers(len(options))], VALUES[generator.integers(len(VALUES))]
            folder = prepare_for(command, world, tmp_path / f"case-{seed}")
            (folder / "launch").symlink_to(REPOSITORY / "launch")
            monkeypatch.chdir(folder)  # where relative paths lead
            monkeypatch.setattr(sys, "argv", [command.module, *command.argv(folder), f"{option}={value}"])
            stderr, code = io.StringIO(), 0
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
                try:
                    run_here(lambda _: run_command(main), [])
                except SystemExit as end:
                    code = int(end.code or 0)
            what = f"{option}={value[:40]!r}: exit code {code}: {stderr.getvalue()}"
            assert code in (0, 2) and stderr.getvalue().count("\n") == (code == 2), what
