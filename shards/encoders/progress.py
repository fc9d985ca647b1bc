"""Progress of an encoder that may take hours: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """Share done, rate and time left.

    Args:
        name: of the feature.
        unit: what is counted, in the singular.
        total: units in all.
        done: of them, by an earlier build; they count neither for the rate nor for the time left.
    """

    def __init__(self, name: str, unit: str, total: int, done: int) -> None:
        self._bar = (
            tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None
        )
        self._name, self._unit, self._total, self._initial, self._done = name, unit, total, done, done
        self._began = self._last_line = time.monotonic()

    def update(self, count: int) -> None:
        """``count`` more units are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._done == self._total or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(self._line(), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        elapsed_s = time.monotonic() - self._began
        line = "{desc}: {n:,} of {total:,} {unit}s, {rate_fmt}, {elapsed} passed, {remaining} left"
        return tqdm.format_meter(
            self._done,
            self._total,
            elapsed_s,
            prefix=self._name,
            unit=self._unit,
            initial=self._initial,
            bar_format=line,
        )
