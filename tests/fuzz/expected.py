"""What each command gives where nothing disturbs it: computed once, when it is first asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.fuzz.commands import Command
from tests.fuzz.running import start
from tests.fuzz.world import prepare_for


class Expected:
    """Results of undisturbed commands."""

    def __init__(self, world: Path, root: Path) -> None:
        self._world, self._root = world, root
        self._results: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def of(self, command: Command) -> Any:
        """The result of a command."""
        if command.name not in self._results:
            folder = prepare_for(command, self._world, self._root / command.name.replace(" ", "-"))
            started = start(command, folder, self._root / "logs")
            started.wait_until_ready()
            began = time.monotonic()
            ended = started.wait()
            self._seconds[command.name] = time.monotonic() - began
            assert (ended.code, ended.stderr) == (0, ""), ended
            self._results[command.name] = command.result(folder, ended.stdout)
        return self._results[command.name]

    def seconds(self, command: Command) -> float:
        """How long a command takes."""
        self.of(command)
        return self._seconds[command.name]
