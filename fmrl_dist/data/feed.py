"""Batches of one rank, read ahead by worker processes, starting at any step.

Lanes are divided among the workers, so that each block is read by as few workers as possible; the workers deliver their
parts of each step in turn. They are PyTorch DataLoader workers: they end with the training process, and one that dies
or stalls ends the run within a set time. Parts travel through pipes, so a container's small ``/dev/shm`` is no problem.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parent_process import end_with_parent
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.train_stream import LaneWindows, TrainStream

READ_AHEAD = 8  # steps per worker
KILLED_S = 5.0  # longest wait for a killed worker to end


class BatchFeed:
    """The batches of ``lanes``, one step after another. Use it as a context manager: it ends the workers.

    Args:
        stream: what to read.
        lanes: of this rank.
        total_steps: of the whole run; nothing is read beyond it.
        num_workers: processes that read ahead; 0 reads each batch on request.
        timeout_s: longest wait for a worker; no limit without workers.
        micro_batches: number of parts each batch is divided into, by lanes.
    """

    def __init__(
        self,
        stream: TrainStream,
        lanes: Sequence[int],
        total_steps: int,
        num_workers: int,
        timeout_s: float,
        micro_batches: int = 1,
    ) -> None:
        self._micro_batches = micro_batches
        self._stream, self._lanes, self._total_steps = stream, lanes, total_steps
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._next_step = -1
        self._parts: Iterator[LaneWindows | Failure] = iter(())
        self._workers: list[BaseProcess] = []

    def batches(self, step: int) -> tuple[list[Packed], list[int]]:
        """This rank's micro-batches at ``step`` of the whole run, and the damaged blocks that were left out.

        Raises:
            UserError: a block is damaged, the source fails, or a worker died or took too long.
        """
        if step != self._next_step:
            self._start_at(step)
        parts: list[LaneWindows] = []
        for _ in range(max(self._num_workers, 1)):
            part = next(self._parts)
            if isinstance(part, Failure):
                raise UserError(part.message)
            parts.append(part)
        self._next_step = step + 1
        batches = [self._stream.pack(parts, self._lanes[i :: self._micro_batches]) for i in range(self._micro_batches)]
        return batches, [int(b) for part in parts for b in part.damaged]

    def change_stream(self, stream: TrainStream) -> None:
        """Switch to another stream from the next batch on; batches read ahead are dropped."""
        self._stream, self._next_step, self._parts = stream, -1, iter(())

    def _start_at(self, step: int) -> None:
        loader = DataLoader(
            Parts(self._stream, self._lanes, step, self._total_steps),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            prefetch_factor=READ_AHEAD if self._num_workers else None,
            timeout=self._timeout_s if self._num_workers else 0,
            worker_init_fn=partial(_start_worker, os.getpid()),
            multiprocessing_context="fork" if self._num_workers else None,  # workers share open files and imports
        )
        others = active_children()
        self._parts = iter(loader)
        self._workers = [process for process in active_children() if process not in others]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parts = iter(())
        for worker in self._workers:
            # Workers have been asked to end. One that is stopped, or waits for a dead disk, would keep this process
            # from ending. A signal notifies the DataLoader of a dead worker; it then raises wherever this process is.
            with contextlib.suppress(RuntimeError):
                worker.kill()
            with contextlib.suppress(RuntimeError):
                worker.join(KILLED_S)
        if isinstance(error, RuntimeError) and "DataLoader" in str(error):
            raise UserError(
                f"a reading worker died or sent nothing for {self._timeout_s:g} s "
                f"({' '.join(str(error).split())}); check for exhausted memory or a stalled source (see train.workers "
                "and train.worker_timeout_s), then resume with --resume auto"
            ) from None


@dataclass(frozen=True)
class Failure:
    """What a worker sends instead of a part that it cannot read."""

    message: str


class Parts(IterableDataset[LaneWindows | Failure]):
    """The parts of one reader, or of each worker, starting at a step."""

    def __init__(self, stream: TrainStream, lanes: Sequence[int], first_step: int, total_steps: int) -> None:
        self._stream, self._lanes = stream, lanes
        self._steps = range(first_step, total_steps)

    def __iter__(self) -> Iterator[LaneWindows | Failure]:
        worker = get_worker_info()
        reader, num_readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in self._steps:
            epoch, step_of_epoch = divmod(step, self._stream.order.steps_per_epoch)
            try:
                yield self._stream.read(epoch, step_of_epoch, self._lanes, reader, num_readers)
            except UserError as error:  # the training process reports it, in one line
                yield Failure(str(error))
                return


def _start_worker(rank: int, _worker: int) -> None:
    """Tie a worker to its rank, a process id: it ends with it, and leaves a job's signals to it.

    A job's signals reach all of its processes, but a rank that must save still needs its workers for a step, and one
    that cleans up must not be interrupted by the news that they have ended.
    """
    end_with_parent(rank)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(part: Any) -> Any:
    return part
