"""``python -m shards.demo``: generate the demo's raw tables.

python -m shards.demo --out data --users 3000 --items 2000 --seed 0
"""

from __future__ import annotations

from pathlib import Path

from fmrl_dist.base.errors import run_command
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.data_section import DemoConfig
from shards.demo.folder import write_demo


def main(argv: list[str]) -> None:
    default = DemoConfig()
    parser = CommandParser(prog="python -m shards.demo", description="Generate the demo's raw tables.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder in which demo/ is made (default: data)")
    parser.add_argument("--users", type=int, default=default.users)
    parser.add_argument("--items", type=int, default=default.items)
    parser.add_argument("--seed", type=int, default=default.seed)
    arguments = parser.parse_args(argv)
    write_demo(arguments.out, arguments.users, arguments.items, arguments.seed)
    print(f"{arguments.out / 'demo'}: {arguments.users} users, {arguments.items} items, seed {arguments.seed}")


if __name__ == "__main__":
    run_command(main)
