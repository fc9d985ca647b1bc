"""``python -m shards.build``: raw tables in, shard store out.

``--part I/N`` encodes a share of the texts and images, for a build without it to find. Under ``accelerate launch`` each
process encodes a share, and the first one builds the store.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.base.urls import is_url
from fmrl_dist.config.command_line import command_parser, parse_command
from fmrl_dist.config.loading import DEMO_CONFIG
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import MANIFEST_FILE, dropped_why
from fmrl_dist.data.store.reader import Store
from shards.encoders.item_feature import ItemFeature
from shards.store.build_report import read_report
from shards.store.builder import build_store, check_target, make_demo_data
from shards.store.encode_part import encode_part
from shards.store.inputs import check_built_from
from shards.store.processes import BuildProcesses, build_processes
from shards.store.report_text import report_lines


def main(argv: list[str]) -> None:
    parser = command_parser("shards.build", "Build the shard store that a config describes.")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a store that is already there")
    existing.add_argument("--keep", action="store_true", help="keep a store that is already there, and build none")
    parser.add_argument(
        "--part", type=Part.parse, metavar="I/N", help="only encode a share of texts and images, and write no store"
    )
    arguments, config = parse_command(parser, argv)
    with build_processes() as processes:
        _build(arguments, config, processes)


def _build(arguments: argparse.Namespace, config: Config, processes: BuildProcesses) -> None:
    """Keep, encode or build, as this process of several, or alone."""
    if arguments.keep and (is_url(config.store.path) or Path(config.store.path, MANIFEST_FILE).is_file()):
        if processes.is_main:
            _keep(config)
        return
    start = time.monotonic()
    if arguments.part is None:
        check_target(config, arguments.overwrite)  # before hours of encoding
    if arguments.part is not None or processes.count > 1:
        part = processes.share_of(arguments.part or WHOLE)
        if processes.is_main:
            make_demo_data(config.data)  # which one process writes
        processes.wait()
        names = encode_part(config, part)
        what = f"encoded its share of {', '.join(names)}" if names else "no feature's encoding can be shared out"
        print(f"part {part}: {what}, in {time.monotonic() - start:.1f} s", flush=True)
        processes.wait()
        if arguments.part is not None or not processes.is_main:
            return
    config_name = arguments.config.name if arguments.config else DEMO_CONFIG.name
    store, features = build_store(config, overwrite=arguments.overwrite, config_name=config_name)
    _print_summary(store, features, time.monotonic() - start)


def _keep(config: Config) -> None:
    """Check the store that is there, and say so."""
    kept, is_recorded = kept_store(config)
    print(f"kept {kept.location}: {kept.manifest.num_users:,} users, {kept.manifest.num_items:,} items")
    if not is_recorded:
        print(
            f"note: an older version built {kept.location}, and did not record what from: only names of features "
            "and arrays were compared; --overwrite builds it again, with the record"
        )


def kept_store(config: Config) -> tuple[Store, bool]:
    """The store that is already there, every shard in full length, if it was built from what the config names.

    Blocks are not checked here: every later read checks them. The input tables are read once, to be hashed.

    Returns:
        The store, and whether it records what it was built from: a store of an older version does not, so little can
        be compared.

    Raises:
        UserError: it is incomplete, or was built from something else.
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
    make_demo_data(config.data)
    return store, check_built_from(store, config, mend)


def _print_summary(store: Store, features: list[ItemFeature], seconds: float) -> None:
    manifest = store.manifest
    print(
        f"built {store.location} in {seconds:.1f} s: {manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_events:,} events, {manifest.num_dropped_users:,} users dropped "
        f"({dropped_why(manifest.split_rule)}), "
        f"{sum(shard.num_bytes for shard in manifest.shards):,} bytes in {len(manifest.shards)} shards"
    )
    print(f"  split: {manifest.split_rule}")
    for feature in features:
        entry = feature.manifest_entry
        share = 100 * entry.present / manifest.num_items
        note = f" ({feature.note})" if feature.note and feature.images is None else ""  # the report has the images
        print(f"  feature {entry.name}: {entry.dim} x {entry.dtype}, {entry.encoder}, {share:.1f} % of items{note}")
    report = read_report(store)
    if report is not None:
        print("\n".join(report_lines(report)))


if __name__ == "__main__":
    run_command(main)
