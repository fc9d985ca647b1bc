"""``python -m shards.verify STORE``: recompute everything that the manifest claims (:mod:`shards.store.problems`).

What runs have unpacked or counted from the store is compared whole, too. Every problem is one line; any problem ends
with exit code 2.
"""

from __future__ import annotations

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.store.derived import damaged_files
from fmrl_dist.data.store.reader import Store
from shards.store.problems import foreign_names, store_problems


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m shards.verify", description="Check a shard store, byte by byte.")
    parser.add_argument("store", help="folder or URL of the store")
    parser.add_argument("--store.cache_dir", dest="cache_dir", default="", help="where runs unpacked its item table")
    arguments = parser.parse_args(argv)
    store = Store.open(arguments.store, StoreConfig(cache_dir=arguments.cache_dir))
    for name in foreign_names(store):
        print(f"note: {name}: not a file of a store, and not read")
    problems = 0
    for problem in store_problems(store):
        problems += 1
        print(f"problem: {problem}")
    derived = 0
    for problem in damaged_files(store):
        derived += 1
        print(f"problem: {problem}")
    require(
        not problems, f"store {store.location} has {problems} problems; build it again with shards.build --overwrite"
    )
    require(not derived, f"store {store.location} is sound, but {derived} files made from it are damaged; delete these")
    manifest = store.manifest
    blocks = len(manifest.items) + sum(len(blocks) for blocks in manifest.splits.values())
    print(
        f"ok: {store.location}: {len(manifest.shards)} shards, {blocks} blocks, {manifest.num_users:,} users, "
        f"{manifest.num_items:,} items, {manifest.num_events:,} events"
    )


if __name__ == "__main__":
    run_command(main)
