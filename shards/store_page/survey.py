"""One pass over the histories of a store, counted in memory that grows with neither users nor events.

Lengths are counted exactly up to :data:`LONGEST`, times in bins whose width doubles whenever there are too many, and
the histories to show are chosen before the first block is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fmrl_dist.base.progress import Progress
from fmrl_dist.data.store.manifest import SPLITS, Manifest
from fmrl_dist.data.store.reader import Store

LONGEST = 65_536  # events of a history that are told apart
MOST_TIME_BINS = 96
NUM_EXAMPLES = 10
SHOWN_EVENTS = 8  # of an example, the latest
EXAMPLES_SEED = 0


@dataclass
class SplitCounts:
    """Histories of one split: in train what is trained on, else what precedes a target, and this."""

    users: int = 0
    events: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST + 1, np.int64))  # users by number of events
    longest: int = 0
    repeated: int = 0  # events of the same user and item as an earlier one
    repeated_at_once: int = 0  # of the same time as well
    users_with_repeats: int = 0

    def quantile(self, share: float) -> int:
        """Number of events that at least this share of the users do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.users))


@dataclass
class TimeBins:
    """Events by time and split, in at most ``MOST_TIME_BINS`` bins of one width, a power of two in the times' unit.

    The result does not depend on the order of what is added.
    """

    width: int = 1
    counts: dict[int, np.ndarray] = field(default_factory=dict)  # by time // width: int64 [splits]
    low: int = 0  # first and last time
    high: int = 0

    def add(self, times: np.ndarray, split: int) -> None:
        """Count ``times`` int64 [n] of events of a split, by its number."""
        if not len(times):
            return
        low, high = int(times.min()), int(times.max())
        self.low = min(low, self.low) if self.counts else low
        self.high = max(high, self.high) if self.counts else high
        while self.high // self.width - self.low // self.width >= MOST_TIME_BINS:
            self._widen()
        for time, count in zip(*np.unique(times // self.width, return_counts=True), strict=True):
            self.counts.setdefault(int(time), np.zeros(len(SPLITS), np.int64))[split] += count

    def _widen(self) -> None:
        wider: dict[int, np.ndarray] = {}
        for time, counts in self.counts.items():
            wider[time // 2] = wider[time // 2] + counts if time // 2 in wider else counts
        self.width, self.counts = 2 * self.width, wider


@dataclass(frozen=True)
class ExampleHistory:
    """The latest events of one user."""

    number: int  # of the user, as in the store
    num_events: int  # of the whole history
    items: np.ndarray  # int64 [n], oldest first; n ≤ SHOWN_EVENTS
    times: np.ndarray | None  # int64 [n]


@dataclass
class Survey:
    """What :func:`survey` found."""

    splits: dict[str, SplitCounts]
    times: TimeBins | None  # None for a store without times
    examples: list[ExampleHistory]
    examples_of: str  # split that they are from


def survey(store: Store) -> Survey:
    """Read every block of users once.

    Raises:
        UserError: a block is damaged, and the store was not opened to skip such blocks.
    """
    manifest = store.manifest
    examples_of = "test" if manifest.splits["test"] else "train"
    found = Survey({split: SplitCounts() for split in SPLITS}, None, [], examples_of)
    progress = Progress("user", sum(block.count for split in SPLITS for block in manifest.splits[split]), name="survey")
    for number, split in enumerate(SPLITS):
        wanted = _chosen(manifest, split) if split == examples_of else np.empty(0, np.int64)
        first = 0  # position of the block's first user in the split
        for block, arrays in zip(manifest.splits[split], store.read_each(manifest.splits[split]), strict=True):
            if arrays is not None:
                _count(found.splits[split], arrays, manifest.num_items)
                if "times" in arrays:
                    found.times = found.times or TimeBins()
                    found.times.add(_own_times(arrays, split), number)
                inside = wanted[(wanted >= first) & (wanted < first + block.count)] - first
                found.examples += _examples(arrays, inside)
            first += block.count
            progress.advance(block.count)
    progress.close()
    return found


def _chosen(manifest: Manifest, split: str) -> np.ndarray:
    """Positions of the examples among a split's users, sorted; the same for the same number of users."""
    num_users = sum(block.count for block in manifest.splits[split])
    generator = np.random.default_rng(EXAMPLES_SEED)
    return np.sort(generator.choice(num_users, min(NUM_EXAMPLES, num_users), replace=False, shuffle=False))


def _count(counts: SplitCounts, arrays: dict[str, np.ndarray], num_items: int) -> None:
    lengths, items, times = np.diff(arrays["starts"]), arrays["items"], arrays.get("times")
    counts.users += len(lengths)
    counts.events += len(items)
    counts.lengths += np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)
    counts.longest = max(counts.longest, int(lengths.max(initial=0)))
    users = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((items, users) if times is None else (times, items, users))
    same = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
    counts.repeated += int(same.sum())
    counts.users_with_repeats += len(np.unique(users[order][1:][same]))
    if times is not None:
        counts.repeated_at_once += int((same & (np.diff(times[order]) == 0)).sum())


def _own_times(arrays: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Times of the events that no earlier split has: all of train, of the others each history's last, its target."""
    times = arrays["times"]
    return times if split == "train" else times[arrays["starts"][1:][np.diff(arrays["starts"]) > 0] - 1]


def _examples(arrays: dict[str, np.ndarray], rows: np.ndarray) -> Iterator[ExampleHistory]:
    times = arrays.get("times")
    for row in rows.tolist():
        low, high = (int(arrays["starts"][end]) for end in (row, row + 1))
        shown = slice(max(low, high - SHOWN_EVENTS), high)
        yield ExampleHistory(
            int(arrays["users"][row]),
            high - low,
            np.array(arrays["items"][shown]),
            np.array(times[shown]) if times is not None else None,
        )
