"""The event loop goes on answering others while one request is large."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.service import app
from fmrl_dist.deploy.service.answers import json_answer
from fmrl_dist.deploy.service.bodies import RecommendBody, StateBody
from fmrl_dist.deploy.service.service import IDS_INLINE, Service
from fmrl_dist.deploy.service.settings import ServiceSettings
from tests.fixtures.exports import ids_of, random_export, vocabulary_bytes

NUM_ITEMS = 60


@pytest.fixture
def service() -> Iterator[Service]:
    vocabulary = ItemVocabulary(vocabulary_bytes(ids_of(NUM_ITEMS)), "vocab.parquet")
    service = Service(random_export(num_items=NUM_ITEMS), vocabulary, [8], ServiceSettings())
    yield service
    service.close()


def noting_threads(function: Callable[..., Any], threads: list[int]) -> Callable[..., Any]:
    def noted(*arguments: Any, **named: Any) -> Any:
        threads.append(threading.get_ident())
        return function(*arguments, **named)

    return noted


@pytest.mark.parametrize(("num_ids", "is_elsewhere"), [(IDS_INLINE, False), (IDS_INLINE + 1, True)])
def test_long_filters_are_looked_up_by_a_thread(service: Service, num_ids: int, is_elsewhere: bool) -> None:
    threads: list[int] = []
    vocabulary = service.recommenders[8].vocabulary
    vocabulary.rows_of_lists = noting_threads(vocabulary.rows_of_lists, threads)  # type: ignore[method-assign]
    ids = ["i1"] * num_ids
    for request in (
        service.step(StateBody.model_validate({"deny": ids, "k": 1})),
        service.recommend(RecommendBody.model_validate({"histories": [], "deny": ids, "k": 1})),
    ):
        threads.clear()
        asyncio.run(request)
        assert len(threads) == 2 and all((thread != threading.get_ident()) == is_elsewhere for thread in threads)


@pytest.mark.parametrize(("num_histories", "is_elsewhere"), [(1, False), (30, True)])
def test_a_large_answer_is_written_by_a_thread(
    service: Service, num_histories: int, is_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(app, "json_answer", noting_threads(json_answer, threads))
    gate: Any = app.build_service_app(service)
    (recommend,) = (route.endpoint for route in gate._app.routes if getattr(route, "path", "") == "/v1/recommend")
    body = RecommendBody.model_validate({"histories": [[]] * num_histories, "k": NUM_ITEMS})
    answer = asyncio.run(recommend(body))
    assert answer.body.count(b'"item_id"') == num_histories * NUM_ITEMS
    assert [thread != threading.get_ident() for thread in threads] == [is_elsewhere]
