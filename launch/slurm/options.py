"""The option ``--sbatch`` of this package's commands: options of sbatch by long name, for all stages or for one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from fmrl_dist.base.errors import UserError, require

ARGUMENT = re.compile(r"(?:([a-z]+):)?([a-z][a-z0-9-]*)(?:=(.+))?")
METAVAR = "[STAGE:]OPTION[=VALUE]"
# What the commands set themselves, for every job.
RESERVED = ("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "output", "parsable", "wrap")


def add_sbatch_option(parser: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    """Add ``--sbatch``, whose values :func:`parse_sbatch` reads."""
    parser.add_argument(
        "--sbatch",
        metavar=METAVAR,
        nargs="+",
        action="extend",
        default=[],
        help=f"options of sbatch by long name, for all stages or for one ({', '.join(stages)}): time=120 exclusive",
    )


def parse_sbatch(
    arguments: Sequence[str], stages: Sequence[str], also_reserved: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """sbatch's options for each stage; ``train:nodes=4`` is for one stage and overrides ``nodes=2`` for all.

    Args:
        arguments: the values of ``--sbatch``.
        stages: what may stand before the colon.
        also_reserved: options besides :data:`RESERVED` that the command sets itself.

    Raises:
        UserError: an argument is not of this form, names another stage or a reserved option.
    """
    for_all: dict[str, str] = {}
    for_one: dict[str, dict[str, str]] = {stage: {} for stage in stages}
    for argument in arguments:
        match = ARGUMENT.fullmatch(argument)
        if match is None or match[1] not in (None, *stages):
            raise UserError(
                f"--sbatch {argument}: expected {METAVAR} with a long option of sbatch, such as time=120 or "
                f"{stages[0]}:mem=8G; stages: {', '.join(stages)}"
            )
        stage, name, value = match.groups(default="")
        reserved = name in RESERVED or name in also_reserved
        require(not reserved, f"--sbatch {argument}: the command sets {name} itself; leave it out")
        (for_one[stage] if stage else for_all)[name] = value
    return {stage: for_all | own for stage, own in for_one.items()}
