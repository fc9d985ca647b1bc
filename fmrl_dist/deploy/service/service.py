"""What the service does, without HTTP: recommends, keeps sessions, finds items; within its limits.

Everything here runs on one event loop, but for batches and for work of more than about a millisecond, which threads do.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.deploy.item_filters import RowsOfEach
from fmrl_dist.deploy.item_vocabulary import ItemId, ItemVocabulary, Recommendation
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.service.batcher import Batcher
from fmrl_dist.deploy.service.bodies import Ids, ObserveBody, RecommendBody, SessionBody, StateBody
from fmrl_dist.deploy.service.item_search import ItemSearch
from fmrl_dist.deploy.service.metrics import ServiceMetrics
from fmrl_dist.deploy.service.rank_jobs import RankJob
from fmrl_dist.deploy.service.session_store import KeptSession, SessionStore
from fmrl_dist.deploy.service.settings import ServiceSettings
from fmrl_dist.deploy.session import Session, size_of_state

EVENTS_INLINE = 16  # observed by the event loop itself: a thread takes longer to reach
IDS_INLINE = 2000  # looked up by the event loop itself
STATE_DTYPE = np.dtype("<f4")

T = TypeVar("T")


class NotFoundError(UserError):
    """What an address names is not there."""


class Service:
    """An export that answers requests of several sizes.

    Args:
        exported: what the export holds.
        vocabulary: its items, in the order of the rows.
        sizes: those to serve; the largest answers where a request names none.
        settings: limits.
        retrieval, recall: how lists are found, see :meth:`Recommender.retrieve_by`.
        figures: quality of each size, for the page (:func:`fmrl_dist.deploy.web.api_page.figures_beside`).

    Raises:
        UserError: there is no such size; or as :meth:`Recommender.retrieve_by`.
    """

    def __init__(
        self,
        exported: ExportedModel,
        vocabulary: ItemVocabulary,
        sizes: Sequence[int],
        settings: ServiceSettings,
        retrieval: str = "exact",
        recall: float = 0.99,
        figures: dict[str, Any] | None = None,
    ) -> None:
        self.figures = figures
        self.settings, self.metrics = settings, ServiceMetrics()
        self.recommenders = {size: Recommender(exported, vocabulary, size) for size in sorted(set(sizes))}
        for recommender in self.recommenders.values():
            recommender.retrieve_by(retrieval, recall)
        self.retrieval = retrieval
        self.default_size = max(self.recommenders)
        self.items = ItemSearch(vocabulary)
        self.num_in_flight: Callable[[], int] = lambda: 0  # requests; the gate that counts them puts itself here
        self._vocabulary = vocabulary
        self._pool = ThreadPoolExecutor(settings.threads, "batch")
        self._batchers = self._make_batchers()
        self.sessions = SessionStore(
            settings.max_sessions, settings.max_session_bytes, settings.session_ttl_s, self.metrics.note_session_end
        )
        self.metrics.watch("fmrl_sessions", "Sessions that are kept", lambda: len(self.sessions))
        self.metrics.watch("fmrl_in_flight", "Requests that are being answered", lambda: self.num_in_flight())
        self._warm_up()

    def _make_batchers(self) -> dict[int, Batcher]:
        slots = asyncio.Semaphore(self.settings.threads)

        def batcher(size: int, recommender: Recommender) -> Batcher:
            return Batcher(
                recommender,
                self._pool,
                slots,
                self.settings.max_batch,
                self.settings.max_delay_s,
                lambda waiting: self.num_in_flight() > waiting,
                lambda users: self.metrics.note_batch(size, users),
            )

        return {size: batcher(size, recommender) for size, recommender in self.recommenders.items()}

    def _warm_up(self) -> None:
        """Compute what is kept, before threads could do it twice, and before the first user has to wait for it."""
        for recommender in self.recommenders.values():
            recommender.recommend([[], recommender.item_ids[:1]], 1)
            session = recommender.session(recommender.item_ids[:1])
            session.restore(session.state())
            session.recommend(1)

    def close(self) -> None:
        """End the threads; no request is in flight."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def recommend(self, body: RecommendBody) -> tuple[int, list[list[Recommendation]]]:
        """A list for each history, and the size that made them."""
        size = self._size(body.size)
        limits = self.settings
        _check_count(len(body.histories), limits.max_histories, "histories")
        self._check_k(body.k, len(body.histories))
        for history in body.histories:
            _check_count(len(history), limits.max_history, "events of a history")
        num_ids = sum(map(len, body.histories))
        for name, lists in (("allow", body.allow), ("deny", body.deny)):
            num_ids += self._check_filter(name, lists, len(body.histories))

        def make_job() -> RankJob:
            histories = [self._vocabulary.rows_of(history, body.unknown) for history in body.histories]
            return RankJob(
                body.k,
                histories,
                exclude_seen=body.exclude_seen,
                allow=self._vocabulary.rows_of_lists(body.allow, body.unknown),
                deny=self._vocabulary.rows_of_lists(body.deny, body.unknown),
            )

        job = await in_thread_if(num_ids > IDS_INLINE, make_job)
        return size, await self._batchers[size].rank(job)

    async def open_session(self, body: SessionBody) -> tuple[str, KeptSession]:
        """A new session and its id."""
        session, size = await self._session_of(body.state, body.size, body.history, body.unknown)
        kept = KeptSession(size, session)
        return self.sessions.add(kept), kept

    def kept(self, session_id: str) -> KeptSession:
        """The session of an id.

        Raises:
            NotFoundError: there is none.
        """
        kept = self.sessions.get(session_id)
        if kept is None:
            raise NotFoundError(
                f"there is no session {session_id!r:.60}: it never was, was deleted, or has expired; open another with "
                "POST /v1/sessions"
            )
        return kept

    async def observe(self, session_id: str, body: ObserveBody) -> KeptSession:
        """The session after its next events; of an unknown item, none is observed."""
        kept = self.kept(session_id)
        _check_count(len(body.items), self.settings.max_history, "items")
        rows = self._vocabulary.rows_of(body.items, body.unknown)
        async with kept.lock:
            await _observe(kept.session, rows)
        self.sessions.touch(session_id)
        return kept

    async def recommend_session(
        self, kept: KeptSession, k: int, exclude_seen: bool, allow: Sequence[str] | None, deny: Sequence[str] | None
    ) -> list[Recommendation]:
        """The list of a session that is kept; ids as texts of an address."""
        rows = [
            None if ids is None else self._vocabulary.rows_of([self.items.id_of(text) for text in ids])
            for ids in (allow, deny)
        ]
        async with kept.lock:
            return await self._rank_session(kept.size, kept.session, k, exclude_seen, *rows)

    async def state_of(self, kept: KeptSession) -> str:
        """A session's state as text."""
        async with kept.lock:
            return encode_state(kept.session)

    async def step(self, body: StateBody) -> tuple[int, Session, list[Recommendation]]:
        """A session that the client keeps, after its next events: its size, itself, its list."""
        self._check_k(body.k)
        filters = (body.allow, body.deny)
        rows = await in_thread_if(
            sum(len(ids) for ids in filters if ids is not None) > IDS_INLINE,
            lambda: [self._vocabulary.rows_of_lists(ids, body.unknown) for ids in filters],
        )
        session, size = await self._session_of(body.state, body.size, body.observe, body.unknown)
        found = await self._rank_session(size, session, body.k, body.exclude_seen, *rows) if body.k else []
        return size, session, found

    async def _rank_session(
        self,
        size: int,
        session: Session,
        k: int,
        exclude_seen: bool,
        allow: np.ndarray | RowsOfEach | None,
        deny: np.ndarray | RowsOfEach | None,
    ) -> list[Recommendation]:
        self._check_k(k)
        history = session.history
        output = session.output() if session.is_answered and history is None else None
        # Without an output or a history, the empty history answers: by the start position, or by popularity.
        seen = session.seen if output is not None or history is not None else np.empty(0, np.int64)
        histories = None if history is None else [history]
        job = RankJob(k, [seen], output, exclude_seen, allow, deny, histories)
        return (await self._batchers[size].rank(job))[0]

    async def _session_of(self, state: str | None, size: int | None, history: Ids, unknown: str) -> tuple[Session, int]:
        _check_count(len(history), self.settings.max_history, "events")
        rows = self._vocabulary.rows_of(history, unknown)
        if state is None:
            size = self._size(size)
            session = self.recommenders[size].session()
            await _observe(session, rows)
            return session, size
        numbers = decode_state(state)
        size = self._size(size_of_state(numbers) if size is None else size)
        session = self.recommenders[size].session()
        # In a thread: the state may hold as many items as a body has room for.
        await asyncio.to_thread(session.restore, numbers)
        await _observe(session, rows)
        return session, size

    def find_items(self, query: str, limit: int) -> list[int]:
        """Rows of items whose titles have some words."""
        return self.items.rows(query, limit)

    def row_of(self, text: str) -> int:
        """The row of an id in an address.

        Raises:
            NotFoundError: there is no such item.
        """
        rows = self._vocabulary.rows_of([self.items.id_of(text)], "skip")
        if not len(rows):
            raise NotFoundError(f"there is no item {text!r:.60}; ids are like {self._vocabulary.ids[0]!r:.60}")
        return int(rows[0])

    def item_id(self, row: int) -> ItemId:
        """The external id of a row."""
        return self._vocabulary.ids[row]

    def _size(self, size: int | None) -> int:
        size = self.default_size if size is None else size
        require(size in self.recommenders, f"size {size} is not served; expected one of {list(self.recommenders)}")
        return size

    def _check_k(self, k: int, num_histories: int = 1) -> None:
        require(k <= self.settings.max_k, f"k is {k}; at most {self.settings.max_k} items are answered")
        limit = self.settings.max_answer_items
        require(
            k * num_histories <= limit,
            f"k is {k} for {num_histories} histories; at most {limit} items are answered at once: send fewer histories "
            "or a smaller k",
        )

    def _check_filter(self, name: str, lists: Sequence[object] | None, num_histories: int) -> int:
        """The number of ids of a filter, which must not be too many, or of too many users."""
        if lists is None:
            return 0
        is_of_each = any(ids is None or isinstance(ids, list) for ids in lists)
        require(
            not is_of_each or len(lists) == num_histories,
            f"{name} has {len(lists)} lists; expected one for each of {num_histories} histories",
        )
        if is_of_each:
            return sum(len(ids) for ids in lists if isinstance(ids, list))
        limit = self.settings.max_filtered
        require(
            len(lists) * num_histories <= limit,
            f"{name} has {len(lists)} ids for {num_histories} histories; at most {limit} ids times histories are "
            "filtered: send fewer histories",
        )
        return len(lists)


def encode_state(session: Session) -> str:
    """A session's state as base64 of little-endian float32."""
    return base64.b64encode(session.state().astype(STATE_DTYPE).tobytes()).decode("ascii")


def decode_state(text: str) -> np.ndarray:
    """The numbers of :func:`encode_state`, float32.

    Raises:
        UserError: the text is not base64 of such numbers.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b"?"
    if len(data) % STATE_DTYPE.itemsize:
        raise UserError("state is not base64 of little-endian float32 numbers; send back what the service answered")
    return np.frombuffer(data, STATE_DTYPE).astype(np.float32)


async def _observe(session: Session, rows: np.ndarray) -> None:
    def observe() -> None:
        with np.errstate(all="ignore"):  # a state that a client has made up may overflow; its output is refused
            for row in rows.tolist():
                session.observe_row(row)

    await in_thread_if(len(rows) > EVENTS_INLINE, observe)


async def in_thread_if(is_long: bool, function: Callable[[], T]) -> T:
    """What a function returns; one that takes long keeps the event loop waiting no longer than Python's threads do."""
    return await asyncio.to_thread(function) if is_long else function()


def _check_count(count: int, limit: int, what: str) -> None:
    require(count <= limit, f"{count} {what}; expected at most {limit}")
