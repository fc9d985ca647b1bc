"""Building a shard store from the raw tables that a config names.

Items, then features, then histories are written into a folder beside the store, which is renamed in the end. A build
that fails leaves nothing but what later builds use again: the rows that its encoders have finished
(``shards.encodings``), events that were prepared (``shards.interactions``), and copies of tables. The same input gives
the same shards and the same manifest hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256, foreign_entries, replaced_folder
from fmrl_dist.base.progress import Progress
from fmrl_dist.base.urls import hide_credentials, is_url
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.block_arrays import row_problem
from fmrl_dist.data.store.files import FILE_NAME
from fmrl_dist.data.store.manifest import (
    LEAVE_ONE_OUT,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SPLITS,
    USERS_FILE,
    VOCAB_FILE,
    WITH_SPLIT_RULE,
    Manifest,
    dropped_why,
    fit_file,
)
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.store.tables import rows_sha256
from shards.encoders.item_feature import ItemFeature
from shards.encoders.sources import in_order, make_feature
from shards.encodings.kept_rows import encodings_folder
from shards.store.block_writer import BlockWriter
from shards.store.build_report import BuildReport, TableCounts
from shards.store.inputs import record
from shards.store.parquet_tables import users_table, vocab_table
from shards.store.raw_data import RawData
from shards.store.splits import SplitBlocks, SplitWriter, train_counts
from shards.store.user_blocks import BlockFields, UserBlocks
from shards.tables.formats.choice import item_columns
from shards.tables.item_ids import ItemIds

ITEM_ORDER_SEED = 0


def build_store(config: Config, overwrite: bool = False, config_name: str = "") -> tuple[Store, list[ItemFeature]]:
    """Build the store at ``config.store.path``.

    Args:
        config: says what from.
        overwrite: whether to replace a store that is there.
        config_name: of the config's file, for the build report.

    Raises:
        UserError: the raw data are refused or change meanwhile, or something is already there and ``overwrite`` is off.
    """
    target = check_target(config, overwrite)
    make_demo_data(config.data)
    with replaced_folder(target) as aside:
        _check_target(target, overwrite)  # another build may have ended since
        features = _write_store(config, aside, encodings_folder(config.store), BuildReport(config=config_name))
        if not overwrite:
            _check_target(target, overwrite)  # or ends meanwhile, where there are no locks
    return Store.open(target), features


def check_target(config: Config, overwrite: bool) -> Path:
    """Where the store is built, if it may be.

    Raises:
        UserError: as :func:`store_folder`; or something is there that is no store, or one that is not to be replaced.
    """
    target = store_folder(config)
    _check_target(target, overwrite)
    return target


def store_folder(config: Config) -> Path:
    """Where the store is built.

    Raises:
        UserError: it is a URL, or a circle of links.
    """
    require(
        not is_url(config.store.path),
        f"store {hide_credentials(config.store.path)} is a URL; build into a folder (--store.path), then copy it",
    )
    try:
        return Path(config.store.path).resolve()
    except RuntimeError:
        raise UserError(f"store {config.store.path} is a circle of links; choose another --store.path") from None


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not (target / MANIFEST_FILE).is_file():
        raise UserError(f"{target} exists and is not a store; choose another --store.path")
    try:
        schema = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))["schema_version"]
    except (ValueError, LookupError, TypeError, RecursionError):
        schema = None
    require(
        type(schema) is int,
        f"{target / MANIFEST_FILE} is not a store's manifest; move {target} away, or choose another --store.path",
    )
    foreign = foreign_entries(target, lambda name: FILE_NAME.fullmatch(name) is not None)
    require(
        not foreign,
        f"{target} holds {', '.join(foreign[:3])}, which a store does not have; move it away, or choose another "
        "--store.path",
    )
    if not overwrite:
        raise UserError(f"store {target} exists; keep it, or build it again with --overwrite")


def make_demo_data(data: DataConfig) -> None:
    """Generate the demo's raw tables; those of the same size and seed are kept."""
    if data.demo is not None:
        from shards.demo.folder import write_demo  # needs Pillow, which other builds do without

        write_demo(Path(data.root), data.demo.users, data.demo.items, data.demo.seed)


def _write_store(config: Config, folder: Path, encodings: Path, report: BuildReport) -> list[ItemFeature]:
    """Write all files of the store into ``folder``; pretrained encoders keep rows in the folder ``encodings``."""
    with report.timed("raw tables"):
        raw = RawData.read(config)
        _report_items(report, raw)
    features = _make_features(raw, encodings, report)
    inline = config.store.feature_mode == "inline"
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(BlockWriter(folder, split, config.store.blocks_per_shard))
            for split in ("items", *SPLITS)
        }
        with report.timed("item blocks"):
            _write_items(writers["items"], raw.ids, features, config.store.items_per_block, encodings)
        item_fields = partial(_inline_fields, features, _train_counts(raw)) if inline else None
        blocks = {split: UserBlocks(writers[split], config.store.users_per_block, item_fields) for split in SPLITS}
        with report.timed("histories"):
            histories, users = _write_histories(raw, SplitBlocks(**blocks), report)
    tables = {
        VOCAB_FILE: vocab_table(raw.ids.external, histories.train_count, raw.items.titles),
        USERS_FILE: users_table(users),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / name)
    fits = {feature.name: feature.fit for feature in features if feature.fit}
    for name, data in fits.items():
        (folder / fit_file(name)).write_bytes(data)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION if raw.split_rule == LEAVE_ONE_OUT else WITH_SPLIT_RULE,
        num_items=raw.num_items,
        num_users=histories.num_users,
        num_dropped_users=histories.num_dropped_users,
        num_events=histories.num_events,
        inline=inline,
        features=tuple(feature.manifest_entry for feature in features),
        items=tuple(writers["items"].blocks),
        splits={split: tuple(writers[split].blocks) for split in SPLITS},
        shards=tuple(shard for writer in writers.values() for shard in writer.shards),
        tables={name: rows_sha256([table]) for name, table in tables.items()},
        fits={name: hashlib.sha256(data).hexdigest() for name, data in fits.items()},
        built_from=record(config, raw.files, features),
        split_rule=raw.split_rule,
        table_files={name: file_sha256(folder / name) for name in tables},
    )
    raw.check_inputs()
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    report.made_with = manifest.built_from.made_with if manifest.built_from else {}
    report.write(folder)
    return features


def _make_features(raw: RawData, encodings: Path, report: BuildReport) -> list[ItemFeature]:
    """All features that the config names."""
    made: dict[str, ItemFeature] = {}
    for name in in_order(raw.config.data):
        with report.timed(f"feature {name}"):
            feature = make_feature(
                name,
                raw.config.data,
                raw.items.table,
                raw.ids,
                encodings,
                raw.files,
                source_rows=raw.items.source_rows,
                num_source_rows=raw.items.num_source_rows,
                fitted=raw.items.fitted,
                made=made,
            )
        made[name] = feature
    features = [made[name] for name in raw.config.data.features]
    for feature in features:
        report.add_feature(feature)
    return features


def _report_items(report: BuildReport, raw: RawData) -> None:
    items, data = raw.items, raw.config.data
    report.add_items(items.table, *item_columns(data))
    if data.items.path:
        num_rows = items.table.num_rows if items.source_rows is None else items.num_source_rows
        report.tables["data.items"] = TableCounts(num_rows + sum(items.bad.values()), dict(items.bad))
    else:
        del report.tables["data.items"]


def _report_histories(report: BuildReport, raw: RawData, writer: SplitWriter, num_read: int) -> None:
    """The funnel from the events of the raw table to those of the store."""
    num_users = writer.num_users + writer.num_dropped_users
    if raw.prepared is None:
        report.tables["data.sequences"] = TableCounts(num_users)
        report.add_step("read", "remain", num_users, raw.num_items, num_read)
    else:
        funnel = raw.prepared.funnel
        report.tables["data.sequences"] = TableCounts(funnel.rows, dict(funnel.bad))
        report.add_step("read", "remain", events=funnel.rows - sum(funnel.bad.values()))
        for step in funnel.steps:
            report.add_step(step.name, "removed", events=step.removed)
        report.add_step("histories", "remain", funnel.users, funnel.items, funnel.events)
        report.add_step("events with the time of a neighbour", "noted", events=funnel.tied_events)
        report.add_step("users whose ties decide what is held out", "noted", funnel.users_tied_at_split)
    dropped = f"users with {dropped_why(raw.split_rule)}"
    report.add_step(dropped, "removed", writer.num_dropped_users, events=num_read - writer.num_events)
    report.add_step("in the store", "remain", writer.num_users, raw.num_items, writer.num_events)
    sorted_users = writer.num_sorted_users if raw.prepared is None else raw.prepared.funnel.sorted_users
    repeated = writer.num_repeated_events if raw.prepared is None else raw.prepared.funnel.repeated_events
    report.add_step("users whose events were out of order, sorted", "noted", sorted_users)
    report.add_step("events equal to an earlier one, kept", "noted", events=repeated)


def _write_items(
    writer: BlockWriter, ids: ItemIds, features: Sequence[ItemFeature], items_per_block: int, encodings: Path
) -> None:
    """Item blocks in permuted order, so that any run of them is a uniform sample of the catalogue.

    Raises:
        UserError: a row that no reader would take, such as one that was never written.
    """
    num_items = len(ids.external)
    order = np.random.default_rng(ITEM_ORDER_SEED).permutation(num_items)
    progress = Progress("item", num_items, name="item blocks")
    for low in range(0, num_items, items_per_block):
        rows = order[low : low + items_per_block]
        fields = {"ids": rows}
        for feature in features:
            fields |= feature.block_fields(rows)
            problem = row_problem(fields[feature.name], fields.get(f"{feature.name}.mask"))
            if problem is not None:
                item = ids.external[int(rows[problem[1]])].as_py()
                raise UserError(
                    f"feature {feature.name!r} ({feature.encoder}): the row of item {item!r} {problem[0]}; remove "
                    f"what earlier builds kept in {encodings}, and build again"
                )
        writer.write(fields, count=len(rows), events=0)
        progress.advance(len(rows))
    progress.close()


def _write_histories(raw: RawData, blocks: SplitBlocks, report: BuildReport) -> tuple[SplitWriter, pa.Array]:
    """Write the blocks of all splits; returns the writer with its counts, and the external ids of the users."""
    writer, num_read = SplitWriter(blocks, raw.num_items, raw.config.data.split.target), 0
    for batch in raw.histories("histories"):
        writer.add(batch)
        num_read += len(batch.items)
    _report_histories(report, raw, writer, num_read)
    users = writer.finish()
    if writer.num_sorted_users:
        column = raw.config.data.sequences.times
        print(
            f"histories: {writer.num_sorted_users:,} users' events were out of order: sorted by {column!r}", flush=True
        )
    if writer.num_repeated_events:
        print(
            f"histories: {writer.num_repeated_events:,} events stand twice (same user, item and time): kept as they "
            "are; remove them from the table if each happened once",
            flush=True,
        )
    require(
        writer.num_users > 0,
        f"table {raw.history_path}: none of its {writer.num_dropped_users} histories has 2 events; "
        "there is nothing to train on",
    )
    return writer, users


def _train_counts(raw: RawData) -> np.ndarray:
    """Train events of each item, int64 [V]: inline blocks carry them, which takes a first pass over the histories."""
    counts = np.zeros(raw.num_items, np.int64)
    for batch in raw.histories("train counts"):
        counts += train_counts(batch, len(counts), raw.config.data.split.target)
    return counts


def _inline_fields(features: Sequence[ItemFeature], train_count: np.ndarray, items: np.ndarray) -> BlockFields:
    """What an inline block carries about its distinct items."""
    ids = np.unique(items)
    fields = {"block_items": ids, "block_counts": train_count[ids]}
    for feature in features:
        fields |= feature.block_fields(ids)
    return fields
