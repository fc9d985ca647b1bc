"""INT, TERM and HUP at any instant: one line at most, nothing left behind, and the same command then succeeds."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.commands import BY_NAME, QUICK, Command
from tests.fuzz.expected import Expected
from tests.fuzz.leftovers import leftovers
from tests.fuzz.running import start
from tests.fuzz.seeds import repeatable, seeds
from tests.fuzz.world import prepare_for

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECOND_S = 0.02  # between two signals, at most
SAVED = "stopped by a signal; resume with --resume auto"


@pytest.mark.parametrize("command", list(dict.fromkeys([*QUICK, BY_NAME["submit"]])), ids=lambda command: command.name)
def test_signals(command: Command, world: Path, expected: Expected, tmp_path: Path) -> None:
    for seed in seeds(1):
        with repeatable(seed) as generator:
            known = SIGNALS[: 2 if command.starts_processes else 3]
            numbers = [known[i] for i in generator.integers(len(known), size=generator.integers(1, 3))]
            disturb(command, numbers, generator, world, expected, tmp_path / f"case-{seed}")


def test_hang_up_of_what_starts_others(world: Path, expected: Expected, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    disturb(BY_NAME["submit"], [signal.SIGHUP], generator, world, expected, tmp_path / "case")


def disturb(
    command: Command,
    numbers: list[signal.Signals],
    generator: np.random.Generator,
    world: Path,
    expected: Expected,
    folder: Path,
) -> None:
    """Start a command, send it the signals at a random instant, and start it again."""
    prepare_for(command, world, folder)
    wait_s = float(generator.random()) * expected.seconds(command)
    to_all = bool(generator.integers(2))  # as a terminal does
    logs = folder.with_name("logs")
    started = start(command, folder, logs)
    started.wait_until_ready()
    time.sleep(wait_s)
    assert started.process.pid is not None
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_all else os.kill)(started.process.pid, number)
        time.sleep(float(generator.random()) * SECOND_S)
    what = f"{[number.name for number in numbers]} after {wait_s:.3f} s, to all: {to_all}"
    ended = started.wait()
    lines = ended.stderr.splitlines()
    assert ended.code in (0, *(128 + number for number in numbers)), (what, ended)
    assert len(lines) <= len(numbers), (what, ended)
    assert all(line in [f"ended by {number.name}" for number in numbers] for line in lines), (what, ended)
    assert started.left() == [], what
    assert leftovers(folder) == [], what

    if ended.code != 0 or SAVED in ended.stdout:
        again = start(command, folder, logs, words=command.again).wait()
        if again.code == 2 and " exists; " in again.stderr:  # it had been done when the signal came
            again = ended
        else:
            assert (again.code, again.stderr) == (0, ""), (what, again)
        ended = again
    assert command.result(folder, ended.stdout) == expected.of(command), what
