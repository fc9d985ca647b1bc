"""Dynamic batching: requests that wait at the same time are encoded and scored together.

A pass over twenty histories takes little longer than one over a single one. A batch starts as soon as a thread is free.
While there is nobody else, a request does not wait at all; else it waits at most ``max_delay_s`` for others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.item_vocabulary import Recommendation
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.service.rank_jobs import RankJob, rank_jobs

Lists = list[list[Recommendation]]
Results = list[Lists | Exception]


class _Waiting(NamedTuple):
    job: RankJob
    answer: asyncio.Future[Lists]


class Batcher:
    """Answers jobs of one size. To be used from one event loop.

    Args:
        recommender: of that size.
        pool: where batches run.
        slots: how many of all sizes run at a time.
        max_batch: users of a batch; a job of more is one by itself.
        max_delay_s: that a job waits for others.
        is_busy: of the number of jobs that wait: whether other requests are under way, for which it is worth to wait.
        on_batch: called with the number of users of each batch.
    """

    def __init__(
        self,
        recommender: Recommender,
        pool: Executor,
        slots: asyncio.Semaphore,
        max_batch: int,
        max_delay_s: float,
        is_busy: Callable[[int], bool],
        on_batch: Callable[[int], None],
    ) -> None:
        self._recommender, self._pool, self._slots = recommender, pool, slots
        self._max_batch, self._max_delay_s = max_batch, max_delay_s
        self._is_busy, self._on_batch = is_busy, on_batch
        self._waiting: deque[_Waiting] = deque()
        self._waiting_users = 0
        self._is_full = asyncio.Event()
        self._last_jobs = 1  # of the last batch
        self._starter: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def rank(self, job: RankJob) -> Lists:
        """The lists of a job's users.

        Raises:
            UserError: as ``Recommender.recommend``; other jobs of the batch are answered.
        """
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._waiting_users += job.num_users
        if self._waiting_users >= self._max_batch:
            self._is_full.set()
        if self._starter is None:
            self._starter = asyncio.create_task(self._start_batches())
        return await waiting.answer

    async def _start_batches(self) -> None:
        try:
            while self._waiting:
                await self._slots.acquire()
                if self._last_jobs > 1 or self._is_busy(len(self._waiting)):
                    await self._wait_for_others()
                batch = self._take()
                self._last_jobs = len(batch)
                running = asyncio.create_task(self._run(batch))
                self._running.add(running)
                running.add_done_callback(self._running.discard)
        finally:
            self._starter = None

    async def _wait_for_others(self) -> None:
        self._is_full.clear()
        if self._waiting_users < self._max_batch:
            try:
                await asyncio.wait_for(self._is_full.wait(), self._max_delay_s)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        batch = [self._waiting.popleft()]
        num_users = batch[0].job.num_users
        while self._waiting and not batch[0].job.is_alone and not self._waiting[0].job.is_alone:
            num_users += self._waiting[0].job.num_users
            if num_users > self._max_batch:
                break
            batch.append(self._waiting.popleft())
        self._waiting_users -= sum(each.job.num_users for each in batch)
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        jobs = [each.job for each in batch]
        try:
            self._on_batch(sum(job.num_users for job in jobs))
            results = await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, jobs)
        except BaseException as error:  # a pool that is shut down, a task that is cancelled
            results = [error if isinstance(error, Exception) else RuntimeError("the service ends")] * len(jobs)
        finally:
            self._slots.release()
        for each, result in zip(batch, results, strict=True):
            if each.answer.done():  # its request was cancelled
                continue
            if isinstance(result, Exception):
                each.answer.set_exception(result)
            else:
                each.answer.set_result(result)

    def _answer(self, jobs: list[RankJob]) -> Results:
        try:
            with np.errstate(all="ignore"):
                ranked = rank_jobs(self._recommender.model, jobs)
            return [self._recommender.vocabulary.named(rows, scores) for rows, scores in ranked]
        except UserError as error:
            if len(jobs) == 1:
                return [error]
        return [result for job in jobs for result in self._answer([job])]  # one job's mistake is not the others'
