"""``python -m shards.build``: raw tables in, shard store out.

Items, then features, then histories are written into a folder beside the store, which is renamed in the end: a build
that fails leaves nothing but the blocks that its encoders had finished (``shards.encoders.encoding``), which the next
one takes over. The same input gives the same shards and the same manifest hash.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import replaced_folder
from fmrl_dist.base.urls import hide_credentials, is_url
from fmrl_dist.config.command_line import command_parser, parse_command
from fmrl_dist.config.features import TextFeature
from fmrl_dist.config.sections import Config, DataConfig
from fmrl_dist.data.store.manifest import MANIFEST_FILE, SCHEMA_VERSION, SPLITS, USERS_FILE, VOCAB_FILE, Manifest
from fmrl_dist.data.store.reader import Store
from shards.encoders.encoding import encoding_folder
from shards.encoders.features import FeatureRows, make_feature
from shards.encoders.item_text import template_columns
from shards.tables.histories import Histories, ItemFields, SplitWriter, UserBlocks, read_histories, train_counts
from shards.tables.tables import ItemIds, as_ids, check_unique, content_sha256, read_table
from shards.tables.writer import BlockWriter

ITEM_ORDER_SEED = 0


def main(argv: list[str]) -> None:
    parser = command_parser("shards.build", "Build the shard store that a config describes.")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="replace a store that is already there")
    there.add_argument("--keep", action="store_true", help="keep a store that is already there, and build none")
    arguments, config = parse_command(parser, argv)
    if arguments.keep and (is_url(config.store.path) or Path(config.store.path, MANIFEST_FILE).is_file()):
        kept = kept_store(config)
        print(f"kept {kept.location}: {kept.manifest.num_users:,} users, {kept.manifest.num_items:,} items")
        return
    start = time.monotonic()
    store, features = build(config, overwrite=arguments.overwrite)
    _print_summary(store, features, time.monotonic() - start)


def build(config: Config, overwrite: bool = False) -> tuple[Store, list[FeatureRows]]:
    """Build the store at ``config.store.path``.

    Raises:
        UserError: the raw data are refused, or something is already there and ``overwrite`` is off.
    """
    require(
        not is_url(config.store.path),
        f"store {hide_credentials(config.store.path)} is a URL; build into a folder (--store.path), then copy it",
    )
    target = Path(config.store.path).resolve()
    _check_target(target, overwrite)
    _make_demo_data(config.data)
    with replaced_folder(target) as aside:
        features = _write_store(config, aside, encoding_folder(target))
    shutil.rmtree(encoding_folder(target), ignore_errors=True)
    return Store.open(target), features


def kept_store(config: Config) -> Store:
    """The store that is already there: every shard in full length, with the config's features.

    Its blocks are checked at every read.

    Raises:
        UserError: it is not whole, or another config's.
    """
    store = Store.open(config.store.path, config.store)
    mend = "build it again with --overwrite, or choose another --store.path"
    for shard in store.manifest.shards:
        try:
            size = store.files.size(shard.name)
        except FileNotFoundError:
            size = 0
        require(
            size == shard.num_bytes,
            f"store {store.location}: {shard.name} has {size} bytes, the manifest says {shard.num_bytes}; {mend}",
        )
    found = [feature.name for feature in store.manifest.features]
    absent = [name for name in config.data.features if name not in found]
    require(not absent, f"store {store.location} has the features {found}, not the config's {absent}; {mend}")
    return store


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not (target / MANIFEST_FILE).is_file():
        raise UserError(f"{target} exists and is not a store; choose another --store.path")
    if not overwrite:
        raise UserError(f"store {target} exists; keep it, or build it again with --overwrite")


def _make_demo_data(data: DataConfig) -> None:
    """Generate the demo's raw tables; those of the same size and seed are kept."""
    if data.demo is not None:
        from shards.demo.shop import write_demo  # drawing needs what no other build does

        write_demo(Path(data.root), data.demo.users, data.demo.items, data.demo.seed)


def _write_store(config: Config, folder: Path, encoding: Path) -> list[FeatureRows]:
    """Write all files of the store into ``folder``; finished blocks of encoders are kept in ``encoding``."""
    data = config.data
    path = Path(data.root) / data.items.path
    items = read_table(path, _item_columns(data))
    ids = ItemIds(as_ids(items[data.items.id], f"column {data.items.id!r} of {path}"))
    check_unique(ids.external, f"column {data.items.id!r} of {path}")
    features = [make_feature(name, data, items, ids, encoding) for name in data.features]
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(BlockWriter(folder, split, config.store.blocks_per_shard))
            for split in ("items", *SPLITS)
        }
        _write_items(writers["items"], len(ids.external), features, config.store.items_per_block)
        path = Path(data.root) / data.sequences.path
        inline = config.store.feature_mode == "inline"
        of_items = _fields_of_items(features, _count(path, data, ids)) if inline else None
        train, valid, test = (UserBlocks(writers[split], config.store.users_per_block, of_items) for split in SPLITS)
        splits = SplitWriter(train, valid, test, len(ids.external))
        for batch in _histories(path, data, ids, "histories"):
            splits.add(batch)
        users = splits.finish()
    check_unique(users, f"column {data.sequences.user!r} of {path}")
    if splits.num_users == 0:
        raise UserError(
            f"table {path}: none of its {splits.num_dropped_users} histories has 2 events; nothing to learn"
        )
    tables = {
        VOCAB_FILE: _vocab(items, ids, data.items.title, splits.train_count),
        USERS_FILE: pa.table({"user": np.arange(len(users)), "external_id": users}),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / name)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        num_items=len(ids.external),
        num_users=splits.num_users,
        num_dropped_users=splits.num_dropped_users,
        num_events=splits.num_events,
        inline=inline,
        features=tuple(feature.info for feature in features),
        items=tuple(writers["items"].blocks),
        splits={split: tuple(writers[split].blocks) for split in SPLITS},
        shards=tuple(shard for writer in writers.values() for shard in writer.shards),
        tables={name: content_sha256(table) for name, table in tables.items()},
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return features


def _item_columns(data: DataConfig) -> list[str]:
    """Columns of the item table that this build reads."""
    columns = [data.items.id, *([data.items.title] if data.items.title else [])]
    for feature in data.features.values():
        if isinstance(feature, TextFeature):
            columns += template_columns(feature.text or data.text)
    return columns


def _write_items(writer: BlockWriter, num_items: int, features: Sequence[FeatureRows], items_per_block: int) -> None:
    """Item blocks in permuted order, so that any run of them is a uniform sample of the catalogue."""
    order = np.random.default_rng(ITEM_ORDER_SEED).permutation(num_items)
    with tqdm(total=num_items, desc="items", unit="item", disable=None) as progress:
        for low in range(0, num_items, items_per_block):
            ids = order[low : low + items_per_block]
            fields = {"ids": ids}
            for feature in features:
                fields |= feature.take(ids)
            writer.write(fields, count=len(ids), events=0)
            progress.update(len(ids))


def _histories(path: Path, data: DataConfig, ids: ItemIds, what: str) -> Iterator[Histories]:
    with tqdm(desc=what, unit="user", disable=None) as progress:
        for batch in read_histories(path, data.sequences, ids):
            yield batch
            progress.update(len(batch.users))


def _count(path: Path, data: DataConfig, ids: ItemIds) -> np.ndarray:
    """Train events of each item, int64 [V]: a pass over the histories of its own, for blocks that carry them."""
    counts = np.zeros(len(ids.external), np.int64)
    for batch in _histories(path, data, ids, "train counts"):
        counts += train_counts(batch, len(counts))
    return counts


def _fields_of_items(features: Sequence[FeatureRows], counts: np.ndarray) -> Callable[[np.ndarray], ItemFields]:
    """What an inline block carries of its distinct items."""

    def fields(items: np.ndarray) -> ItemFields:
        ids = np.unique(items)
        arrays = {"block_items": ids, "block_counts": counts[ids]}
        for feature in features:
            arrays |= feature.take(ids)
        return arrays

    return fields


def _vocab(items: pa.Table, ids: ItemIds, title: str, train_count: np.ndarray) -> pa.Table:
    columns = {"item": np.arange(len(ids.external)), "external_id": ids.external, "train_count": train_count}
    if title:
        columns["title"] = items[title].cast(pa.large_string())
    return pa.table(columns)


def _print_summary(store: Store, features: list[FeatureRows], seconds: float) -> None:
    manifest = store.manifest
    print(
        f"built {store.location} in {seconds:.1f} s: {manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_events:,} events, {manifest.num_dropped_users:,} users dropped (fewer than 2 events), "
        f"{sum(shard.num_bytes for shard in manifest.shards):,} bytes in {len(manifest.shards)} shards"
    )
    for feature in features:
        info = feature.info
        share = 100 * info.present / manifest.num_items
        note = f" ({feature.note})" if feature.note else ""
        print(f"  feature {info.name}: {info.dim} x {info.dtype}, {info.encoder}, {share:.1f} % of items{note}")


if __name__ == "__main__":
    run_command(main)
