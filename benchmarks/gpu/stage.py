"""What all stages share: where they run, what they write, and timing that waits for the device."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.report import write_record
from benchmarks.measuring.timing import Timing

MAX_ROUNDS = 20
MIN_ROUNDS = 3


@dataclass
class StageRun:
    """One stage at work."""

    name: str
    device: torch.device
    is_dry_run: bool
    records: Path
    problems: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, argv: list[str]) -> StageRun:
        parser = argparse.ArgumentParser(f"python -m benchmarks.gpu.{name}")
        parser.add_argument("--records", type=Path, required=True, help="JSON-lines file to append to")
        parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
        arguments = parser.parse_args(argv)
        torch.set_flush_denormal(True)
        device = torch.device("cpu" if arguments.dry_run else "cuda")
        return cls(name, device, arguments.dry_run, arguments.records)

    def record(self, **fields: Any) -> None:
        """Append one result, and print it."""
        write_record(self.records, self.name, fields)
        print(fields, flush=True)

    def refuse(self, problem: str) -> None:
        """Note that results disagree: their timings are not reported, and the stage fails in the end."""
        self.problems.append(problem)
        write_record(self.records, self.name, {"problem": problem})
        print(f"NOT EQUAL: {problem}", file=sys.stderr, flush=True)

    def impls(self, precision: str) -> list[str]:
        """Implementations of the loss to compare; Triton's interpreter has no bfloat16."""
        return ["tiled"] if self.is_dry_run and precision == "bf16" else ["tiled", "triton"]

    def finish(self) -> None:
        sys.exit(1 if self.problems else 0)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one run of ``work``, until the device is done."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def time(self, sides: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, Timing]:
        """Interleaved rounds of all sides, as many as the budget allows, after one round that is not timed."""
        once = sum(self.seconds(side) for side in sides.values())
        rounds = min(max(int(budget_s / max(once, 1e-6)), MIN_ROUNDS), MAX_ROUNDS)
        rounds = MIN_ROUNDS if self.is_dry_run else rounds
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                seconds[name].append(self.seconds(side))
        return {name: Timing(tuple(values)) for name, values in seconds.items()}

    def peak_gib(self, work: Callable[[], object]) -> float:
        """Highest memory allocated on the device during ``work``, in addition to what was there before."""
        if self.device.type != "cuda":
            work()
            return float("nan")
        self.free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where something is not finite."""
    found, expected = (part.detach().double().cpu() for part in (found, expected))
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def worst_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(result, twin) for result, twin in zip(found, expected, strict=True))
