"""Requests that are answered together are answered as each alone, and one's mistake is not the others'."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="the serve extra is not installed")

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.service.batcher import Batcher
from fmrl_dist.deploy.service.rank_jobs import ALONE, RankJob, rank_jobs
from tests.fixtures.exports import random_export, random_model, random_recommender


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("predict_first", [True, False])
def test_jobs_together_are_each_alone(predict_first: bool) -> None:
    """Of all kinds: several histories, empty ones, sessions, filters for all and for each, different k."""
    recommender = random_recommender(random_export(predict_first=predict_first), size=8)
    session = recommender.session(["i3", "i4"])
    jobs = [
        RankJob(5, [rows(1, 2), rows(), rows(*range(20))]),
        RankJob(2, [session.seen], session.output()),
        RankJob(40, [rows(7)], exclude_seen=False),
        RankJob(3, [rows(), rows(9)], allow=rows(1, 2, 3, 4), deny=[rows(1), None]),
        RankJob(3, [rows(5)], allow=[rows(2, 8)], deny=rows(8)),
        RankJob(1, [rows(5)], allow=rows()),
    ]
    together = rank_jobs(recommender.model, jobs)
    for job, (found, scores) in zip(jobs, together, strict=True):
        alone, alone_scores = rank_jobs(recommender.model, [job])[0]
        assert found.tolist() == alone.tolist()
        np.testing.assert_allclose(scores, alone_scores, rtol=1e-5, atol=1e-6)
        assert found.shape == (job.num_users, job.k)
    ids = recommender.vocabulary.named(*together[1])[0]
    assert [item.item_id for item in ids] == [item.item_id for item in session.recommend(2)]


@pytest.mark.parametrize("predict_first", [True, False])
def test_sessions_that_keep_events_are_read_together(predict_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass with histories; what was seen long ago is left out, and not read."""
    exported = random_export(random_model(mixer="attention", window=6), predict_first=predict_first)
    recommender = random_recommender(exported, size=8)
    sessions = [recommender.session([f"i{item}" for item in items]) for items in ([3, 4], [], range(20))]
    jobs = [RankJob(12, [each.seen], histories=[given(each.history)]) for each in sessions]
    passes: list[int] = []
    read = recommender.model.encode

    def counted(histories: Sequence[np.ndarray]) -> np.ndarray:
        passes.append(len(histories))
        return read(histories)

    monkeypatch.setattr(recommender.model, "encode", counted)
    together = rank_jobs(recommender.model, [*jobs, RankJob(12, [rows(3, 4)])])
    assert passes == [4 if predict_first else 3]
    lists = [recommender.vocabulary.named(*found)[0] for found in together]
    for found, session in zip(lists, sessions, strict=False):
        expected = session.recommend(12)
        assert [item.item_id for item in found] == [item.item_id for item in expected]
        assert [item.score for item in found] == pytest.approx([item.score for item in expected], rel=1e-5)
    assert [item.item_id for item in lists[0]] == [item.item_id for item in lists[3]]
    assert {item.item_id for item in lists[2] if np.isfinite(item.score)} <= {f"i{item}" for item in range(20, 30)}


def given(history: np.ndarray | None) -> np.ndarray:
    assert history is not None
    return history


def answers(
    *jobs: RankJob, max_batch: int = 8, max_delay_s: float = 0.05, is_busy: Callable[[int], bool] = lambda _: True
) -> tuple[list, list]:
    """What a batcher answers to jobs that come at once, and the users of its batches."""
    recommender = random_recommender()
    batches: list[int] = []

    async def ask() -> list:
        with ThreadPoolExecutor(1) as pool:
            slots = asyncio.Semaphore(1)
            batcher = Batcher(recommender, pool, slots, max_batch, max_delay_s, is_busy, batches.append)
            return await asyncio.gather(*(batcher.rank(job) for job in jobs), return_exceptions=True)

    return asyncio.run(ask()), batches


def test_one_request_spoils_no_other() -> None:
    """A session's output that is not finite: only its request is refused."""
    good, bad = RankJob(3, [rows(1)]), RankJob(3, [rows(1)], np.full((1, 16), np.nan, np.float32))
    (first, refused, second), batches = answers(good, bad, good)
    assert batches == [3]
    assert isinstance(refused, UserError) and "not finite" in str(refused)
    assert first == second == random_recommender().recommend([["i1"]], 3)


def test_batches_have_their_limit() -> None:
    found, batches = answers(*[RankJob(2, [rows(1), rows(2)])] * 5, RankJob(2, [rows(1)] * 9), max_batch=4)
    assert batches == [4, 4, 2, 9]
    assert [len(lists) for lists in found] == [2, 2, 2, 2, 2, 9]


def test_large_filters_are_not_repeated_for_each_user() -> None:
    many = RankJob(2, [rows(1)] * 2200, deny=np.arange(30, dtype=np.int64))
    assert many.is_alone and many.num_users * 30 > ALONE
    found, batches = answers(RankJob(2, [rows(1)]), many, RankJob(2, [rows(1)]), max_batch=5000)
    assert batches == [1, 2200, 1]
    assert found[1] == [[]] * 2200


def test_nobody_waits_for_nobody() -> None:
    """A delay of ten minutes would end the test."""
    _, batches = answers(RankJob(2, [rows(1)]), max_delay_s=600, is_busy=lambda _: False)
    assert batches == [1]
    _, batches = answers(*[RankJob(2, [rows(1)])] * 3, max_delay_s=600, is_busy=lambda _: False)
    assert batches == [3], "those that have come are answered together"
