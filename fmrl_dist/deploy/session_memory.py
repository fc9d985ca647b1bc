"""What sessions keep of their users' events.

    Recurrences   mixer lru: its state after all events, and the output. An event costs one step, whatever came before.
    LastEvents    every other mixer: the last ``max_length`` events, read as a whole when an output is wanted.

The memory of several sessions is one object, so that they observe and answer together; each has its place in it.

n sessions; D the size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fmrl_dist.deploy.ranking_model import RankingModel

PART = 1 << 16  # float32 holds integers of 16 bits, and more, exactly
ROW_PARTS = 2


class SessionMemory(Protocol):
    """Of n sessions."""

    layout: int  # version of a state's layout

    def observe(self, place: int, row: int) -> None:
        """The next event of a session."""

    def observe_together(self, places: np.ndarray, rows: np.ndarray) -> None:
        """The next event of several sessions, each named once, int64."""

    def outputs(self, places: Sequence[int]) -> np.ndarray:
        """The network's outputs of some sessions, float32 [·, D]; before the first event, of the start position."""

    def history(self, place: int) -> np.ndarray | None:
        """Rows of the events that a session's output is read of; None if it is there without reading."""

    def num_bytes(self, place: int) -> int:
        """Memory that a session takes here."""

    def numbers(self, place: int) -> np.ndarray:
        """All that is kept of a session here, float32 [·]."""

    def num_numbers(self, num_events: int) -> int:
        """How many :meth:`numbers` has after so many events."""

    def read(self, numbers: np.ndarray, num_events: int, seen: Sequence[int]) -> Any:
        """What :meth:`put` takes, of :meth:`numbers`; None if they are damaged, or not of so many events and items."""

    def put(self, place: int, content: Any) -> None:
        """Let a session be the one that was read."""


class Recurrences:
    """The recurrence's state [n, depth, 2, D] and the output [n, D]; numbers: the state, then the output."""

    layout = 1

    def __init__(self, model: RankingModel, num_sessions: int) -> None:
        self._model = model
        self._states = model.one_event.initial_state(num_sessions)
        self._outputs = np.empty((num_sessions, model.size), np.float32)
        self._outputs[...] = model.start_output

    def observe(self, place: int, row: int) -> None:
        self._outputs[place] = self._model.one_event(self._states[place], self._model.item_inputs[row])

    def observe_together(self, places: np.ndarray, rows: np.ndarray) -> None:
        states = self._states[places]
        self._outputs[places] = self._model.one_event(states, self._model.item_inputs[rows])
        self._states[places] = states

    def outputs(self, places: Sequence[int]) -> np.ndarray:
        return self._outputs[places]

    def history(self, place: int) -> None:
        return None

    def num_bytes(self, place: int) -> int:
        return self._states[place].nbytes + self._outputs[place].nbytes

    def numbers(self, place: int) -> np.ndarray:
        return np.concatenate((self._states[place].reshape(-1), self._outputs[place]))

    def num_numbers(self, num_events: int) -> int:
        return self._states[0].size + self._model.size

    def read(self, numbers: np.ndarray, num_events: int, seen: Sequence[int]) -> np.ndarray:
        return numbers

    def put(self, place: int, content: np.ndarray) -> None:
        state, output = np.split(content, [-self._model.size])
        self._states[place], self._outputs[place] = state.reshape(self._states.shape[1:]), output


class LastEvents:
    """Rows of the last events of each session, oldest first; numbers: each in two parts.

    An output is kept until the next event.
    """

    layout = 2

    def __init__(self, model: RankingModel, num_sessions: int) -> None:
        self._model = model
        self._events = [array("q") for _ in range(num_sessions)]
        self._outputs = np.empty((num_sessions, model.size), np.float32)
        self._has_output = np.zeros(num_sessions, bool)

    def observe(self, place: int, row: int) -> None:
        self._events[place].append(row)
        del self._events[place][: -self._model.max_length]
        self._has_output[place] = False

    def observe_together(self, places: np.ndarray, rows: np.ndarray) -> None:
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            self.observe(place, row)

    def outputs(self, places: Sequence[int]) -> np.ndarray:
        missing = [place for place in places if not self._has_output[place]]
        if missing:
            histories = [self.history(place) for place in missing]
            self._outputs[missing], self._has_output[missing] = self._model.last_outputs(histories), True
        return self._outputs[places]

    def history(self, place: int) -> np.ndarray:
        return np.array(self._events[place], np.int64)

    def num_bytes(self, place: int) -> int:
        return self._events[place].itemsize * self._model.max_length + self._outputs[place].nbytes

    def numbers(self, place: int) -> np.ndarray:
        return row_numbers(self.history(place))

    def num_numbers(self, num_events: int) -> int:
        return ROW_PARTS * min(num_events, self._model.max_length)

    def read(self, numbers: np.ndarray, num_events: int, seen: Sequence[int]) -> list[int] | None:
        rows = rows_of_numbers(numbers)
        if rows is None or not set(rows) <= set(seen):
            return None
        num_before = num_events - len(rows)  # events that are kept no longer, whose items are seen all the same
        first_seen = list(dict.fromkeys(rows))
        fits = len(seen) - len(first_seen) <= num_before if num_before else first_seen == list(seen)
        return rows if fits else None

    def put(self, place: int, content: list[int]) -> None:
        self._events[place] = array("q", content)
        self._has_output[place] = False


def session_memory(model: RankingModel, num_sessions: int) -> SessionMemory:
    """Memory of new sessions."""
    return Recurrences(model, num_sessions) if model.has_state else LastEvents(model, num_sessions)


def row_numbers(rows: np.ndarray) -> np.ndarray:
    """Rows [n] as numbers that float32 holds exactly, the lower 16 bits of each first, float32 [2 n]."""
    return np.stack((rows % PART, rows // PART), 1).reshape(-1).astype(np.float32)


def rows_of_numbers(numbers: np.ndarray) -> list[int] | None:
    """What :func:`row_numbers` made them of; None if it did not."""
    rows = [whole_number(pair) for pair in numbers.reshape(-1, ROW_PARTS)]
    return None if None in rows else [row for row in rows if row is not None]


def whole_number(parts: np.ndarray) -> int | None:
    """The integer of its parts of 16 bits, the lowest first; None if they are none."""
    numbers = parts.tolist()
    if not all(0 <= number < PART and number == int(number) for number in numbers):
        return None
    return sum(int(number) << (16 * place) for place, number in enumerate(numbers))
