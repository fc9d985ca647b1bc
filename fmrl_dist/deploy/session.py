"""Sessions: users whose history grows, at a bounded cost per event.

With mixer lru, a session is the exact recurrence over all events that it has observed. Up to ``max_length`` events that
is what ``Recommender.recommend`` says for the same history; of a longer one, ``recommend`` reads the last
``max_length`` events only, as an evaluation does. With other mixers a session reads these, too, so that it always says
what ``recommend`` says (:mod:`fmrl_dist.deploy.session_memory`).

A state is one float32 array, so that any store of numbers can keep it. docs/deploy.md, "The state of a session", has
its layout: a header of integers, what the session's memory keeps, and the rows of the items that were seen. Integers
are written in parts of 16 bits, the lowest first, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.deploy.item_vocabulary import ItemId, ItemIds, ItemIdsOfEach, ItemVocabulary, Recommendation
from fmrl_dist.deploy.ranking_model import RankingModel
from fmrl_dist.deploy.session_memory import (
    PART,
    ROW_PARTS,
    LastEvents,
    Recurrences,
    SessionMemory,
    row_numbers,
    rows_of_numbers,
    session_memory,
    whole_number,
)

MAGIC = 0x5346  # "FS"
LAYOUTS = (Recurrences.layout, LastEvents.layout)  # versions of a state's layout that are read
# Integers of the header, and the parts of each.
HEADER = {
    "magic": 1,
    "version": 1,
    "size": 1,
    "depth": 1,
    "model": 4,
    "num_items": 2,
    "items": 4,
    "events": 2,
    "seen": 2,
}
HEADER_LENGTH = sum(HEADER.values())


class Session:
    """One user's history, as far as it was observed.

    Args:
        model: ranks the catalogue.
        vocabulary: its items.
        memory: of several sessions, where this one is new; None: its own.
        place: which of them.
    """

    def __init__(
        self, model: RankingModel, vocabulary: ItemVocabulary, memory: SessionMemory | None = None, place: int = 0
    ) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._memory = session_memory(model, 1) if memory is None else memory
        self._place = place
        self._seen: dict[int, None] = {}  # rows, in the order of their first event
        self.num_events = 0

    def observe(self, item_id: ItemId, unknown: str = "error") -> None:
        """The user's next event.

        Raises:
            UserError: there is no such item, and ``unknown`` is "error" rather than "skip".
        """
        for row in self._vocabulary.rows_of([item_id], unknown).tolist():
            self.observe_row(row)

    def observe_row(self, row: int) -> None:
        """:meth:`observe` the item of a row."""
        self._memory.observe(self._place, row)
        self.note(row)

    def note(self, row: int) -> None:
        """Count an event that is in the memory already."""
        self._seen[row] = None
        self.num_events += 1

    @property
    def seen(self) -> np.ndarray:
        """Rows of the items that were observed, in the order of their first event, int64."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    @property
    def num_seen(self) -> int:
        """Items that were observed."""
        return len(self._seen)

    @property
    def num_bytes(self) -> int:
        """What its memory takes, without the items seen."""
        return self._memory.num_bytes(self._place)

    @property
    def is_answered(self) -> bool:
        """Whether the model has an output: not before the first event, unless the start position was trained."""
        return self.num_events > 0 or self._model.predict_first

    @property
    def history(self) -> np.ndarray | None:
        """Rows of the events that the output is read of, int64; None if it is there without reading."""
        return self._memory.history(self._place)

    def output(self) -> np.ndarray:
        """What items are compared with, float32 [1, W].

        Raises:
            UserError: there is none.
        """
        require(self.is_answered, "the session is empty, and the model was trained without loss.predict_first")
        return self._model.compared_outputs(self._memory.outputs([self._place]))

    def recommend(
        self,
        k: int = 10,
        exclude_seen: bool = True,
        allow: ItemIds | None = None,
        deny: ItemIds | None = None,
        unknown: str = "error",
    ) -> list[Recommendation]:
        """The k best next items, the best first; arguments as those of ``Recommender.recommend``, for one user.

        Before the first event, the start position answers; if that was not trained, the most popular items do.
        """
        lists = [self._vocabulary.rows_of_lists(lists, unknown) for lists in (allow, deny)]
        exclude = [self.seen] if exclude_seen else None
        k = self._model.possible_k(k)
        if self.is_answered:
            found = self._model.top_k(self.output(), k, exclude, *lists)
        else:
            found = self._model.popular(1, k, exclude, *lists)
        return self._vocabulary.named(*found)[0]

    def state(self) -> np.ndarray:
        """All of the session in one array, float32, for :meth:`restore`."""
        header = {
            "magic": MAGIC,
            "version": self._memory.layout,
            "size": self._model.size,
            "depth": self._model.model.depth,
            "model": _hash_bits(self._model.model_sha256),
            "num_items": self._model.num_items,
            "items": _hash_bits(self._vocabulary.sha256(self._model.num_items)),
            "events": self.num_events,
            "seen": len(self._seen),
        }
        numbers = [part for name, value in header.items() for part in _parts(value, HEADER[name])]
        return np.concatenate((numbers, self._memory.numbers(self._place), row_numbers(self.seen)), dtype=np.float32)

    def restore(self, state: np.ndarray | Sequence[float]) -> None:
        """Become the session that a :meth:`state` is of.

        Items may have been appended to the catalogue since.

        Raises:
            UserError: it is no state, is damaged, or of another model, size or catalogue. The session stays as it was.
        """
        array, header = _read_header(state)
        model = self._model
        for name, value, what in (
            ("size", model.size, "size"),
            ("depth", model.model.depth, "depth"),
            ("model", _hash_bits(model.model_sha256), "model, hash"),
            ("version", self._memory.layout, "layout of states"),
        ):
            require(
                header[name] == value, f"the state is of another model: {what} {header[name]}; this one has {value}"
            )
        known = header["num_items"]
        require(
            known <= model.num_items and header["items"] == _hash_bits(self._vocabulary.sha256(known)),
            f"the state is of another catalogue of {known} items, not of the first of these {model.num_items}",
        )
        end_of_memory = HEADER_LENGTH + self._memory.num_numbers(header["events"])
        end = end_of_memory + ROW_PARTS * header["seen"]
        require(len(array) == end, f"the state has {len(array)} numbers; expected {end}: it is cut or damaged")
        seen = rows_of_numbers(array[end_of_memory:])
        content = (
            None if seen is None else self._memory.read(array[HEADER_LENGTH:end_of_memory], header["events"], seen)
        )
        if (
            seen is None
            or content is None
            or not np.isfinite(array).all()
            or len(set(seen)) < len(seen)
            or max(seen, default=-1) >= known
            or not min(1, header["events"]) <= len(seen) <= header["events"]
        ):
            raise UserError("the state is damaged: it holds numbers or items that no session has")
        self._memory.put(self._place, content)
        self._seen = dict.fromkeys(seen)
        self.num_events = header["events"]


class Sessions:
    """Sessions that observe and answer together, at a fraction of the cost of each by itself.

    ``sessions[i]`` is a :class:`Session`, which may also be used alone.

    Args:
        model: ranks the catalogue.
        vocabulary: its items.
        num_sessions: n.
    """

    def __init__(self, model: RankingModel, vocabulary: ItemVocabulary, num_sessions: int) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._memory = session_memory(model, num_sessions)
        self._sessions = [Session(model, vocabulary, self._memory, place) for place in range(num_sessions)]

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, place: int) -> Session:
        return self._sessions[place]

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    def observe(self, item_ids: Sequence[ItemId | None], unknown: str = "error") -> None:
        """The next event of each session; None where there is none.

        Raises:
            UserError: there is no such item, and ``unknown`` is "error" rather than "skip"; nothing was observed.
        """
        require(
            len(item_ids) == len(self), f"{len(item_ids)} ids; expected one (or None) for each of {len(self)} sessions"
        )
        self._vocabulary.rows_of([item_id for item_id in item_ids if item_id is not None], unknown)
        found = [self._vocabulary.rows_of([] if item_id is None else [item_id], unknown) for item_id in item_ids]
        places = np.flatnonzero([len(rows) for rows in found])
        if len(places) == 0:
            return
        rows = np.concatenate(found)
        self._memory.observe_together(places, rows)
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            self._sessions[place].note(row)

    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """What items are compared with, float32 [n, W], of those sessions that have an output, bool [n]."""
        answered = np.array([session.is_answered for session in self], bool)
        outputs = np.zeros((len(self), self._model.width_of_vectors), np.float32)
        outputs[answered] = self._model.compared_outputs(self._memory.outputs(np.flatnonzero(answered).tolist()))
        return outputs, answered

    def recommend(
        self,
        k: int = 10,
        exclude_seen: bool = True,
        allow: ItemIds | ItemIdsOfEach | None = None,
        deny: ItemIds | ItemIdsOfEach | None = None,
        unknown: str = "error",
    ) -> list[list[Recommendation]]:
        """The k best next items of each session; arguments as those of ``Recommender.recommend``."""
        filters = [self._vocabulary.rows_of_lists(lists, unknown) for lists in (allow, deny)]
        exclude = [session.seen for session in self] if exclude_seen else None
        outputs, answered = self.outputs()
        found = self._model.top_k_or_popular(outputs, answered, k, exclude, *filters)
        return self._vocabulary.named(*found)

    def state(self) -> list[np.ndarray]:
        """Each session's :meth:`Session.state`."""
        return [session.state() for session in self]

    def restore(self, states: Sequence[np.ndarray | Sequence[float]]) -> None:
        """Each session's :meth:`Session.restore`.

        Raises:
            UserError: there is not one for each session, or one cannot be restored; those before it are.
        """
        require(len(states) == len(self), f"{len(states)} states; expected one for each of {len(self)} sessions")
        for session, state in zip(self, states, strict=True):
            session.restore(state)


def size_of_state(state: np.ndarray | Sequence[float]) -> int:
    """The size whose sessions can be restored from a state.

    Raises:
        UserError: it is no state.
    """
    return _read_header(state)[1]["size"]


def _read_header(state: np.ndarray | Sequence[float]) -> tuple[np.ndarray, dict[str, int]]:
    """A state as float32, and the integers of its header.

    Raises:
        UserError: it is no state.
    """
    try:
        array = np.asarray(state)
        is_array = array.ndim == 1 and array.dtype.kind == "f" and len(array) >= HEADER_LENGTH
    except ValueError:  # ragged
        is_array = False
    require(is_array, f"{type(state).__name__} is no state of a session; expected what Session.state() returns")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    parts = np.split(array[:HEADER_LENGTH], np.cumsum(list(HEADER.values()))[:-1])
    header = {name: whole_number(numbers) for name, numbers in zip(HEADER, parts, strict=True)}
    if header["magic"] != MAGIC or None in header.values():
        raise UserError("the array is no state of a session; expected what Session.state() returns")
    if header["version"] not in LAYOUTS:
        raise UserError(f"the state has version {header['version']}; this version reads {LAYOUTS[0]} and {LAYOUTS[1]}")
    return array, {name: value for name, value in header.items() if value is not None}


def _hash_bits(sha256: str) -> int:
    """The first 64 bits of a hash."""
    return int(sha256[:16], 16)


def _parts(value: int, count: int) -> list[int]:
    return [value >> (16 * place) & (PART - 1) for place in range(count)]
