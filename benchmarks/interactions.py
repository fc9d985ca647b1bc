"""From raw events to histories: seconds and memory of ``shards.interactions``, against pandas and polars in memory.

    python -m benchmarks.interactions                                     # 5 million events, all three
    python -m benchmarks.interactions --events 50000000 --sides ours      # as many as one likes, out of core

Events are made up: users and items of text ids, popularity like a power law, ratings, a tenth of them twice. All sides
read the same Parquet parts, leave out ratings below 2, keep the first event of each user and item, take the 5-core,
sort by user and time, number the items, and write lists by user. Each is a process of its own, in interleaved rounds;
their results are compared before a figure is shown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import REPOSITORY, describe_setting
from benchmarks.measuring.timing import spread
from fmrl_dist.config.parsing import build
from fmrl_dist.config.sections import Config
from shards.interactions.history_file import read_prepared
from shards.interactions.prepare import prepare
from shards.tables.engine import quiet

CORE = 5
MIN_RATING = 2
SIDES = ("ours", "polars", "pandas")
PARTS = 8
GIB = 2**30


def make_events(folder: Path, num_events: int, seed: int = 0) -> Path:
    """Parquet parts of made-up events: a tenth as many users, a twenty-fifth as many items."""
    target = folder / f"events-{num_events}"
    if target.exists():
        return target
    aside = folder / f"{target.name}.part"
    aside.mkdir(parents=True, exist_ok=True)
    users, items, rows = num_events // 10, num_events // 25, num_events // PARTS
    with quiet(duckdb.connect()) as connection:
        connection.execute("SET memory_limit = '2GB'; SET threads = 1; SET preserve_insertion_order = false")
        for part in range(PARTS):
            connection.execute(f"SELECT setseed({(seed + part + 1) / 1000})")
            connection.execute(f"""
                COPY (SELECT printf('A%09d', (power(random(), 1.5) * {users})::INTEGER) AS user,
                             printf('B%08d', (power(random(), 3) * {items})::INTEGER) AS item,
                             1 + (random() * 4)::INTEGER AS rating,
                             1_000_000_000 + (random() * 600_000_000)::BIGINT AS time
                      FROM range({rows}) AS numbers(number))
                TO '{aside}/part-{part}.parquet' (ROW_GROUP_SIZE 200_000)""")
    aside.rename(target)
    return target


def ours(events: Path, scratch: Path, memory_gb: float, threads: int) -> Path:
    sequences = {"path": str(events), "layout": "interactions", "user": "user", "items": "item", "times": "time"}
    interactions = {"min_rating": MIN_RATING, "duplicates": "first", "min_user_events": CORE, "min_item_events": CORE}
    interactions |= {"memory_gb": memory_gb, "threads": threads}
    raw = {
        "root": "/",
        "sequences": sequences | {"rating": "rating"},
        "items": {"path": ""},
        "interactions": interactions,
    }
    config = build(Config, {"data": raw}, "")
    result = prepare(config.data, scratch / "interactions", None, None, {})
    print("\n".join(result.funnel.lines()), file=sys.stderr)
    return result.histories


def with_polars(events: Path, scratch: Path) -> Path:
    import polars as pl

    frame = pl.read_parquet(f"{events}/*.parquet").filter(pl.col("rating") >= MIN_RATING)
    frame = frame.group_by("user", "item").agg(pl.col("time").min())
    before = -1
    while before != len(frame):
        before = len(frame)
        frame = frame.filter(pl.len().over("user") >= CORE)
        frame = frame.filter(pl.len().over("item") >= CORE)
    codes = frame.select(pl.col("item").unique().sort()).with_row_index("code")
    frame = frame.join(codes, on="item").sort("user", "time")
    frame = frame.group_by("user", maintain_order=True).agg(
        pl.col("code").alias("items"), pl.col("time").alias("times")
    )
    frame.write_parquet(scratch / "polars.parquet")
    return scratch / "polars.parquet"


def with_pandas(events: Path, scratch: Path) -> Path:
    import pandas as pd

    frame = pd.read_parquet(events)
    frame = frame[frame.rating >= MIN_RATING]
    frame = frame.sort_values("time", kind="stable").drop_duplicates(["user", "item"])
    before = -1
    while before != len(frame):
        before = len(frame)
        for column in ("user", "item"):
            frame = frame[frame.groupby(column)[column].transform("size") >= CORE]
    frame = frame.assign(items=frame["item"].astype("category").cat.codes.astype(np.int64))
    frame = frame.sort_values(["user", "time"], kind="stable")
    users, starts = np.unique(frame["user"].to_numpy(), return_index=True)
    offsets = pa.array(np.append(starts, len(frame)).astype(np.int32))
    lists = {
        name: pa.ListArray.from_arrays(offsets, pa.array(frame[column].to_numpy()))
        for name, column in (("items", "items"), ("times", "time"))
    }
    pq.write_table(pa.table({"user": pa.array(users, pa.large_string()), **lists}), scratch / "pandas.parquet")
    return scratch / "pandas.parquet"


def digest_of(path: Path) -> dict[str, Any]:
    """Counts, and a hash of every user's items and times, whatever the order of events of one time."""
    digest, users, events = hashlib.sha256(), 0, 0
    for batch in read_prepared(path).batches:
        assert batch.times is not None
        owner = np.repeat(np.arange(len(batch.users)), np.diff(batch.starts))
        order = np.lexsort((batch.items, batch.times, owner))
        for values in (owner[order] + users, batch.times[order], batch.items[order]):
            digest.update(np.ascontiguousarray(values, np.int64).tobytes())
        digest.update("\n".join(batch.users.to_pylist()).encode())
        users, events = users + len(batch.users), events + len(batch.items)
    return {"users": users, "events": events, "digest": digest.hexdigest()}


def run_side(side: str, events: Path, memory_gb: float, threads: int) -> None:
    """In a process of its own: one side, and its figures as JSON on the last line."""
    with tempfile.TemporaryDirectory(dir=events.parent) as scratch:
        began = time.perf_counter()
        if side == "ours":
            path = ours(events, Path(scratch), memory_gb, threads)
        else:
            path = {"polars": with_polars, "pandas": with_pandas}[side](events, Path(scratch))
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, **digest_of(path)}))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interactions", description=__doc__)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--sides", default=",".join(SIDES), help="of ours, polars, pandas (pip install polars pandas)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=2.0, help="data.interactions.memory_gb of ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the events")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    events = make_events(arguments.folder, arguments.events)
    if arguments.one:
        run_side(arguments.one, events, arguments.memory_gb, arguments.threads)
        return
    sides = arguments.sides.split(",")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    environment = os.environ | {"POLARS_MAX_THREADS": str(arguments.threads)}
    for _ in range(arguments.rounds):
        for side in sides:
            command = [sys.executable, "-m", "benchmarks.interactions", "--one", side, "--folder", arguments.folder]
            command += [
                "--events",
                arguments.events,
                "--memory-gb",
                arguments.memory_gb,
                "--threads",
                arguments.threads,
            ]
            result = subprocess.run(
                [str(word) for word in command], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, check=True
            )
            found[side].append(json.loads(result.stdout.splitlines()[-1]))
    results = {(run["users"], run["events"], run["digest"]) for runs in found.values() for run in runs}
    if len(results) != 1:
        raise RuntimeError(f"the sides disagree: {results}")
    report(found, arguments)


def report(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    for name, value in describe_setting().items():
        print(f"{name}: {value}")
    packages = ["duckdb", *(side for side in found if side != "ours")]
    print(f"packages: {', '.join(f'{name} {version(name)}' for name in packages)}; {arguments.threads} threads")
    first = next(iter(found.values()))[0]
    print(f"{arguments.events:,} events; left: {first['events']:,} events of {first['users']:,} users\n")
    print("| side | seconds | events/s | over ours, in each round | highest resident GiB |\n|---|---|---|---|---|")
    reference = [run["seconds"] for run in next(iter(found.values()))]
    for side, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        ratios = spread([mine / theirs for mine, theirs in zip(seconds, reference, strict=True)], " ×")
        rate = arguments.events / sorted(seconds)[len(seconds) // 2]
        memory = spread([run["peak_bytes"] / GIB for run in runs], "")
        print(f"| {side} | {spread(seconds, '')} | {rate:,.0f} | {ratios} | {memory} |")


if __name__ == "__main__":
    main(sys.argv[1:])
