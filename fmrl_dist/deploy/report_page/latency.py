"""How long a deployment takes on this machine: a small, bounded measurement on one thread.

An event of one user is one step of the recurrence, whatever the history's length; its list is the exact top 10 of all
items. Deployments take turns in short runs, so that other work on the machine disturbs all of them alike.

V items, D the width, m a size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.checkpoint.restore import build_recommender, restore_model
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.report_page.measures import Cut
from fmrl_dist.model.fmrlrec import FMRLRec

TOP = 10
RUN = 5  # events in turn, after one that is not counted
MOST_EVENTS = 2000  # of a deployment
BATCH = 256  # users at once
MOST_SCORES = 1 << 24  # at once: 64 MiB
MOST_ITEM_BYTES = 1 << 30  # of vectors, float32: more are not copied for a measurement
THROUGHPUT_SHARE = 0.3  # of the time


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one user's event, and what a batch does in a second."""

    event_ms: tuple[float, float]  # median and 99th percentile, of the step
    list_ms: tuple[float, float]  # of the top 10
    total_ms: tuple[float, float]  # of both
    num_events: int  # that were measured
    events_per_s: float  # steps, BATCH users at once
    lists_per_s: float  # top 10


@dataclass(frozen=True)
class Timings:
    """A measurement of all deployments."""

    of_cuts: dict[Cut, Latency]
    machine: str
    note: str  # on what was measured


def time_cuts(
    checkpoint: Checkpoint, config: Config, store: Store | None, cuts: Sequence[Cut], seconds: float
) -> Timings:
    """Measure every deployment.

    Args:
        checkpoint: its model.
        config: of the run.
        store: whose items are scored; None for random vectors, which cost the same.
        cuts: deployments.
        seconds: that the measurement may take, besides loading the model.

    Raises:
        UserError: the catalogue is too large to copy for this, or the model cannot be restored.
    """
    width, num_items = config.model.width, checkpoint.num_items
    if 2 * 4 * num_items * width > MOST_ITEM_BYTES:
        raise UserError(
            f"{num_items:,} item vectors of {width} channels are too many for this page's short measurement; measure "
            "with benchmarks.deploy"
        )
    note = "the run's own item vectors"
    if store is not None:
        whole = build_recommender(checkpoint, config, store, torch.device("cpu"))
        model, items = whole.model, whole.items
    else:
        model = restore_model(config.model, checkpoint).eval()
        items = torch.randn(num_items, width, generator=torch.Generator().manual_seed(0))
        note = "random item vectors, as the store is not there: they cost the same"
    with one_thread(), torch.inference_mode():
        served = [Served(model, items, cut) for cut in cuts]
        events = _time_events(served, seconds * (1 - THROUGHPUT_SHARE))
        each = seconds * THROUGHPUT_SHARE / (2 * len(served))
        rates = [(_rate(s.step_batch, s.batch, each), _rate(s.list_batch, s.batch_of_lists, each)) for s in served]
    of_cuts = {
        cut: Latency(_percentiles(steps), _percentiles(lists), _percentiles(steps + lists), len(steps), *rate)
        for cut, (steps, lists), rate in zip(cuts, events, rates, strict=True)
    }
    return Timings(of_cuts, machine(), note)


class Served:
    """One deployment with users in the middle of their histories."""

    def __init__(self, model: FMRLRec, items: Tensor, cut: Cut) -> None:
        self.model = model if cut.of_vectors or cut.size == model.width else model.truncate(cut.size)
        self.inputs = items[:, : self.model.width].contiguous()  # [V, m], or [V, D] for cut vectors
        self.compared = items[:, : cut.size].contiguous()  # [V, m]
        generator = torch.Generator().manual_seed(cut.size)
        # Any orthogonal matrix costs the same; cut to m columns.
        self.rotation = torch.linalg.qr(torch.randn(model.width, model.width, generator=generator)).Q[:, : cut.size]
        self.rotates = cut.of_vectors
        num_items = len(items)
        self.batch = BATCH
        self.batch_of_lists = max(1, min(BATCH, MOST_SCORES // num_items))
        self.events = torch.randint(num_items, (MOST_EVENTS,), generator=generator)
        self.state = self.model.initial_state(1)
        self.states = self.model.initial_state(BATCH)
        self.users = torch.randint(num_items, (BATCH,), generator=generator)
        self.outputs = torch.randn(BATCH, cut.size, generator=generator)

    def step(self, number: int) -> Tensor:
        """The next event of one user → [1, m]."""
        item = self.events[number % MOST_EVENTS]
        self.state, z = self.model.step(self.state, self.inputs[item][None])
        return z @ self.rotation if self.rotates else z

    def top(self, z: Tensor) -> Tensor:
        """The first ten items, [B, 10]."""
        return (z @ self.compared.T).topk(min(TOP, len(self.compared)), dim=1).indices

    def step_batch(self) -> None:
        self.states, z = self.model.step(self.states, self.inputs[self.users])
        if self.rotates:
            z @ self.rotation

    def list_batch(self) -> None:
        self.top(self.outputs[: self.batch_of_lists])


def _time_events(served: Sequence[Served], seconds: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Milliseconds of every event's step and list, of each deployment: at least one run, then until the time is up."""
    began, clock = time.monotonic(), time.perf_counter
    steps: list[list[float]] = [[] for _ in served]
    lists: list[list[float]] = [[] for _ in served]
    while True:
        for number, one in enumerate(served):
            for event in range(-1, RUN):
                before = clock()
                z = one.step(len(steps[number]))
                between = clock()
                one.top(z)
                after = clock()
                if event >= 0:  # the first one finds cold caches
                    steps[number].append(1e3 * (between - before))
                    lists[number].append(1e3 * (after - between))
        if time.monotonic() - began >= seconds or len(steps[0]) >= MOST_EVENTS:
            return [(np.array(s), np.array(t)) for s, t in zip(steps, lists, strict=True)]


def _rate(work: Callable[[], None], users: int, seconds: float) -> float:
    """Users served in a second."""
    work()
    began, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - began < seconds:
        work()
        times += 1
    return times * users / (time.perf_counter() - began)


def _percentiles(milliseconds: np.ndarray) -> tuple[float, float]:
    median, high = np.percentile(milliseconds, (50, 99))
    return float(median), float(high)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's operators while the context lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
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
