"""What the catalogue's size costs: the full softmax from 10 thousand to 1 million items, the sampled to 10 million.

Features of 384 dimensions are written to disk and read through a memory map, never resident. A step is
forward, backward and AdamW at width 512 with two blocks, on histories of 8 items. Anonymous resident memory is sampled
during the steps: the mapped file's pages, which the system may drop, are not in it. The sampled softmax takes 1,024
negatives by popularity, from a memory-mapped alias table, for the whole batch.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import describe_setting
from benchmarks.measuring.timing import in_child, interleave
from benchmarks.step import one_step
from fmrl_dist.base.errors import run_command
from fmrl_dist.data.alias import alias_table, draw
from fmrl_dist.data.batches import Packed, SampledBatch
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.data.negatives import NegativeSampler
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.item_columns import TableColumns
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import build_optimizer

SIZES = (8, 16, 32, 64, 128, 256, 512)
FEATURE_DIM = 384
LENGTH = 8  # items of a history
NEGATIVES = 1024
WRITTEN_AT_ONCE = 100_000
CATALOGUES = {"full": (10_000, 100_000, 1_000_000), "sampled": (10_000, 100_000, 1_000_000, 10_000_000)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.catalogue", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--softmax", choices=tuple(CATALOGUES), nargs="+", default=list(CATALOGUES))
    parser.add_argument("--histories", type=int, default=32, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write up to 8 GB (default: where temporary files go)")
    parser.add_argument("--case", nargs=2, metavar=("SOFTMAX", "ITEMS"), help="only measure this one")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.case:
        softmax, num_items = arguments.case[0], int(arguments.case[1])
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(measure(softmax, num_items, arguments.histories, arguments.rounds, Path(folder)))
        return
    for name, value in describe_setting().items():
        print(f"{name:<10} {value}")
    print("\n| softmax | items | seconds a step | µs an item | peak anonymous memory, MiB |")
    print("|---|---|---|---|---|", flush=True)
    given = [f"--{key}={getattr(arguments, key)}" for key in ("histories", "rounds", "threads")]
    given += [f"--folder={arguments.folder}"] if arguments.folder else []
    for softmax in arguments.softmax:
        for num_items in CATALOGUES[softmax]:  # each in a fresh process, for its memory
            print(in_child("benchmarks.catalogue", *given, "--case", softmax, str(num_items)), end="", flush=True)


def measure(softmax: str, num_items: int, num_histories: int, rounds: int, folder: Path) -> str:
    """A row of the table."""
    step = make_step(softmax, num_items, num_histories, folder)
    with PeakAnonymous() as memory:
        (times,) = interleave({softmax: step}, rounds, warm_up=3).values()
    microseconds = times.median / num_items * 1e6
    return f"| {softmax} | {num_items:,} | {times} | {microseconds:.3g} | {memory.peak / 2**20:.0f} |"


def make_step(softmax: str, num_items: int, num_histories: int, folder: Path) -> Callable[[int], float]:
    """A training step over a catalogue of ``num_items`` whose features lie in ``folder``."""
    table = ItemTable(
        {"text": FEATURE_DIM}, write_features(num_items, folder), torch.ones(1, 1).bool().expand(num_items, 1)
    )
    torch.manual_seed(0)
    model = FMRLRec(SIZES, 2, {"text": FEATURE_DIM})
    module = TrainingModule(model, TableColumns(model.encoder, table, torch.float32), LossSettings(SIZES))
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    popularity = write_popularity(num_items, folder)
    sampler = NegativeSampler(num_items, NEGATIVES, 0, popularity)

    def step(number: int) -> float:
        batch = make_batch(popularity, num_histories, number)
        if softmax == "sampled":
            batch = with_negatives(batch, sampler, number)
        return one_step(module(batch).mean() / len(batch.targets), optimizer)

    return step


def write_features(num_items: int, folder: Path) -> torch.Tensor:
    """Random float16 features [V, 384], memory-mapped."""
    values = np.memmap(folder / "features", np.float16, "w+", shape=(num_items, FEATURE_DIM))
    generator = np.random.default_rng(0)
    for begin in range(0, num_items, WRITTEN_AT_ONCE):
        block = generator.standard_normal((min(WRITTEN_AT_ONCE, num_items - begin), FEATURE_DIM), np.float32)
        values[begin : begin + len(block)] = block / FEATURE_DIM**0.5
    return torch.from_numpy(values)


def write_popularity(num_items: int, folder: Path) -> np.ndarray:
    """Alias table of a Zipf law, memory-mapped."""
    np.save(folder / "popularity.npy", alias_table(np.arange(1, num_items + 1) ** -0.75))
    table: np.ndarray = np.load(folder / "popularity.npy", mmap_mode="r")
    return table


def make_batch(popularity: np.ndarray, num_histories: int, number: int) -> Packed:
    """Histories of ``LENGTH`` items after a start position, drawn by popularity."""
    events = draw(popularity, num_histories * (LENGTH + 1), np.random.default_rng(number)).reshape(num_histories, -1)
    return Packed(
        users=torch.arange(num_histories),
        items=torch.from_numpy(events[:, :-1].ravel()),
        starts=torch.arange(num_histories + 1) * LENGTH,
        from_start=torch.ones(num_histories, dtype=torch.bool),
        targets=torch.from_numpy(events.ravel()),
    )


def with_negatives(batch: Packed, sampler: NegativeSampler, number: int) -> SampledBatch:
    ids, log_expected = sampler.negatives(sampler.lane(number, 0), batch.targets.numpy())
    return SampledBatch(
        **vars(batch),
        position_starts=torch.tensor([0, len(batch.targets)]),
        negatives=torch.from_numpy(ids),
        log_expected=torch.from_numpy(log_expected),
        negative_starts=torch.tensor([0, len(ids)]),
    )


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's (Linux)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class PeakAnonymous:
    """Samples :func:`anonymous_bytes` every few milliseconds while it is entered."""

    def __enter__(self) -> PeakAnonymous:
        self.peak, self._over = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


if __name__ == "__main__":
    run_command(main)
