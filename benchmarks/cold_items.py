"""``python -m benchmarks.cold_items --data DATA``: how well items are recommended that no training has seen.

A share of the items, drawn from a seed, is held out: a store is built without them and without their events, a model
trained on it and exported, and ``fmrl_dist.add_items`` appends them. Then all test users of the whole store are ranked
against the whole catalogue, and those whose target is a held-out item are counted apart. Beside it stand a model that
had trained on these items, and what can be had without training. Histories are as they happened, held-out items
included, so the appended items are read as well as recommended.

Everything is kept in ``--work``: a second call continues, and repeats only what is quick. Options
``--section.key VALUE`` change both trainings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks import REPOSITORY, describe_setting
from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.table_files import rooted, table_files
from fmrl_dist.config.features import ImageFeature, NpyFeature
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config
from fmrl_dist.config.tables import TablePath
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.baselines import LAST_EVENT, rank_by_popularity
from fmrl_dist.evaluation.results.user_ranks import UserRanks, read_user_ranks
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

CUTOFF = 10
USERS_FILE = "evaluation-users.parquet"
FREE = {
    "popularity": "popularity, counted with their events",
    "item_knn": "item-kNN, counted with their events",
    "cosine": "nearest neighbours of the last item by its features (cosine)",
}
Rows = dict[str, dict[int, np.ndarray]]  # name of a row → protocol → target ranks of all users


def main(argv: list[str]) -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("python -m benchmarks.cold_items", description=summary, epilog=rest)
    parser.add_argument("--data", type=Path, required=True, help="data.root of the raw tables")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "beauty-text-npy.yaml")
    parser.add_argument("--work", type=Path, default=Path("cold-items"), help="folder for stores and runs")
    parser.add_argument("--share", type=float, default=0.05, help="of the items that is held out (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="that draws them")
    arguments, overrides = parser.parse_known_args(argv)
    require(0 < arguments.share < 1, f"--share is {arguments.share}; expected between 0 and 1")
    work, data = arguments.work.absolute(), arguments.data.absolute()
    work.mkdir(parents=True, exist_ok=True)
    config = load_config(arguments.config, [*overrides, "--data.root", str(data)])
    whole = write_config(config, work, "whole", {})
    command("shards.build", "--config", whole, "--keep")  # of the demo, this also generates the tables
    held_out = write_tables(config, work, arguments.share, arguments.seed)
    known = write_config(config, work, "known", known_data(config, work / "known"))
    command("shards.build", "--config", known, "--keep")
    seconds = {}
    for name, path in (("known", known), ("whole", whole)):
        began = time.monotonic()
        command("fmrl_dist.train", "--config", path, "--resume", "auto")
        seconds[name] = time.monotonic() - began
    run, store = work / "known-run", work / "whole-store"
    command("fmrl_dist.export", "--checkpoint", run, "--output", work / "export", "--overwrite", "--measure-users", 0)
    command(
        *("fmrl_dist.add_items", work / "export", "--output", work / "export-all", "--overwrite"),
        *("--items", work / "held-out" / "items.parquet", "--id", config.data.items.id),
        *("--title", config.data.items.title, *feature_words(config, work / "held-out")),
    )
    command("fmrl_dist.evaluate", "--checkpoint", work / "export-all", "--store", store, "--per-user")
    command("fmrl_dist.evaluate", "--checkpoint", work / "whole-run", "--store", store, "--per-user")
    command("fmrl_dist.baselines", "--store", store, "--output", work / "baselines")
    for key, value in describe_setting().items():
        print(f"{key:<10} {value}")
    print(f"config     {arguments.config} {' '.join(overrides)}; seed {arguments.seed}")
    print(f"training   {seconds['known']:.0f} s without the items, {seconds['whole']:.0f} s with them (this call)\n")
    report(work, Store.open(str(store)), held_out)


def command(module: str, *words: object) -> None:
    """Run one of our commands."""
    line = [sys.executable, "-m", module, *map(str, words)]
    print("$", *line[1:], flush=True)
    ended = subprocess.run(line, check=False)
    require(ended.returncode == 0, f"{module} ended with code {ended.returncode}; see the lines above")


def write_config(config: Config, work: Path, name: str, data: Mapping[str, Any]) -> Path:
    """The config of one of the two stores and runs, with other keys of its section ``data``."""
    values = yaml.safe_load(config.to_yaml())
    values["data"] |= data
    values["store"]["path"], values["run"]["dir"] = str(work / f"{name}-store"), str(work / f"{name}-run")
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def known_data(config: Config, folder: Path) -> dict[str, Any]:
    """Keys of ``data`` for :func:`write_tables`' tables."""
    values = yaml.safe_load(config.to_yaml())["data"]
    for name, feature in config.data.features.items():
        if isinstance(feature, NpyFeature):
            values["features"][name]["path"] = str(folder / f"{name}.npy")
        elif isinstance(feature, ImageFeature):  # images of items that are not in the table are left out
            values["features"][name]["path"] = str(Path(config.data.root) / feature.path)
    return {
        "root": str(folder),
        "demo": None,
        "ids": config.data.ids,
        "items": values["items"] | {"path": "items.parquet"},
        "sequences": values["sequences"] | {"path": "sequences.parquet"},
        "features": values["features"],
    }


def write_tables(config: Config, work: Path, share: float, seed: int) -> pa.Array:
    """Tables of the known items and of those held out; returns the ids of the latter, as text."""
    data, root = config.data, Path(config.data.root)
    items = whole_table(root, data.items.path)
    number = max(1, round(share * len(items)))
    drawn = np.random.default_rng(seed).choice(len(items), number, replace=False)
    is_held_out = np.zeros(len(items), np.bool_)
    is_held_out[drawn] = True
    for name, kept in (("known", ~is_held_out), ("held-out", is_held_out)):
        (work / name).mkdir(exist_ok=True)
        pq.write_table(items.filter(pa.array(kept)), work / name / "items.parquet")
        for feature, source in data.features.items():
            if isinstance(source, NpyFeature):
                np.save(work / name / f"{feature}.npy", np.load(root / source.path, mmap_mode="r")[kept])
    held_out = items[data.items.id].filter(pa.array(is_held_out)).combine_chunks()
    histories = whole_table(root, data.sequences.path)
    pq.write_table(without_items(histories, config, held_out), work / "known" / "sequences.parquet")
    return held_out.cast(pa.large_string())


def whole_table(root: Path, path: TablePath) -> pa.Table:
    """A table of Parquet files."""
    return pa.concat_tables(map(pq.read_table, table_files(rooted(root, path), (".parquet",))))


def without_items(histories: pa.Table, config: Config, held_out: pa.Array) -> pa.Table:
    """Histories without the events of some items."""
    columns = config.data.sequences
    column = histories[columns.items].combine_chunks()
    if columns.layout == "interactions":
        return histories.filter(pc.invert(pc.is_in(column, value_set=held_out.cast(column.type))))
    values = column.flatten()
    kept = pc.invert(pc.is_in(values, value_set=held_out.cast(values.type)))
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    owners = np.repeat(np.arange(len(column)), lengths)[np.asarray(kept)]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(owners, minlength=len(column)))))
    for name in filter(None, (columns.items, columns.times)):
        of_events = histories[name].combine_chunks().flatten().filter(kept)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), of_events)
        histories = histories.set_column(histories.column_names.index(name), name, lists)
    return histories


def feature_words(config: Config, folder: Path) -> list[str]:
    """Options of ``add_items`` that name the features' files."""
    words = []
    for name, feature in config.data.features.items():
        if isinstance(feature, NpyFeature):
            words += ["--feature", f"{name}={folder / f'{name}.npy'}"]
        elif isinstance(feature, ImageFeature):
            words += ["--feature", f"{name}={Path(config.data.root) / feature.path}"]
            words += ["--image-columns", feature.id, feature.image]
    return words


def report(work: Path, store: Store, held_out: pa.Array) -> None:
    """Print the table."""
    appended = read_user_ranks(next((work / "export-all").glob("evaluation*-users.parquet")))
    trained = read_user_ranks(work / "whole-run" / USERS_FILE)
    free = read_user_ranks(work / "baselines" / USERS_FILE)
    for other in (trained, free):
        assert other.users.equals(appended.users) and other.targets.equals(appended.targets)
    is_cold = np.asarray(pc.is_in(appended.targets, value_set=held_out.cast(appended.targets.type)))
    rows: Rows = {"popularity, counted without their events": known_popularity(store, held_out)}
    rows |= {FREE.get(name, f"{name} of the last item"): ranks for name, ranks in named(free, "{}").items()}
    rows |= named(appended, "appended, not trained on, size {}")
    rows |= named(trained, "trained on, size {}")
    num_items = store.manifest.num_items
    print(
        f"{len(held_out):,} of {num_items:,} items held out; test users: {is_cold.sum():,} whose target is one of them "
        f"(cold), {(~is_cold).sum():,} others (warm); leave-one-out, ties count half, all {num_items:,} items ranked.\n"
        f"Recall@{CUTOFF} in %, among all items | seen items masked; ± is the half width of a 95 % interval over "
        f"users. In random order: {100 * CUTOFF / num_items:.2f} %.\n"
    )
    print(f"| | cold, all items | cold, masked | warm, all items | warm, masked |\n|{'---|' * 5}")
    for name, ranks in rows.items():
        cells = [recall(ranks[which][users]) for users in (is_cold, ~is_cold) for which in (ALL, UNSEEN)]
        print(f"| {name} | {' | '.join(cells)} |")


def named(ranks: UserRanks, pattern: str) -> Rows:
    """Rows of an evaluation; of cut vectors there are none."""
    names = dict.fromkeys(name for _, name in ranks.ranks if not name.startswith("vectors-"))
    return {pattern.format(name): {which: ranks.ranks[which, name] for which in (ALL, UNSEEN)} for name in names}


def known_popularity(store: Store, held_out: pa.Array) -> dict[int, np.ndarray]:
    """Target ranks by training counts of which held-out items have none."""
    vocabulary = pq.read_table(pa.BufferReader(store.read_table(VOCAB_FILE)))
    counts = vocabulary["train_count"].to_numpy().copy()
    counts[np.asarray(pc.is_in(vocabulary["external_id"].cast(pa.large_string()), value_set=held_out))] = 0
    numbers: Sequence[int] = range(len(store.manifest.splits["test"]))
    found = list(rank_by_popularity(counts, evaluation_blocks(store, "test", LAST_EVENT, numbers)))
    order = np.argsort(np.concatenate([block.users.numpy() for block in found]), kind="stable")
    return {which: np.concatenate([b.ranks[which, 0].numpy() for b in found])[order] for which in (ALL, UNSEEN)}


def recall(ranks: np.ndarray) -> str:
    if len(ranks) == 0:
        return "no users"
    share = float((ranks <= CUTOFF).mean())
    return f"{100 * share:.2f} ± {196 * (share * (1 - share) / len(ranks)) ** 0.5:.2f}"


if __name__ == "__main__":
    run_command(main)
