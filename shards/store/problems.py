"""What is wrong with a store: everything that the manifest claims, recomputed.

Whole-file and per-block hashes, tar structure up to the end-of-archive bytes, dtypes, dims, finiteness, counts, the
ranges of ids, and the two tables. A problem is one line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.base.progress import Progress
from fmrl_dist.data.store.files import FILE_NAME
from fmrl_dist.data.store.manifest import (
    LEAVE_ONE_OUT,
    MANIFEST_FILE,
    SPLITS,
    USERS_FILE,
    VOCAB_FILE,
    Block,
    Manifest,
    Shard,
    fit_file,
)
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.store.tables import rows_sha256, table_batches
from shards.store.build_report import BUILD_REPORT_FILE

END_OF_ARCHIVE_BYTES = 1024  # two zero blocks; tar pads further


def store_problems(store: Store) -> Iterator[str]:
    """Problems of the store, one line each; none if it is sound."""
    manifest = store.manifest
    yield from _folder_problems(store)
    blocks = _blocks_by_shard(manifest)
    for shard in manifest.shards:
        yield from _shard_problems(store, shard, blocks[shard.name])
    items, users = _ItemChecks(manifest), {split: _UserChecks(manifest, split) for split in SPLITS}
    progress = Progress("block", sum(map(len, blocks.values())), name="verify")
    checks: dict[str, _ItemChecks | _UserChecks] = {"items": items, **users}
    for split in checks:
        for number, block in enumerate(manifest.items if split == "items" else manifest.splits[split]):
            name = f"{split} block {number} ({block.shard} at byte {block.offset})"
            try:
                arrays = store.read_block(block)
            except UserError as error:
                yield f"{name}: {error}"
            else:
                yield from checks[split].add(name, arrays)
            progress.advance(1)
    progress.close()
    yield from items.problems()
    yield from _split_problems(manifest, users)
    yield from _table_problems(store, users["train"].train_count)
    for feature in manifest.fits:
        try:
            store.read_fit(feature)
        except UserError as error:
            yield str(error)


def _blocks_by_shard(manifest: Manifest) -> dict[str, list[Block]]:
    blocks: dict[str, list[Block]] = {shard.name: [] for shard in manifest.shards}
    for block in chain(manifest.items, *(manifest.splits[split] for split in SPLITS)):
        blocks[block.shard].append(block)
    return blocks


def foreign_names(store: Store) -> list[str]:
    """Names in the store's folder that no store has, such as a README; no reader opens them."""
    return [name for name in store.files.names() or () if FILE_NAME.fullmatch(name) is None]


def _folder_problems(store: Store) -> Iterator[str]:
    """Shards that the manifest does not name: whoever reads ``train-*.tar`` would take them for the store's."""
    known = {MANIFEST_FILE, BUILD_REPORT_FILE, VOCAB_FILE, USERS_FILE, *(shard.name for shard in store.manifest.shards)}
    known |= {fit_file(feature) for feature in store.manifest.fits}
    for name in store.files.names() or ():  # a URL cannot be listed: there, only files of the manifest are checked
        if name not in known and FILE_NAME.fullmatch(name) is not None:
            yield f"{name}: not in the manifest"


def _shard_problems(store: Store, shard: Shard, blocks: list[Block]) -> Iterator[str]:
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
        yield f"{shard.name}: the file's sha256 is not the manifest's"
    if position - end < END_OF_ARCHIVE_BYTES or not tail_is_zero:
        yield f"{shard.name}: the end-of-archive bytes after byte {end} are not {END_OF_ARCHIVE_BYTES} or more zeros"
    found = (len(blocks), sum(block.count for block in blocks), sum(block.events for block in blocks))
    if found != (shard.samples, shard.count, shard.events):
        yield f"{shard.name}: its blocks, rows and events are {found}, not what its entry says"


class _ItemChecks:
    """Every item in one block, and as many with each feature as the manifest says; reading checks the rest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._seen = np.zeros(manifest.num_items, np.int64)
        self._present = dict.fromkeys((feature.name for feature in manifest.features), 0)

    def add(self, name: str, arrays: dict[str, np.ndarray]) -> list[str]:
        """Problems of a block that was read; each begins with ``name``."""
        ids = arrays["ids"]
        np.add.at(self._seen, ids, 1)
        for feature in self._present:
            self._present[feature] += int(arrays.get(f"{feature}.mask", np.ones(len(ids), bool)).sum())
        return []

    def problems(self) -> Iterator[str]:
        """Problems of all blocks together."""
        wrong, num_items = int((self._seen != 1).sum()), self._manifest.num_items
        if wrong:
            yield f"items: {wrong} of {num_items} items are not in exactly one block"
        for feature in self._manifest.features:
            found = self._present[feature.name]
            if found != feature.present:
                yield f"feature {feature.name}: {found} items have it, the manifest says {feature.present}"


class _UserChecks:
    """Each user of a split in one block; reading checks the rest."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._split = split
        self.users = np.zeros(manifest.num_users, bool)  # those seen
        self.train_count = np.zeros(manifest.num_items if split == "train" else 0, np.int64)  # events of each item

    def add(self, name: str, arrays: dict[str, np.ndarray]) -> list[str]:
        """Problems of a block that was read; each begins with ``name``."""
        if self._split == "train":
            self.train_count += np.bincount(arrays["items"], minlength=len(self.train_count))
        users = arrays["users"]
        twice = self.users[users].any()
        self.users[users] = True
        return [f"{name}: a user occurs twice in {self._split}"] if twice else []


def _split_problems(manifest: Manifest, checks: dict[str, _UserChecks]) -> Iterator[str]:
    """All users in train, the same users in valid and test, and events that add up; or, of another split, all users."""
    train, valid, test = (checks[split].users for split in SPLITS)
    if manifest.split_rule != LEAVE_ONE_OUT:
        nowhere = int((~(train | valid | test)).sum())
        if nowhere:
            yield f"{nowhere} of {manifest.num_users} users are in no block"
        return
    if not train.all():
        yield f"train: {int((~train).sum())} of {manifest.num_users} users are in no block"
    if not np.array_equal(valid, test):
        yield "valid and test do not hold the same users"
    events = {split: sum(block.events for block in manifest.splits[split]) for split in SPLITS}
    evaluated = int(test.sum())
    if manifest.num_events != events["train"] + 2 * evaluated or events["test"] != events["valid"] + evaluated:
        yield f"events of the splits ({events}) do not add up to the manifest's {manifest.num_events}"


def _table_problems(store: Store, train_count: np.ndarray) -> Iterator[str]:
    """Rows and ids of the vocabulary and of the users."""
    sizes = {VOCAB_FILE: ("item", store.manifest.num_items), USERS_FILE: ("user", store.manifest.num_users)}
    for name, (id_column, num_rows) in sizes.items():
        try:
            table = bounded_table(table_batches(store.read_table(name, checked=False), name), name)
        except (pa.ArrowException, OSError, LookupError, UserError) as error:
            yield f"{name}: cannot be read ({' '.join(str(error).split())})"
            continue
        if table.num_rows != num_rows:
            yield f"{name}: {table.num_rows} rows, the manifest says {num_rows}"
        if rows_sha256([table]) != store.manifest.tables[name]:
            yield f"{name}: its rows are not those that were written"
        elif not np.array_equal(table[id_column].to_numpy(), np.arange(num_rows)):
            yield f"{name}: column {id_column!r} does not count from 0"
        elif name == VOCAB_FILE and not np.array_equal(table["train_count"].to_numpy(), train_count):
            yield f"{name}: train_count is not what the train blocks hold"
