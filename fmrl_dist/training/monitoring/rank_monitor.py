"""Each rank's time and memory, the ranks that others wait for, and a timeout for a run that hangs.

A rank's own work in a step is waiting for data and the forward pass; the backward pass ends on all ranks when the
slowest one ends. A rank whose own work takes much longer than the median rank's delays all others: it is named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import Tensor

from fmrl_dist.base.files import write_atomically
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.training.monitoring.logbook import kept_lines
from fmrl_dist.training.monitoring.step_timer import DATA_WAIT, FORWARD, MEETING, StepTimer

FILE = "ranks.jsonl"
COLUMNS = ("step_s", DATA_WAIT, FORWARD, MEETING, "memory_mb")
SLOW_FACTOR = 1.5  # × the median rank's own work
SLOW_S = 0.01  # per step, minimal excess
JUDGED_EVERY_S = 10.0
OTHERS_S = 5.0  # for the other ranks to write their stacks, before the launcher ends them


class RankMonitor:
    """Timings and memory of all ranks. Use it as a context manager around the steps.

    Args:
        runtime: this process and its group.
        folder: of the run; rank 0 writes ``ranks.jsonl`` there: mean seconds per step between two records, and memory
            (GPU: peak allocated, else resident), each as a list over the ranks.
        first_step: where the run resumes; later records are removed.
        timer: of this process' steps; the training loop restarts it after each record.
        hang_timeout_s: longest time without a sign of life, after which every rank writes its threads' stacks and ends.
    """

    def __init__(
        self, runtime: Runtime, folder: Path, first_step: int, timer: StepTimer, hang_timeout_s: float
    ) -> None:
        self._runtime, self._path, self._timer = runtime, folder / FILE, timer
        self._named = ""
        self._hang_timeout_s = hang_timeout_s
        self._sign_of_life, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._end_a_hang, name="rank-monitor", daemon=True)
        if runtime.is_main:
            write_atomically(self._path, "".join(kept_lines(self._path, first_step)).encode())
        self._forget_own()

    def is_alive(self) -> None:
        """Give a sign of life: a step, an evaluation or a save has ended."""
        self._sign_of_life = time.monotonic()

    def record(self, step: int) -> str:
        """Gather all ranks' means since the last record; all ranks must call it together.

        Returns:
            On rank 0, every ten seconds, a line that names the ranks that others waited for, if it differs from the
            last one; else "".
        """
        timer = self._timer
        steps = max(timer.steps, 1)
        own = [
            timer.elapsed_s / steps,
            *(timer.seconds[name] / steps for name in (DATA_WAIT, FORWARD, MEETING)),
            self._memory_mb(),
        ]
        table = self._runtime.gather(torch.tensor(own, dtype=torch.float64, device=self._runtime.device))
        if not self._runtime.is_main:
            return ""
        columns = {name: [round(value, 6) for value in table[:, i].tolist()] for i, name in enumerate(COLUMNS)}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | columns) + "\n")
        return self._name_slow_ranks(steps, table[:, 1:3].cpu())

    def _name_slow_ranks(self, steps: int, waits_and_forwards: Tensor) -> str:
        self._own += steps * waits_and_forwards
        self._own_steps += steps
        if time.monotonic() - self._judged < JUDGED_EVERY_S:
            return ""
        waits, forwards = (self._own / self._own_steps).T.tolist()
        line = describe_slow_ranks(waits, forwards)
        self._forget_own()
        previous, self._named = self._named, line.partition(":")[0]
        return line if self._named != previous else ""

    def _forget_own(self) -> None:
        self._own, self._own_steps = torch.zeros(self._runtime.world_size, 2, dtype=torch.float64), 0
        self._judged = time.monotonic()

    def _memory_mb(self) -> float:
        if self._runtime.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._runtime.device) / 1e6
        return psutil.Process().memory_info().rss / 1e6

    def _end_a_hang(self) -> None:
        while not self._over.wait(min(self._hang_timeout_s / 4, 1.0)):
            if time.monotonic() - self._sign_of_life < self._hang_timeout_s:
                continue
            print(
                f"error: rank {self._runtime.rank} has not completed a step for {self._hang_timeout_s:.0f} s "
                "(train.hang_timeout_s); all ranks write their stacks and end; resume from the last checkpoint with "
                "--resume auto",
                file=sys.__stderr__,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            time.sleep(OTHERS_S)
            os._exit(1)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()


def describe_slow_ranks(data_wait_s: list[float], forward_s: list[float]) -> str:
    """A line naming the ranks whose own work takes much longer than the median rank's; "" if there are none."""
    own_s = [wait + forward for wait, forward in zip(data_wait_s, forward_s, strict=True)]
    median = sorted(own_s)[(len(own_s) - 1) // 2]
    slow = [rank for rank, own in enumerate(own_s) if own > SLOW_FACTOR * median and own > median + SLOW_S]
    if not slow:
        return ""
    details = ", ".join(
        f"rank {rank} {own_s[rank]:.3f} s per step ({data_wait_s[rank]:.3f} s of it waiting for data)" for rank in slow
    )
    return f"waiting for rank {', '.join(map(str, slow))}: {details}, median {median:.3f} s"
