"""The sessions that the service keeps: bounded in number, memory and age; the least recently used go first."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from fmrl_dist.deploy.session import Session

BYTES_OF_SESSION, BYTES_OF_SEEN = 3000, 120  # what Python takes for one, and for each item that it has seen


@dataclass
class KeptSession:
    """A session of a size. Hold the lock while using it: a request may wait in the middle of an observation."""

    size: int
    session: Session
    used: float = 0.0
    num_bytes: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SessionStore:
    """Sessions by id. To be used from one event loop.

    Args:
        max_sessions: how many are kept.
        max_bytes: memory of all together, as estimated.
        ttl_s: seconds since its last use after which a session is dropped.
        on_end: called with the reason ("deleted", "expired", "evicted") when one goes.
        clock: seconds.
    """

    def __init__(
        self,
        max_sessions: int,
        max_bytes: int,
        ttl_s: float,
        on_end: Callable[[str], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_sessions, self._max_bytes, self._ttl_s = max_sessions, max_bytes, ttl_s
        self._on_end, self._clock = on_end, clock
        self._sessions: OrderedDict[str, KeptSession] = OrderedDict()  # the least recently used first
        self._num_bytes = 0

    def __len__(self) -> int:
        self._drop_expired()
        return len(self._sessions)

    def add(self, kept: KeptSession) -> str:
        """Keep a session; its id cannot be guessed."""
        session_id = secrets.token_urlsafe(16)
        self._sessions[session_id] = kept
        self.touch(session_id)
        return session_id

    def get(self, session_id: str) -> KeptSession | None:
        """The session, which counts as a use of it; None if there is none."""
        self._drop_expired()
        self.touch(session_id)
        return self._sessions.get(session_id)

    def touch(self, session_id: str) -> None:
        """Note a use, and how large the session has become; nothing if it is gone."""
        kept = self._sessions.get(session_id)
        if kept is None:
            return
        self._sessions.move_to_end(session_id)
        kept.used = self._clock()
        num_bytes = BYTES_OF_SESSION + BYTES_OF_SEEN * kept.session.num_seen + kept.session.num_bytes
        self._num_bytes += num_bytes - kept.num_bytes
        kept.num_bytes = num_bytes
        while len(self._sessions) > self._max_sessions or (
            self._num_bytes > self._max_bytes and len(self._sessions) > 1
        ):
            self._drop(next(iter(self._sessions)), "evicted")

    def delete(self, session_id: str) -> bool:
        """Drop a session; false if there is none."""
        self._drop_expired()
        if session_id not in self._sessions:
            return False
        self._drop(session_id, "deleted")
        return True

    def _drop(self, session_id: str, reason: str) -> None:
        self._num_bytes -= self._sessions.pop(session_id).num_bytes
        self._on_end(reason)

    def _drop_expired(self) -> None:
        oldest = self._clock() - self._ttl_s
        while self._sessions:
            session_id, kept = next(iter(self._sessions.items()))
            if kept.used > oldest:
                return
            self._drop(session_id, "expired")
