"""Two commands at once on one folder: each gives what it gives alone, or refuses in one line; nothing is mixed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz.commands import BY_NAME, QUICK, Command
from tests.fuzz.expected import Expected
from tests.fuzz.leftovers import leftovers
from tests.fuzz.running import check_end, start
from tests.fuzz.seeds import repeatable, seeds
from tests.fuzz.world import prepare

MIXED = [
    ("train --resume", "evaluate"),
    ("build --overwrite", "train"),
    ("build --overwrite", "verify"),
    ("build --overwrite", "export"),
    ("submit", "build"),
]
PAIRS = [(command, command) for command in QUICK if command.writes] + [
    (BY_NAME[one], BY_NAME[other]) for one, other in MIXED
]
LATEST_S = 0.3  # that the second one starts after the first


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " and ".join(command.name for command in pair))
def test_two_at_once(pair: tuple[Command, Command], world: Path, expected: Expected, tmp_path: Path) -> None:
    for seed in seeds(1):
        with repeatable(seed) as generator:
            needs = dict.fromkeys(need for command in pair for need in command.needs)
            if "partial" in needs:
                needs.pop("run", None)
            folder = prepare(world, tmp_path / f"case-{seed}", *needs)
            first = start(pair[0], folder, tmp_path / "first")
            first.wait_until_ready()
            time.sleep(float(generator.random()) * LATEST_S)
            second = start(pair[1], folder, tmp_path / "second")
            ends = [(command, started.wait()) for command, started in zip(pair, (first, second), strict=True)]
            done = [(command, ended) for command, ended in ends if check_end(command, ended)]
            assert done, ends
            for command, ended in done:
                if command.name == "evaluate" and "partial" in needs:
                    continue  # of whichever checkpoint was the best at that moment
                assert command.result(folder, ended.stdout) == expected.of(command), ends
            assert leftovers(folder) == []
            assert first.left() == second.left() == []
