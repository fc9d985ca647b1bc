"""Sessions: users whose history grows, at a cost per event that does not depend on its length.

A session is the exact recurrence over all events that it has observed. Up to ``max_length`` events that is what
``Recommender.recommend`` says for the same history; of a longer one, ``recommend`` reads the last ``max_length`` events
only, as an evaluation does.

A state is one float32 array, so that any store of numbers can keep it. docs/deploy.md, "The state of a session", has
its layout: a header of integers, the recurrence's state [depth, 2, D], the output [D] and the rows of the items that
were seen. Integers are written in parts of 16 bits, the lowest first, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.deploy.item_vocabulary import ItemId, ItemIds, ItemIdsOfEach, ItemVocabulary, Recommendation
from fmrl_dist.deploy.ranking_model import RankingModel

MAGIC, STATE_VERSION = 0x5346, 1  # "FS"
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
ROW_PARTS = 2
PART = 1 << 16


class Session:
    """One user's history, as far as it was observed.

    Args:
        model: ranks the catalogue.
        vocabulary: its items.
        state: memory for the recurrence's state, float32 [depth, 2, D]; None: its own.
        output: memory for the output, float32 [D]; None: its own.
    """

    def __init__(
        self,
        model: RankingModel,
        vocabulary: ItemVocabulary,
        state: np.ndarray | None = None,
        output: np.ndarray | None = None,
    ) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._state = model.one_event.initial_state() if state is None else state
        self._output = np.empty(model.size, np.float32) if output is None else output
        self._state[...], self._output[...] = 0, model.start_output
        self._seen: dict[int, None] = {}  # rows, in the order of their first event
        self.num_events = 0

    def observe(self, item_id: ItemId, unknown: str = "error") -> None:
        """The user's next event. Its cost does not depend on the number of those before.

        Raises:
            UserError: there is no such item, and ``unknown`` is "error" rather than "skip".
        """
        for row in self._vocabulary.rows_of([item_id], unknown).tolist():
            self.observe_row(row)

    def observe_row(self, row: int) -> None:
        """:meth:`observe` the item of a row."""
        model = self._model
        self._output[...] = model.one_event(self._state, model.item_inputs[row])
        self.note(row)

    def note(self, row: int) -> None:
        """Count an event that is part of the state already."""
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
        """Memory of the recurrence's state and of the output."""
        return self._state.nbytes + self._output.nbytes

    @property
    def is_answered(self) -> bool:
        """Whether the model has an output: not before the first event, unless the start position was trained."""
        return self.num_events > 0 or self._model.predict_first

    def output(self) -> np.ndarray:
        """What items are compared with, float32 [1, W].

        Raises:
            UserError: there is none.
        """
        require(self.is_answered, "the session is empty, and the model was trained without loss.predict_first")
        return self._model.compared_outputs(self._output[None])

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
        if self.is_answered:
            found = self._model.top_k(self.output(), k, exclude, *lists)
        else:
            found = self._model.popular(1, k, exclude, *lists)
        return self._vocabulary.named(*found)[0]

    def state(self) -> np.ndarray:
        """All of the session in one array, float32, for :meth:`restore`."""
        header = {
            "magic": MAGIC,
            "version": STATE_VERSION,
            "size": self._model.size,
            "depth": self._model.one_event.depth,
            "model": _hash_bits(self._model.model_sha256),
            "num_items": self._model.num_items,
            "items": _hash_bits(self._vocabulary.sha256(self._model.num_items)),
            "events": self.num_events,
            "seen": len(self._seen),
        }
        numbers = [part for name, value in header.items() for part in _parts(value, HEADER[name])]
        seen = self.seen
        rows = np.stack((seen % PART, seen // PART), 1).reshape(-1)
        return np.concatenate((numbers, self._state.reshape(-1), self._output, rows), dtype=np.float32)

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
            ("depth", model.one_event.depth, "depth"),
            ("model", _hash_bits(model.model_sha256), "model, hash"),
        ):
            require(
                header[name] == value, f"the state is of another model: {what} {header[name]}; this one has {value}"
            )
        known = header["num_items"]
        require(
            known <= model.num_items and header["items"] == _hash_bits(self._vocabulary.sha256(known)),
            f"the state is of another catalogue of {known} items, not of the first of these {model.num_items}",
        )
        ends = HEADER_LENGTH + np.cumsum([self._state.size, self._output.size, ROW_PARTS * header["seen"]])
        require(
            len(array) == ends[-1], f"the state has {len(array)} numbers; expected {ends[-1]}: it is cut or damaged"
        )
        recurrent, output, rows = np.split(array[HEADER_LENGTH:], ends[:2] - HEADER_LENGTH)
        seen = [_whole(pair) for pair in rows.reshape(-1, ROW_PARTS)]
        require(
            bool(np.isfinite(array).all())
            and None not in seen
            and len(set(seen)) == len(seen)
            and all(row < known for row in seen if row is not None)
            and min(1, header["events"]) <= len(seen) <= header["events"],
            "the state is damaged: it holds numbers or items that no session has",
        )
        self._state[...], self._output[...] = recurrent.reshape(self._state.shape), output
        self._seen = {row: None for row in seen if row is not None}
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
        self._states = model.one_event.initial_state(num_sessions)
        self._outputs = np.empty((num_sessions, model.size), np.float32)
        self._sessions = [Session(model, vocabulary, *both) for both in zip(self._states, self._outputs, strict=True)]

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
        states = self._states[places]
        self._outputs[places] = self._model.one_event(states, self._model.item_inputs[rows])
        self._states[places] = states
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            self._sessions[place].note(row)

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
        answered = np.array([session.is_answered for session in self], bool)
        outputs = np.zeros((len(self), self._model.width_of_vectors), np.float32)
        outputs[answered] = self._model.compared_outputs(self._outputs[answered])
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
    header = {name: _whole(numbers) for name, numbers in zip(HEADER, parts, strict=True)}
    if header["magic"] != MAGIC or None in header.values():
        raise UserError("the array is no state of a session; expected what Session.state() returns")
    if header["version"] != STATE_VERSION:
        raise UserError(f"the state has version {header['version']}; this version reads {STATE_VERSION}")
    return array, {name: value for name, value in header.items() if value is not None}


def _hash_bits(sha256: str) -> int:
    """The first 64 bits of a hash."""
    return int(sha256[:16], 16)


def _parts(value: int, count: int) -> list[int]:
    return [value >> (16 * place) & (PART - 1) for place in range(count)]


def _whole(parts: np.ndarray) -> int | None:
    """The integer of some parts; None if they are none."""
    numbers = parts.tolist()
    if not all(0 <= number < PART and number == int(number) for number in numbers):
        return None
    return sum(int(number) << (16 * place) for place, number in enumerate(numbers))
