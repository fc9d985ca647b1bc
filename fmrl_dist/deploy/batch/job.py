"""The loop of a job: batches of users to lists, by one thread or several, to the parts of an output or to a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import torch

from fmrl_dist.base.errors import require
from fmrl_dist.base.progress import Progress
from fmrl_dist.deploy.batch.list_files import JsonLinesPart
from fmrl_dist.deploy.batch.output_folder import JobRecord, OutputFolder
from fmrl_dist.deploy.batch.user_batches import Share, UserBatch

MakeLists = Callable[[UserBatch], pa.Table]


@dataclass
class ListCounts:
    """What a process, or all of them, have worked on."""

    users: int = 0
    empty: int = 0  # histories without a known item
    unknown: int = 0  # ids that were left out

    def add(self, batch: UserBatch) -> None:
        self.users += len(batch.users)
        self.empty += sum(len(rows) == 0 for rows in batch.histories)
        self.unknown += batch.num_unknown


def one_thread_each() -> None:
    """Have this thread compute by itself, in the arithmetic that all threads of a job use."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def answered(batches: Iterable[UserBatch], make_lists: MakeLists, threads: int) -> Iterator[tuple[UserBatch, pa.Table]]:
    """Each batch with its lists, in order. A batch is one thread's work, so lists do not depend on their number."""
    if threads == 1:
        one_thread_each()
        for batch in batches:
            yield batch, make_lists(batch)
        return
    waiting: deque[tuple[UserBatch, Future[pa.Table]]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=one_thread_each)
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(make_lists, batch)))
            if len(waiting) > threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_parts(
    batches: Iterable[UserBatch],
    make_lists: MakeLists,
    output: OutputFolder,
    record: JobRecord,
    share: Share,
    threads: int,
    progress: Progress,
) -> ListCounts:
    """Write the parts of a share.

    Raises:
        UserError: the input cannot be read, or has other users than were counted; parts before that are complete.
    """
    counts = ListCounts()
    pairs = answered(batches, make_lists, threads)
    for pair in pairs:
        part, before = pair[0].first // share.part_users, counts.users
        with output.part(part, record.identity) as writer:
            following: tuple[UserBatch, pa.Table] | None = pair
            while following is not None:
                batch, table = following
                writer.write(table)
                counts.add(batch)
                progress.advance(len(batch.users))
                is_last = batch.end % share.part_users == 0  # then the part is closed before more is read
                following = None if is_last else next(pairs, None)
            require(
                not record.input or counts.users - before == record.users_of(part),
                f"part {part} has {counts.users - before:,} users, and was to have {record.users_of(part):,}; has the "
                "input changed while it was read?",
            )
    return counts


def write_stream(
    batches: Iterable[UserBatch], make_lists: MakeLists, stream: BinaryIO, threads: int, progress: Progress
) -> ListCounts:
    """Write all lists to a stream as JSON Lines, each batch as soon as it is done."""
    counts, writer = ListCounts(), JsonLinesPart(stream)
    for batch, table in answered(batches, make_lists, threads):
        writer.write(table)
        stream.flush()
        counts.add(batch)
        progress.advance(len(batch.users))
    return counts
