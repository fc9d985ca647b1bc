"""The command line of every config-driven command: ``--config``, overrides, ``--print-config``, ``--help-config``."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

from fmrl_dist import __version__
from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.reference import FILE, help_config
from fmrl_dist.config.sections import Config


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaint is a :class:`UserError`: one line, without the usage text."""

    def format_help(self) -> str:
        return super().format_help().replace("``", "")  # a module's docstring has marks of its own

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


class HelpConfig(argparse.Action):
    """Prints what the keys of a section mean, and ends the process."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: typing.Any, option_string: str | None = None
    ) -> None:
        print(help_config(values), end="")
        parser.exit()


def command_parser(program: str, description: str) -> CommandParser:
    """The parser that every config-driven command starts from: ``--config``, and options that describe configs."""
    parser = CommandParser(
        prog=f"python -m {program}",
        description=description,
        epilog="Any key of the config is overridden with --section.key value, e.g. --train.epochs 3. "
        f"{FILE} describes every key; --help-config SECTION prints it.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file (default: the demo)")
    parser.add_argument(
        "--help-config",
        action=HelpConfig,
        nargs="?",
        metavar="SECTION",
        help="print what the keys of a section mean, such as model or train.lr (alone: list the sections), and end",
    )
    parser.add_argument("--print-config", action="store_true", help="print the config in force and end")
    parser.add_argument("--version", action="version", version=f"fmrl-dist {__version__}")
    return parser


def parse_command(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Parse a command line whose unknown words are overrides; ``--print-config`` prints and ends the process."""
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return arguments, config
