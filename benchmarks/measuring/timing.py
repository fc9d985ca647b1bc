"""Interleaved timing: each round runs every side once, so that other load on the machine affects all sides alike."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import REPOSITORY


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return spread(self.seconds, " s")

    def over(self, other: Timing) -> str:
        """How many times ``other`` this takes: the median of the rounds' ratios, and their range."""
        return spread([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)], "")

    def ratio(self, other: Timing) -> float:
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def spread(values: Sequence[float], unit: str) -> str:
    """Median, and from the lowest to the highest."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} … {max(values):.3g})"


def interleave(sides: Mapping[str, Callable[[int], object]], rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Time every side once a round; a side is called with the round's number."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side(max(number, 0))
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def forget_peak() -> None:
    """Make :func:`peak_resident_bytes` start from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since it began or since :func:`forget_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def in_child(module: str, *arguments: str) -> str:
    """What ``python -m module arguments`` prints, run in a fresh process."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
