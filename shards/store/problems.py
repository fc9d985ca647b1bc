"""``python -m shards.verify STORE``: recompute everything that the manifest claims.

Whole-file and per-block hashes, tar structure up to the end-of-archive bytes, dtypes, dims, finiteness, counts, the
ranges of ids, and the two tables. Every problem is one line; any problem ends with exit code 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fmrl_dist.base.errors import UserError, run_command
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.data.store.manifest import MANIFEST_FILE, SPLITS, USERS_FILE, VOCAB_FILE, Block, Manifest, Shard
from fmrl_dist.data.store.reader import Store
from shards.tables.tables import content_sha256

END_OF_ARCHIVE_BYTES = 1024  # two zero blocks; tar pads further


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m shards.verify", description="Check a shard store, byte by byte.")
    parser.add_argument("store", help="folder or URL of the store")
    store = Store.open(parser.parse_args(argv).store)
    problems = 0
    for problem in verify(store):
        problems += 1
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"store {store.location} has {problems} problems; build it again with shards.build --overwrite")
    manifest = store.manifest
    blocks = len(manifest.items) + sum(len(blocks) for blocks in manifest.splits.values())
    print(
        f"ok: {store.location}: {len(manifest.shards)} shards, {blocks} blocks, {manifest.num_users:,} users, "
        f"{manifest.num_items:,} items, {manifest.num_events:,} events"
    )


def verify(store: Store) -> Iterator[str]:
    """Problems of the store, one line each; none if it is sound."""
    manifest = store.manifest
    yield from _check_folder(store)
    blocks = _blocks_by_shard(manifest)
    for shard in manifest.shards:
        yield from _check_shard(store, shard, blocks[shard.name])
    yield from _check_items(store)
    train_count = np.zeros(manifest.num_items, np.int64)
    users = {}
    for split in SPLITS:
        users[split] = np.zeros(manifest.num_users, bool)
        yield from _check_histories(store, split, users[split], train_count)
    if not users["train"].all():
        yield f"train: {int((~users['train']).sum())} of {manifest.num_users} users are in no block"
    if not np.array_equal(users["valid"], users["test"]):
        yield "valid and test do not hold the same users"
    events = {split: sum(block.events for block in manifest.splits[split]) for split in SPLITS}
    evaluated = int(users["test"].sum())
    if manifest.num_events != events["train"] + 2 * evaluated or events["test"] != events["valid"] + evaluated:
        yield f"events of the splits ({events}) do not add up to the manifest's {manifest.num_events}"
    yield from _check_tables(store, train_count)


def _blocks_by_shard(manifest: Manifest) -> dict[str, list[Block]]:
    blocks: dict[str, list[Block]] = {shard.name: [] for shard in manifest.shards}
    for block in chain(manifest.items, *(manifest.splits[split] for split in SPLITS)):
        blocks[block.shard].append(block)
    return blocks


def _check_folder(store: Store) -> Iterator[str]:
    known = {MANIFEST_FILE, VOCAB_FILE, USERS_FILE, *(shard.name for shard in store.manifest.shards)}
    for name in store.files.names() or ():  # a URL tells no names: there, only what the manifest names is looked at
        if name not in known:
            yield f"{name}: not in the manifest"


def _check_shard(store: Store, shard: Shard, blocks: list[Block]) -> Iterator[str]:
    """The file's size, hash and totals; its blocks side by side from byte 0; zeros after them."""
    try:
        size = store.files.size(shard.name)
    except FileNotFoundError:
        yield f"{shard.name}: missing"
        return
    if size != shard.num_bytes:
        yield f"{shard.name}: {size} bytes, the manifest says {shard.num_bytes}"
    end = 0
    for block in blocks:
        if block.offset != end:
            yield f"{shard.name}: a block at byte {block.offset}, expected at {end}"
        end = block.offset + block.num_bytes
    digest, position, tail_is_zero = hashlib.sha256(), 0, True
    for piece in store.files.stream(shard.name, size):
        digest.update(piece)
        tail_is_zero &= not any(piece[max(end - position, 0) :])
        position += len(piece)
    if digest.hexdigest() != shard.sha256:
        yield f"{shard.name}: sha256 of the file is not the manifest's"
    if position - end < END_OF_ARCHIVE_BYTES or not tail_is_zero:
        yield f"{shard.name}: the end-of-archive bytes after byte {end} are not {END_OF_ARCHIVE_BYTES} or more zeros"
    found = (len(blocks), sum(block.count for block in blocks), sum(block.events for block in blocks))
    if found != (shard.samples, shard.count, shard.events):
        yield f"{shard.name}: blocks, rows and events are {found}, its entry says otherwise"


def _read(
    store: Store, blocks: tuple[Block, ...], split: str
) -> Iterator[tuple[str, Block, dict[str, np.ndarray] | str]]:
    """Name, entry and arrays of each block; a message in their place where it cannot be read."""
    for i, block in enumerate(tqdm(blocks, desc=split, unit="block", disable=None)):
        name = f"{split} block {i} ({block.shard} at byte {block.offset})"
        try:
            yield name, block, store.read_block(block)
        except UserError as error:
            yield name, block, f"{name}: {error}"


def _check_items(store: Store) -> Iterator[str]:
    """Every item once, as many with each feature as claimed; the rest is checked at every read."""
    manifest = store.manifest
    seen = np.zeros(manifest.num_items, np.int64)
    present = dict.fromkeys((feature.name for feature in manifest.features), 0)
    for _, block, arrays in _read(store, manifest.items, "items"):
        if isinstance(arrays, str):
            yield arrays
            continue
        np.add.at(seen, arrays["ids"], 1)
        for feature in manifest.features:
            present[feature.name] += int(arrays.get(f"{feature.name}.mask", np.ones(block.count, bool)).sum())
    if not (seen == 1).all():
        yield f"items: {int((seen != 1).sum())} of {manifest.num_items} items are not in exactly one block"
    for feature in manifest.features:
        if present[feature.name] != feature.present:
            yield f"feature {feature.name}: {present[feature.name]} items have it, the manifest says {feature.present}"


def _check_histories(store: Store, split: str, users: np.ndarray, train_count: np.ndarray) -> Iterator[str]:
    """Each user at most once; marks ``users``, adds to ``train_count``. The rest is checked at every read."""
    for name, _, arrays in _read(store, store.manifest.splits[split], split):
        if isinstance(arrays, str):
            yield arrays
            continue
        if split == "train":
            train_count += np.bincount(arrays["items"], minlength=len(train_count))
        if users[arrays["users"]].any():
            yield f"{name}: a user stands twice in {split}"
        users[arrays["users"]] = True


def _check_tables(store: Store, train_count: np.ndarray) -> Iterator[str]:
    """Rows, ids and content of the vocabulary and of the users."""
    sizes = {VOCAB_FILE: ("item", store.manifest.num_items), USERS_FILE: ("user", store.manifest.num_users)}
    for name, (id_column, num_rows) in sizes.items():
        try:
            with pq.ParquetFile(pa.BufferReader(store.read_table(name))) as file:
                table = file.read(use_threads=False)  # see Store.read_table
        except (pa.ArrowException, OSError, UserError) as error:
            yield f"{name}: cannot be read ({' '.join(str(error).split())})"
            continue
        if table.num_rows != num_rows:
            yield f"{name}: {table.num_rows} rows, the manifest says {num_rows}"
        if content_sha256(table) != store.manifest.tables[name]:
            yield f"{name}: its rows are not those that were written"
        elif not np.array_equal(table[id_column].to_numpy(), np.arange(num_rows)):
            yield f"{name}: column {id_column!r} does not count from 0"
        elif name == VOCAB_FILE and not np.array_equal(table["train_count"].to_numpy(), train_count):
            yield f"{name}: train_count is not what the train blocks hold"


if __name__ == "__main__":
    run_command(main)
