"""``python -m shards.interactions``: raw events in, histories out, each loss counted.

What ``shards.build`` does first where a config asks for it; alone, it shows what a filter or a split would leave.
"""

from __future__ import annotations

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.config.command_line import command_parser, parse_command
from shards.store.raw_data import RawData, interactions_folder


def main(argv: list[str]) -> None:
    parser = command_parser(
        "shards.interactions", "Filter, de-duplicate, sort and split the raw events that a config describes."
    )
    _, config = parse_command(parser, argv)
    raw = RawData.read(config)
    require(
        raw.prepared is not None,
        "the config asks for whole histories as they are: there is nothing to prepare; run python -m shards.build",
    )
    print(f"split: {raw.split_rule}\nwrote {interactions_folder(config)}")


if __name__ == "__main__":
    run_command(main)
