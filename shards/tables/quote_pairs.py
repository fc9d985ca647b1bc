"""CSV as it streams through, refused where a quote lacks its pair.

The parser lets text follow a closing quote: `"a" b` is the text `a b`. So two stray quotes, at the starts of two cells,
make one cell of all rows between them, and the row that remains may well have the right number of columns. Hence a text
in quotes that goes over several lines must end with its cell. Within a line, nothing but quotes can be lost.

What each quote does is found for a whole piece of the stream at once. Where all is as it should be, every second quote
opens. Else, quotes that touch are one run. A run of an even number changes nothing (an empty text, or quotes that are
written twice inside one). One of an odd number closes an open text; if none is open it opens one at the start of a
cell, and is part of a text elsewhere.
"""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError

_UNCHANGED = -1  # what was open still is
QUOTES_AS_THEY_ARE = "--data.sequences.csv.quote '' (or data.items) reads quotes as they are"


class PairedQuotes(io.RawIOBase):
    """A stream that gives the bytes of another one, once their quotes are checked.

    Args:
        source: CSV in an encoding that keeps ASCII, such as UTF-8.
        quote: one ASCII character.
        delimiter: likewise.
        longest: bytes that a text in quotes may have.
        file: for messages.
    """

    def __init__(self, source: pa.NativeFile, quote: str, delimiter: str, longest: int, file: Path) -> None:
        super().__init__()
        self._source, self._quote, self._longest, self._file = source, quote.encode(), longest, file
        self._ends_cell = np.zeros(256, np.bool_)
        self._ends_cell[[ord(delimiter), ord("\r"), ord("\n")]] = True
        self._may_touch = self._ends_cell.copy()  # the outside of a quote
        self._may_touch[ord(quote)] = True
        self._before = ord("\n")  # the last byte that was checked
        self._tail = b""  # quotes at the end of the last piece, which may go on in the next
        self._num_lines = 0  # that ended in what was checked
        self._num_bytes = 0  # that were checked
        self._opened: int | None = None  # byte of the quote that is open; None: none is
        self._opened_line, self._is_long = 0, False  # its line, and whether that line has ended

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes.

        Raises:
            UserError: a quote without its pair.
        """
        data: bytes = self._source.read(None if size < 0 else size)
        whole = self._tail + data if self._tail else data
        if not self._num_bytes:
            whole = whole.removeprefix(codecs.BOM_UTF8)
        checked = whole.rstrip(self._quote) if data else whole + b"\n"  # a file's end ends its last cell
        self._tail = whole[len(checked) :]
        if checked:
            self._check(checked)
        if self._opened is not None and (not data or self._num_bytes - self._opened > self._longest):
            end = "to the end of the file" if not data else f"in {self._longest:,} bytes"
            self._refuse(self._opened_line, f"not closed {end}")
        return data

    def _check(self, data: bytes) -> None:
        """Of a piece that does not end with a quote."""
        opened = self._last_opened(data) if self._quote in data else _UNCHANGED
        if opened is None:
            self._opened = None
        elif opened != _UNCHANGED:
            self._opened, self._opened_line = self._num_bytes + opened, self._line_of(data, opened)
            self._is_long = _has_line_end(data[opened:])
        elif self._opened is not None and not self._is_long:
            self._is_long = _has_line_end(data)
        self._before = data[-1]
        self._num_lines += data.count(b"\n")
        self._num_bytes += len(data)

    def _last_opened(self, data: bytes) -> int | None:
        """The place of the quote that is open at the end; None: none is."""
        text, was_open = np.frombuffer(data, np.uint8), self._opened is not None
        quotes = np.flatnonzero(text == self._quote[0])
        before = text[quotes - 1]
        if quotes[0] == 0:
            before[0] = self._before
        opening, closing = slice(was_open, None, 2), slice(not was_open, None, 2)
        if self._may_touch[before[opening]].all() and self._may_touch[text[quotes[closing] + 1]].all():
            # As it should be. Quotes that are written twice close and open again.
            if (was_open + len(quotes)) % 2 == 0:
                return None
            texts = quotes[opening][before[opening] != self._quote[0]]
            return int(texts[-1]) if len(texts) else _UNCHANGED
        return self._last_opened_of_any(data, quotes)

    def _last_opened_of_any(self, data: bytes, quotes: np.ndarray) -> int | None:
        """Likewise, where some quotes are parts of texts, or some texts go on after their closing quote."""
        text, was_open = np.frombuffer(data, np.uint8), self._opened is not None
        starts, ends = _odd_runs(quotes)
        if not len(starts):
            return _UNCHANGED
        before = text[starts - 1]
        if starts[0] == 0:
            before[0] = self._before
        is_open = _open_after(self._ends_cell[before], was_open)
        closes = np.concatenate([[was_open], is_open[:-1]])
        for run in np.flatnonzero(closes & ~self._ends_cell[text[ends]]):
            opened, closed = int(starts[run - 1]) if run else 0, int(starts[run])
            if _has_line_end(data[opened:closed]) or (run == 0 and self._is_long):
                line = self._line_of(data, opened) if run else self._opened_line
                self._refuse(line, f"closed amid text in line {self._line_of(data, closed):,}")
        return int(starts[-1]) if is_open[-1] else None

    def _line_of(self, data: bytes, at: int) -> int:
        return self._num_lines + data.count(b"\n", 0, at) + 1

    def _refuse(self, line: int, what: str) -> NoReturn:
        raise UserError(
            f"table {self._file}: a text in quotes that begins in line {line:,} is {what}; is it a quote without its "
            f"pair? {QUOTES_AS_THEY_ARE}"
        )


def _odd_runs(quotes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, int64, of the runs of an odd number of quotes, from the places of all quotes."""
    is_first = np.ones(len(quotes), np.bool_)
    np.not_equal(quotes[1:], quotes[:-1] + 1, out=is_first[1:])
    first = np.flatnonzero(is_first)
    lengths = np.diff(first, append=len(quotes))
    is_odd = lengths % 2 == 1
    starts = quotes[first[is_odd]]
    return starts, starts + lengths[is_odd]


def _open_after(may_open: np.ndarray, was_open: bool) -> np.ndarray:
    """Whether a text is open after each run, bool, from whether each is at the start of a cell."""
    runs = np.arange(1, len(may_open) + 1)
    # A run that is not at a cell's start leaves nothing open. From the last of them on, each opens or closes.
    closed = np.maximum.accumulate(np.where(may_open, 0, runs))
    return (runs - closed + (was_open & (closed == 0))) % 2 == 1


def _has_line_end(data: bytes) -> bool:
    return b"\n" in data or b"\r" in data
