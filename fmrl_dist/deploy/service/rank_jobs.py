"""The ranking that requests ask for, of many at once: histories to encode, and sessions' outputs.

B users of all jobs, W the width of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmrl_dist.deploy.item_filters import Rows, RowsOfEach, is_per_user
from fmrl_dist.deploy.ranking_model import RankingModel

ALONE = 1 << 16  # rows of filters for all, times users: beyond, a job is not joined with others


@dataclass(frozen=True)
class RankJob:
    """What one request wants ranked."""

    k: int
    seen: Sequence[np.ndarray]  # rows of each user's history; of a session, of its items
    output: np.ndarray | None = None  # of a session, float32 [1, W]; None: encode the histories
    exclude_seen: bool = True
    allow: Rows | RowsOfEach | None = None  # rows, see ItemFilters.of_lists
    deny: Rows | RowsOfEach | None = None
    histories: Sequence[np.ndarray] | None = None  # rows of what each user's output is read of; None: of ``seen``

    @property
    def num_users(self) -> int:
        return len(self.seen)

    @property
    def is_alone(self) -> bool:
        """Whether its filters, repeated for each user, would be too large."""
        shared = (lists for lists in (self.allow, self.deny) if lists is not None and not is_per_user(lists))
        return self.num_users * sum(map(len, shared)) > ALONE


def rank_jobs(model: RankingModel, jobs: Sequence[RankJob]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each job's rows int64 [users, k] and scores float32 [users, k], as ``top_k``'s.

    One job is computed as ``Recommender.recommend`` does it, so it has the same digits. In several, the last digit of a
    score may differ, as in any other batch.

    Raises:
        UserError: as ``Recommender.recommend``; of one job, for all of them.
    """
    num_users = [job.num_users for job in jobs]
    ends = np.cumsum(num_users)
    outputs = np.zeros((sum(num_users), model.width_of_vectors), np.float32)
    answered = np.zeros(len(outputs), bool)
    histories: list[np.ndarray] = []
    encoded: list[int] = []  # users
    for job, end in zip(jobs, ends.tolist(), strict=True):
        first = end - job.num_users
        if job.output is not None:
            outputs[first:end], answered[first:end] = job.output, True
            continue
        for user, rows in enumerate(job.seen if job.histories is None else job.histories, first):
            if len(rows) or model.predict_first:
                answered[user] = True
                histories.append(rows)
                encoded.append(user)
    if encoded:
        outputs[encoded] = model.encode(histories)
    exclude = [rows if job.exclude_seen else None for job in jobs for rows in job.seen]
    rows, scores = model.top_k_or_popular(
        outputs,
        answered,
        max((job.k for job in jobs), default=1),
        exclude if any(job.exclude_seen for job in jobs) else None,
        _joined([job.allow for job in jobs], num_users),
        _joined([job.deny for job in jobs], num_users),
    )
    return [
        (rows[end - job.num_users : end, : job.k], scores[end - job.num_users : end, : job.k])
        for job, end in zip(jobs, ends.tolist(), strict=True)
    ]


def _joined(lists: Sequence[Any], num_users: Sequence[int]) -> Any:
    """A filter of all jobs; of a single one, what it is."""
    if len(lists) == 1:
        return lists[0]
    if all(of_job is None for of_job in lists):
        return None
    joined: list[Any] = []
    for of_job, count in zip(lists, num_users, strict=True):
        joined += of_job if of_job is not None and is_per_user(of_job) else [of_job] * count
    return joined
