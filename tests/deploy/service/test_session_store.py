"""Sessions that the service keeps are bounded in number, memory and age."""

from __future__ import annotations

from typing import NamedTuple

from fmrl_dist.deploy.service.session_store import BYTES_OF_SEEN, KeptSession, SessionStore
from tests.fixtures.exports import random_recommender


class Setting(NamedTuple):
    store: SessionStore
    ended: list[str]
    clock: list[float]

    def add(self) -> str:
        return self.store.add(KeptSession(16, random_recommender().session()))


def setting(max_sessions: int = 3, max_bytes: int = 1 << 20) -> Setting:
    ended: list[str] = []
    clock = [0.0]
    return Setting(SessionStore(max_sessions, max_bytes, 10.0, ended.append, lambda: clock[0]), ended, clock)


def test_the_least_recently_used_goes_first() -> None:
    store, ended, _ = s = setting()
    first, second, third = s.add(), s.add(), s.add()
    assert store.get(first) is not None
    fourth = s.add()
    assert [store.get(each) is None for each in (first, second, third, fourth)] == [False, True, False, False]
    assert ended == ["evicted"] and len(store) == 3 and len({first, second, third, fourth}) == 4


def test_a_session_ends_when_nobody_has_used_it() -> None:
    store, ended, clock = s = setting()
    first, second = s.add(), s.add()
    clock[0] = 9.0
    assert store.get(first) is not None
    clock[0] = 11.0
    assert store.get(second) is None and store.get(first) is not None and ended == ["expired"]
    clock[0] = 30.0
    assert len(store) == 0 and not store.delete(first) and ended == ["expired"] * 2


def test_memory_is_bounded_also_where_sessions_grow() -> None:
    store, ended, _ = s = setting(max_sessions=100, max_bytes=15_000)
    ids = [s.add() for _ in range(4)]
    assert len(store) == 4 and not ended
    kept = store.get(ids[0])
    assert kept is not None
    for row in range(30):
        kept.session.observe_row(row)
    store.touch(ids[0])
    assert kept.num_bytes > 30 * BYTES_OF_SEEN
    assert store.get(ids[0]) is kept and len(store) < 4 and set(ended) == {"evicted"}
    assert store.delete(ids[0]) and ended[-1] == "deleted"
    while others := [each for each in ids if store.get(each) is not None]:
        store.delete(others[0])
    assert store._num_bytes == 0
