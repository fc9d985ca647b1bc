"""How long a deployment takes on this machine: a small, bounded measurement on one thread.

An event of one user is what a session computes after it: a step of the recurrence, or, with other mixers than the LRU,
a pass over the events so far. Its list is the exact top 10 of all items but those seen. Deployments take turns in short
runs, so that other work on the machine disturbs all of them alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.checkpoint.restore import build_recommender
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.report_page.measures import Cut

TOP = 10
RUN = 5  # events in turn, after one that is not counted
MOST_EVENTS = 2000  # of a deployment
BATCH = 256  # users at once
HISTORY = 50  # events of a user
MOST_ITEM_BYTES = 1 << 30  # of vectors of all deployments: more are not copied for a measurement
THROUGHPUT_SHARE = 0.3  # of the time


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one user's event, and what a batch does in a second."""

    event_ms: tuple[float, float]  # median and 99th percentile, of the event alone
    list_ms: tuple[float, float]  # of the top 10
    total_ms: tuple[float, float]  # of both
    num_events: int  # that were measured
    events_per_s: float  # BATCH users at once
    lists_per_s: float  # top 10


@dataclass(frozen=True)
class Timings:
    """A measurement of all deployments."""

    of_cuts: dict[Cut, Latency]
    machine: str


def time_cuts(
    checkpoint: Checkpoint, config: Config, store: Store | None, cuts: Sequence[Cut], seconds: float
) -> Timings:
    """Measure every deployment, as :class:`Recommender` serves it.

    Args:
        checkpoint: its model.
        config: of the run.
        store: of its catalogue.
        cuts: deployments.
        seconds: that the measurement may take, besides loading the model and preparing each deployment.

    Raises:
        UserError: there is no store, the catalogue is too large to copy for this, or the model cannot be restored.
    """
    if store is None:
        raise UserError("the store is not there, and with it the items")
    held = 4 * checkpoint.num_items * sum(cut.size for cut in cuts)
    if held > MOST_ITEM_BYTES:
        raise UserError(
            f"{checkpoint.num_items:,} items are too many for this page's short measurement: vectors of all "
            f"deployments take {held / 1e9:.1f} GB; measure with benchmarks.deploy"
        )
    width = config.model.width
    exported = build_recommender(checkpoint, config, store, torch.device("cpu"))
    # Any rotation costs the same: the one of the evaluation is not kept.
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    exported = replace(exported, rotation=rotation)
    vocabulary = ItemVocabulary(store.read_table(VOCAB_FILE), f"{store.location}/{VOCAB_FILE}")
    with one_thread():
        served = [Served(exported, vocabulary, cut) for cut in cuts]
        events = _time_events(served, seconds * (1 - THROUGHPUT_SHARE))
        each = seconds * THROUGHPUT_SHARE / (2 * len(served))
        rates = [(_rate(one.observe_all, each), _rate(one.recommend_all, each)) for one in served]
    of_cuts = {
        cut: Latency(_percentiles(steps), _percentiles(lists), _percentiles(steps + lists), len(steps), *rate)
        for cut, (steps, lists), rate in zip(cuts, events, rates, strict=True)
    }
    return Timings(of_cuts, machine())


class Served:
    """One deployment, with a user and a batch of users who act at random."""

    def __init__(self, exported: ExportedModel, vocabulary: ItemVocabulary, cut: Cut) -> None:
        self.recommender = Recommender(
            exported, vocabulary, None if cut.of_vectors else cut.size, cut.size if cut.of_vectors else None
        )
        generator = np.random.default_rng(cut.size)
        rows = generator.integers(len(vocabulary.ids), size=MOST_EVENTS).tolist()
        self.items = [vocabulary.ids[row] for row in rows]
        self.session = self.recommender.session()
        self.sessions = self.recommender.sessions(BATCH)
        self.observe_all()  # prepares what is prepared once

    def begin(self, number: int) -> None:
        """A new user after every ``HISTORY`` events, so that the number of seen items stays that of a history."""
        if number % HISTORY == 0:
            self.session = self.recommender.session()

    def observe(self, number: int) -> None:
        self.session.observe(self.items[number % MOST_EVENTS])
        if not self.recommender.model.has_state:  # the events are noted, and wait to be read
            self.session.output()

    def recommend(self) -> None:
        self.session.recommend(TOP)

    def observe_all(self) -> None:
        self.sessions.observe(self.items[:BATCH])
        if not self.recommender.model.has_state:
            self.sessions.outputs()

    def recommend_all(self) -> None:
        self.sessions.recommend(TOP)


def _time_events(served: Sequence[Served], seconds: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Milliseconds of every event's step and list, of each deployment: at least one run, then until the time is up."""
    began, clock = time.monotonic(), time.perf_counter
    steps: list[list[float]] = [[] for _ in served]
    lists: list[list[float]] = [[] for _ in served]
    while True:
        for number, one in enumerate(served):
            for event in range(-1, RUN):
                place = len(steps[number])
                one.begin(place)
                before = clock()
                one.observe(place)
                between = clock()
                one.recommend()
                after = clock()
                if event >= 0:  # the first one finds cold caches
                    steps[number].append(1e3 * (between - before))
                    lists[number].append(1e3 * (after - between))
        if time.monotonic() - began >= seconds or len(steps[0]) >= MOST_EVENTS:
            return [(np.array(s), np.array(t)) for s, t in zip(steps, lists, strict=True)]


def _rate(work: Callable[[], None], seconds: float) -> float:
    """Users served in a second, ``BATCH`` at once."""
    began, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - began < seconds:
        work()
        times += 1
    return times * BATCH / (time.perf_counter() - began)


def _percentiles(milliseconds: np.ndarray) -> tuple[float, float]:
    median, high = np.percentile(milliseconds, (50, 99))
    return float(median), float(high)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the operators of torch and NumPy while the context lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def machine() -> str:
    """This machine, in words, and how busy it is."""
    name = "processor of unknown name"
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except (OSError, UnicodeDecodeError):
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} core(s) for this process, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
