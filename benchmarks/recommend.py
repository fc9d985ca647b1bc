"""Lists for many users: users per second of one core, against a loop over users in torch, and memory by their number.

    python -m benchmarks.recommend EXPORT                      # at the export's catalogue
    python -m benchmarks.recommend EXPORT --items 1000000      # its items, repeated and jittered
    python -m benchmarks.recommend EXPORT --memory 10000,1000000

Histories are drawn: geometric lengths of nine events on average, items by popularity. The sides are interleaved.
"command" reads Parquet and writes Parquet, "lists" is what it does in between. "loop" is, for each user, the model over
the history, one product with all items, and torch.topk; "torch" is the same for 256 users at once, whose scores are
all held. Before anything is timed, their lists are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks import REPOSITORY
from benchmarks.measuring.timing import interleave
from fmrl_dist.base.progress import Progress
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.deploy.batch.history_files import HistoryFiles
from fmrl_dist.deploy.batch.job import one_thread_each, write_parts
from fmrl_dist.deploy.batch.list_files import ListMaker
from fmrl_dist.deploy.batch.output_folder import JobRecord, OutputFolder
from fmrl_dist.deploy.batch.user_batches import BATCH_USERS, Share, UserBatch, batched
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.recommender import Recommender

K = 10
MEAN_EVENTS = 9
JITTER = 0.1  # of each channel's standard deviation
BYTES_PER_KIB = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--items", type=int, default=0, help="of a jittered catalogue (default: the export's)")
    parser.add_argument("--sizes", default="", help="such as 64,128 (default: the largest)")
    parser.add_argument("--users", type=int, default=4 * BATCH_USERS)
    parser.add_argument("--loop-users", type=int, default=256, help="of the loop, which is slow")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory", default="", help="numbers of users, such as 10000,1000000: only the command's memory"
    )
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, k {K}")
    if arguments.memory:
        for num_users in map(int, arguments.memory.split(",")):
            measure_memory(arguments.export, num_users)
        return
    one_thread_each()
    sizes: list[int | None] = [int(word) for word in arguments.sizes.split(",") if word]
    for size in sizes or [None]:
        measure_speed(recommender_of(arguments.export, arguments.items, size), arguments)


def recommender_of(folder: Path, num_items: int, size: int | None) -> Recommender:
    """The export's, or with more items: its own with noise, under numbers as ids."""
    if not num_items:
        return Recommender.from_pretrained(folder, size)
    exported, draw = read_export(folder), torch.Generator().manual_seed(0)
    rows = torch.arange(num_items) % len(exported.items)
    noise = torch.randn(num_items, exported.items.shape[1], generator=draw) * exported.items.std(0) * JITTER
    columns = {"item": range(num_items), "external_id": range(num_items), "train_count": [1] * num_items}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()}), sink)
    vocabulary = ItemVocabulary(sink.getvalue().to_pybytes(), "vocab.parquet")
    return Recommender(replace(exported, items=exported.items[rows] + noise), vocabulary, size)


def draw_histories(train_counts: np.ndarray, num_users: int, seed: int = 0) -> list[np.ndarray]:
    """Rows of items."""
    draw = np.random.default_rng(seed)
    lengths = draw.geometric(1 / MEAN_EVENTS, num_users)
    share = (train_counts + 1) / (train_counts + 1).sum()
    items = np.searchsorted(share.cumsum(), draw.random(lengths.sum())).clip(max=len(share) - 1)
    return np.split(items.astype(np.int64), lengths.cumsum()[:-1])


def write_histories(path: Path, item_ids: list[int | str], histories: list[np.ndarray], first: int = 0) -> None:
    ids = pa.array(item_ids)
    starts = np.cumsum([0, *map(len, histories)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(starts, ids.take(pa.array(np.concatenate(histories))))
    users = pa.array(np.arange(first, first + len(histories)))
    pq.write_table(pa.table({"user_id": users, "item_ids": lists}), path)


def torch_lists(recommender: Recommender, items: Tensor, histories: list[np.ndarray]) -> Tensor:
    """Scores of the lists of some users, as one would first write it."""
    model = recommender.model
    read = [rows[-model.max_length :] for rows in histories]
    starts = torch.tensor([0, *map(len, read)]).cumsum(0)
    with torch.inference_mode():
        from_start = torch.zeros(len(read), dtype=torch.bool)
        z = model.model(model.embeddings[torch.from_numpy(np.concatenate(read))], starts, from_start)[starts[1:] - 1]
        scores = torch.from_numpy(model.compared_outputs(z.numpy())) @ items.T
        for row, seen in zip(scores, histories, strict=True):
            row[torch.from_numpy(seen)] = -torch.inf
        return torch.topk(scores, K).values


def measure_speed(recommender: Recommender, arguments: argparse.Namespace) -> None:
    histories = draw_histories(recommender.vocabulary.train_counts, arguments.users)
    users = pa.array(np.arange(len(histories)))
    starts = range(0, len(histories), BATCH_USERS)
    batches = [UserBatch(i, users[i : i + BATCH_USERS], histories[i : i + BATCH_USERS]) for i in starts]
    maker, items = ListMaker(recommender, K), torch.from_numpy(recommender.item_vectors)
    looped = histories[: arguments.loop_users]
    found = maker(batches[0])["scores"].to_pylist()[: len(looped)]
    expected = [torch_lists(recommender, items, [rows])[0].tolist() for rows in looped]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, torch_lists(recommender, items, looped), rtol=1e-4, atol=1e-4)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_histories(folder / "users.parquet", recommender.item_ids, histories)

        def command(number: int) -> None:
            files = HistoryFiles.of(str(folder / "users.parquet"), None, None, recommender.vocabulary, False)
            record, share = JobRecord({}, 65_536, files.describe({})), Share(65_536)
            output = OutputFolder(folder / f"lists-{time.monotonic_ns()}", "parquet")
            output.claim(record)
            progress = Progress("user", len(histories), enabled=False)
            write_parts(batched(files.pieces(share, record.input), share), maker, output, record, share, 1, progress)

        sides = {
            "command": command,
            "lists": lambda _: [maker(batch) for batch in batches],
            "torch": lambda _: [
                torch_lists(recommender, items, histories[i : i + 256]) for i in range(0, len(histories), 256)
            ],
            "loop": lambda _: [torch_lists(recommender, items, [rows]) for rows in looped],
        }
        timings = interleave(sides, arguments.rounds)
    print(f"size {recommender.size}, {recommender.num_items:,} items, {len(histories):,} users:")
    per_user = {name: t.median / (len(looped) if name == "loop" else len(histories)) for name, t in timings.items()}
    for name, seconds in per_user.items():
        ratio = per_user["loop"] / seconds
        print(f"  {name:8} {1 / seconds:10,.0f} users/s, {1e6 * seconds:8.1f} µs each, {ratio:5.1f} × the loop")


def measure_memory(export: Path, num_users: int) -> None:
    """Highest resident memory of the command, on a folder of files of 100,000 users each."""
    recommender = Recommender.from_pretrained(export)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "users").mkdir()
        for first in range(0, num_users, 100_000):
            count = min(100_000, num_users - first)
            histories = draw_histories(recommender.vocabulary.train_counts, count, seed=first)
            write_histories(folder / "users" / f"{first:012d}.parquet", recommender.item_ids, histories, first)
        words = [str(export), "--histories", str(folder / "users"), "--output", str(folder / "lists"), "--threads", "1"]
        began = time.monotonic()
        command = [sys.executable, "-m", "fmrl_dist.recommend", *words]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        print(
            f"  {num_users:>10,} users: {usage.ru_maxrss * BYTES_PER_KIB / 2**20:,.0f} MiB at most, "
            f"{time.monotonic() - began:,.1f} s with start"
        )


if __name__ == "__main__":
    main()
