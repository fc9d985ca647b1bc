"""``python -m benchmarks.paper.subset``: a small data set out of a large one, to see what the defaults make of it.

Users are drawn at random. Then items with fewer than CORE events, and users with fewer than 5, are left out again and
again until none is left; with a core of 0 all items stay. Items are numbered anew, in their order, and take their
features along, which a build refuses to do for an array beside rows that it leaves out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.config.command_line import CommandParser

LEAST_EVENTS = 5  # of a user

CONFIG = """\
data:
  root: {folder}
  ids: integer
  sequences: {{path: sequences.parquet, layout: sequences, user: user_id, items: item_ids}}
  items: {{path: items.parquet, id: item_id}}
  features:
    text: {{source: npy, path: features.npy, dim: {dim}}}
  windows: {windows}
"""


def core(histories: list[list[int]], least_events: int) -> list[list[int]]:
    """What is left of the histories once no item has fewer events, and no history fewer than 5."""
    while True:
        events = Counter(item for history in histories for item in history)
        frequent = [[item for item in history if events[item] >= least_events] for history in histories]
        left = [history for history in frequent if len(history) >= LEAST_EVENTS]
        if left == histories:
            return left
        histories = left


def write_subset(
    histories: list[list[int]], features: np.ndarray, keep_items: bool, windows: str, folder: Path
) -> None:
    """The tables, the features and a config of a data set, in a folder that is made.

    Args:
        histories: of items numbered from 1.
        features: [V, dim], row = number - 1.
        keep_items: whether items without events stay.
        windows: ``data.windows`` of the config.
        folder: to write.
    """
    used = {item for history in histories for item in history}
    items = range(1, len(features) + 1) if keep_items else sorted(used)
    number = {item: place for place, item in enumerate(items, 1)}
    folder.mkdir(parents=True)
    rows = pa.array([[number[item] for item in history] for history in histories], pa.list_(pa.int32()))
    users = pa.array(range(1, len(histories) + 1), pa.int64())
    pq.write_table(pa.table({"user_id": users, "item_ids": rows}), folder / "sequences.parquet")
    pq.write_table(pa.table({"item_id": pa.array(number.values(), pa.int32())}), folder / "items.parquet")
    np.save(folder / "features.npy", features[[item - 1 for item in items]])
    config = CONFIG.format(folder=folder.resolve(), dim=features.shape[1], windows=windows)
    (folder / "config.yaml").write_text(config, encoding="utf-8")


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m benchmarks.paper.subset", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with sequences.parquet and the features")
    parser.add_argument("--features", default="text_minilm_384.npy", help="their file (default: %(default)s)")
    parser.add_argument("--users", type=int, required=True, help="to draw")
    parser.add_argument("--core", type=int, default=5, help="least events of an item (default: 5); 0: keep all items")
    parser.add_argument("--windows", choices=("last", "all"), default="last", help="data.windows (default: last)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, with a config.yaml")
    arguments = parser.parse_args(argv)
    require(not arguments.output.exists(), f"--output {arguments.output} exists; name a folder that does not")
    require(arguments.core >= 0, f"--core is {arguments.core}; expected at least 0")
    for name in ("sequences.parquet", arguments.features):
        require((arguments.data / name).is_file(), f"{arguments.data / name} does not exist; --data needs both files")
    histories = pq.read_table(arguments.data / "sequences.parquet", columns=["item_ids"])["item_ids"].to_pylist()
    require(
        0 < arguments.users <= len(histories),
        f"--users is {arguments.users}; expected 1 to {len(histories):,}, which there are",
    )
    drawn = np.random.default_rng(0).choice(len(histories), arguments.users, replace=False)
    kept = core([histories[user] for user in sorted(drawn)], arguments.core)
    require(bool(kept), f"no user is left of {arguments.users:,} with --core {arguments.core}; draw more, or lower it")
    features, last = np.load(arguments.data / arguments.features, allow_pickle=False), max(map(max, kept))
    require(last <= len(features), f"{arguments.features} has {len(features):,} rows, and there is an item {last:,}")
    write_subset(kept, features, arguments.core == 0, arguments.windows, arguments.output)
    events = sum(map(len, kept))
    print(f"{len(kept):,} users, {len({item for h in kept for item in h}):,} items with {events:,} events")
    print(f"written: {arguments.output / 'config.yaml'}")


if __name__ == "__main__":
    run_command(main)
