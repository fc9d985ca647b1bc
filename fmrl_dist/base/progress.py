"""Progress of work that may take hours: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY_S = 10.0
LINE = "{desc}{n:,} of {total:,} {unit}s, {rate_fmt}, {elapsed} elapsed, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}{n:,} {unit}s, {rate_fmt}, {elapsed} elapsed"


class Progress:
    """Share done, rate and time left. Close it at the end.

    Args:
        unit: what is counted, singular.
        total: total number of units; None if nobody knows.
        done: units done by an earlier process; they do not count towards the rate or the time left.
        name: shown before the numbers.
        enabled: false on processes other than 0, which show nothing.
        line_every_s: seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        unit: str,
        total: int | None,
        done: int = 0,
        name: str = "",
        enabled: bool = True,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self._unit, self._total, self._initial, self._done = unit, total, done, done
        self._name, self._enabled, self._line_every_s = name, enabled, line_every_s
        self._began = self._last_line = time.monotonic()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=name or None, unit=unit, dynamic_ncols=True)

    def update(self, done: int, facts: str = "") -> None:
        """Set the number of finished units, including those of earlier processes; ``facts`` is shown beside it."""
        self._done = done
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._enabled and (now - self._last_line >= self._line_every_s or done == self._total):
            self._last_line = now
            self.say(self._line(now - self._began) + (f", {facts}" if facts else ""))

    def advance(self, count: int) -> None:
        """Add ``count`` finished units."""
        self.update(self._done + count)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, elapsed_s: float) -> str:
        return tqdm.format_meter(
            self._done,
            self._total,  # type: ignore[arg-type]  # None is what it documents
            elapsed_s,
            prefix=f"{self._name}: " if self._name else "",
            unit=self._unit,
            initial=self._initial,
            bar_format=LINE if self._total is not None else LINE_WITHOUT_TOTAL,
        )
