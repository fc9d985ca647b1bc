"""``python -m benchmarks.loader [--events N]``: how fast histories are read, and in how much memory.

Histories are generated, built into a store, and read once by each of several readers, interleaved:

    ours, batches    an epoch in shuffled order: checked against hashes, packed into training batches of 512
    ours, blocks     every block in the store's order, checked against hashes and manifest, as arrays
    webdataset       the same tars by stock webdataset, decoded to arrays; no hash, no order, no batch
    Parquet          the table that the store was built from, by pyarrow, record batch by record batch

all in one process; then ours, batches, and webdataset with one and two processes that read ahead (``--workers``), as
in training. The batches do more than the others: shuffling and packing are what they leave to their user. With
``--memory`` one epoch of ours is read in a fresh process, which reports the growth of its anonymous memory
from a tenth of the epoch on, when the pools of all lanes are full; likewise that of the build.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from benchmarks import describe_setting
from benchmarks.measuring.timing import in_child, interleave
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from shards.store.builder import build_store

NUM_ITEMS, MEAN_EVENTS, USERS_AT_ONCE, BATCH, LANES = 100_000, 20, 50_000, 512, 16
TIMEOUT_S = 600.0


def write_raw(folder: Path, num_events: int) -> None:
    """Tables of items and of histories of 3 to 37 events, written some users at a time."""
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"item_id": np.arange(NUM_ITEMS)}), folder / "items.parquet")
    np.save(folder / "vector.npy", generator.standard_normal((NUM_ITEMS, 8), np.float32))
    schema = pa.schema({"user_id": pa.int64(), "item_ids": pa.list_(pa.int64())})
    num_users, first = num_events // MEAN_EVENTS, 0
    with pq.ParquetWriter(folder / "sequences.parquet", schema) as writer:
        while first < num_users:
            users = np.arange(first, min(first + USERS_AT_ONCE, num_users))
            starts = np.concatenate(([0], np.cumsum(generator.integers(3, 2 * MEAN_EVENTS - 2, len(users)))))
            items = pa.array(generator.integers(NUM_ITEMS, size=starts[-1]))
            lists = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), items)
            writer.write_table(pa.table([pa.array(users), lists], schema=schema))
            first += USERS_AT_ONCE


def build_shop(folder: Path) -> None:
    words = ["--data.root", str(folder), "--store.path", str(folder / "store"), "--data.demo", "null"]
    words += ["--data.items.path", "items.parquet", "--data.items.title", "''", "--data.ids", "integer"]
    words += ["--data.sequences.path", "sequences.parquet", "--data.sequences.times", "''"]
    build_store(load_config(None, [*words, "--data.features", "{vector: {source: npy, path: vector.npy}}"]))


def make_stream(store: Store) -> TrainStream:
    order = Order([block.count for block in store.manifest.splits["train"]], BATCH, LANES, seed=0)
    return TrainStream(store, order, WindowRule(50, "last", True))


def read_batches(store: Store, _round: int) -> None:
    stream = make_stream(store)
    for step in range(stream.order.steps_per_epoch):
        stream.batch(0, step, range(LANES))


def read_blocks(store: Store, _round: int) -> None:
    for block in store.manifest.splits["train"]:
        store.read_block(block)


def read_ahead(store: Store, _round: int, workers: int) -> None:
    stream = make_stream(store)
    steps = stream.order.steps_per_epoch
    with BatchFeed(stream, range(LANES), steps, workers, TIMEOUT_S) as feed:
        for step in range(steps):
            feed.batches(step)


def read_webdataset(store: Store, _round: int, workers: int = 0) -> None:
    import webdataset

    shards = [str(store.path / shard.name) for shard in store.manifest.shards if shard.name.startswith("train-")]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode()
    for sample in DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset:
        _ = sample["users.npy"], sample["starts.npy"], sample["items.npy"]


def read_parquet(store: Store, _round: int) -> None:
    for batch in pq.ParquetFile(store.path.parent / "sequences.parquet").iter_batches(batch_size=256):
        lists = batch.column("item_ids")
        _ = batch.column("user_id").to_numpy(), lists.offsets.to_numpy(), lists.values.to_numpy()


def anonymous_mb() -> float:
    """Resident memory of this process that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


class Weighing:
    """Anonymous memory of this process while the context lasts, twice a second."""

    def __enter__(self) -> Weighing:
        self._seen: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.5):
            self._seen.append(anonymous_mb())

    def __str__(self) -> str:
        later = self._seen[len(self._seen) // 10 :] or [anonymous_mb()]
        return (
            f"anonymous memory {later[0]:.0f} MB at a tenth, {max(later):.0f} MB at most, {later[-1]:.0f} MB at the end"
        )


def read_and_weigh(folder: Path) -> None:
    """One epoch in this process: rate, and memory at a tenth, the highest after, and at the end."""
    stream, began, num_users, num_targets = make_stream(Store.open(folder / "store")), time.perf_counter(), 0, 0
    steps, seen = stream.order.steps_per_epoch, []
    for step in range(steps):
        batch = stream.batch(0, step, range(LANES))
        num_users += len(batch.users)
        num_targets += len(batch.targets)
        if step >= steps // 10 and step % max(steps // 500, 1) == 0:
            seen.append(anonymous_mb())
    seconds = time.perf_counter() - began
    print(
        f"one epoch: {num_users:,} users and {num_targets:,} targets in {seconds:.0f} s, "
        f"{num_users / seconds:,.0f} users/s; anonymous memory {seen[0]:.0f} MB at a tenth, "
        f"{max(seen):.0f} MB at most, {seen[-1]:.0f} MB at the end"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="processes that read ahead")
    parser.add_argument("--memory", action="store_true", help="one epoch of ours alone, and its memory")
    parser.add_argument("--weigh", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.weigh:
        read_and_weigh(arguments.weigh)
        return
    print("\n".join(f"{name}: {value}" for name, value in describe_setting().items()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        write_raw(folder, arguments.events)
        written = time.perf_counter()
        with Weighing() as weight:
            build_shop(folder)
        store = Store.open(folder / "store")
        blocks = store.manifest.splits["train"]
        users, events = sum(block.count for block in blocks), sum(block.events for block in blocks)
        print(
            f"{store.manifest.num_events:,} events of {users:,} users ({events:,} in the training split, "
            f"{len(blocks):,} blocks); generated in {written - began:.0f} s, "
            f"built in {time.perf_counter() - written:.0f} s, {weight}"
        )
        if arguments.memory:
            print(in_child("benchmarks.loader", "--weigh", str(folder)), end="")
            return
        sides: dict[str, Callable[[Store, int], None]] = {
            "ours, batches": read_batches,
            "ours, blocks": read_blocks,
            "webdataset": read_webdataset,
            "Parquet": read_parquet,
        }
        for workers in arguments.workers:
            sides[f"ours, {workers} ahead"] = partial(read_ahead, workers=workers)
            sides[f"webdataset, {workers} ahead"] = partial(read_webdataset, workers=workers)
        timings = interleave({name: partial(read, store) for name, read in sides.items()}, arguments.rounds)
        for name, timing in timings.items():
            print(
                f"{name:20} {users / timing.median:>12,.0f} users/s {events / timing.median:>14,.0f} events/s; "
                f"webdataset takes {timings['webdataset'].over(timing)} times as long, Parquet "
                f"{timings['Parquet'].over(timing)}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
