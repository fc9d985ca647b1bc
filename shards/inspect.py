"""``python -m shards.inspect STORE``: what is inside, on one screen (reads only the manifest and the build report).

With ``--html FILE``, all blocks are read once, and a page shows how long the histories are, how popular the items, when
it happened, what is missing and what stands twice (:mod:`shards.store_page`).
"""

from __future__ import annotations

from pathlib import Path

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.manifest import SPLITS, dropped_why
from fmrl_dist.data.store.reader import Store
from shards.store.build_report import BUILD_REPORT_FILE, read_report
from shards.store.report_text import report_lines
from shards.store_page.page import write_store_page


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m shards.inspect", description="Show what is inside a shard store.")
    parser.add_argument("store", help="folder or URL of the store")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page about the whole store")
    parser.add_argument("--config", type=Path, help="with --html: names the raw images, to show those of examples")
    arguments = parser.parse_args(argv)
    require(arguments.html is not None or arguments.config is None, "--config goes with --html FILE; set both")
    data = load_config(arguments.config).data if arguments.config is not None else None
    store = Store.open(arguments.store)
    print(describe(store))
    if arguments.html is not None:
        write_store_page(store, arguments.html, data)
        print(f"\npage    {arguments.html}")


def describe(store: Store) -> str:
    """The screen: identity, totals, features, splits, and what the build counted."""
    manifest = store.manifest
    lines = [
        f"store   {store.location}",
        f"schema  {manifest.schema_version}   sha256 {manifest.sha256}",
        f"items   {manifest.num_items:,}{' (inline: their features ride with the users)' if manifest.inline else ''}",
        f"users   {manifest.num_users:,} "
        f"(and {manifest.num_dropped_users:,} dropped: {dropped_why(manifest.split_rule)})",
        f"events  {manifest.num_events:,} ({manifest.num_events / manifest.num_users:.2f} a user)",
        f"built   from {_built_from(store)}",
        "",
        f"{'feature':<16}{'dim':>6}{'dtype':>9}{'present':>9}  encoder",
    ]
    for feature in manifest.features:
        share = 100 * feature.present / manifest.num_items
        precision = (feature.recipe or {}).get("precision")
        encoder = f"{feature.encoder} ({feature.revision[:24]})" + (f", {precision}" if precision else "")
        lines.append(f"{feature.name:<16}{feature.dim:>6}{feature.dtype:>9}{share:>7.1f} %  {encoder}")
    if not manifest.features:
        lines.append("(none: train with model.id_table)")
    lines += ["", f"{'split':<8}{'shards':>8}{'blocks':>8}{'rows':>12}{'events':>14}{'MiB':>10}"]
    for split in ("items", *SPLITS):
        shards = [shard for shard in manifest.shards if shard.name.startswith(f"{split}-")]
        samples, rows, events, size = (
            sum(getattr(shard, key) for shard in shards) for key in ("samples", "count", "events", "num_bytes")
        )
        lines.append(f"{split:<8}{len(shards):>8}{samples:>8,}{rows:>12,}{events:>14,}{size / 2**20:>10.1f}")
    report = read_report(store)
    none = [f"(no {BUILD_REPORT_FILE}: an older version built the store, or it was not copied along)"]
    lines += ["", *(report_lines(report) if report is not None else none)]
    return "\n".join(lines)


def _built_from(store: Store) -> str:
    record = store.manifest.built_from
    if record is None:
        return "what is not recorded: an older version built it"
    versions = ", ".join(
        f"{name} {record.made_with[name]}" for name in ("fmrl-dist", "python") if name in record.made_with
    )
    return f"{len(record.files)} files and folders, by {versions} (built_from in manifest.json)"


if __name__ == "__main__":
    run_command(main)
