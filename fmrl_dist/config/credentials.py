"""No credentials in a command line: lists of processes, SLURM, submitit and launchers show or record it.

What starts jobs (``launch``) refuses them, in every key of the config too; the batch scripts do for jobs that are
submitted by hand (launch/environment.sh). What runs says so, and itself shows and records none.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from fmrl_dist.base.errors import require
from fmrl_dist.base.urls import holds_credentials
from fmrl_dist.config.sections import Config

TEXTS = ("data.text", "data.text_separator")  # templates of an item's text, not places


def warn_of_credentials(words: Sequence[str]) -> None:
    """Say, on the first process, that credentials stand in the command line."""
    if any(map(holds_credentials, words)) and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(
            "warning: an argument holds a URL with credentials; the list of processes shows it, and so does a launcher "
            "when its command fails: give them by the environment or by a file (docs/cluster.md, Credentials)\n"
        )


def refuse_credentials(where: str, value: Any) -> None:
    """Refuse a plain value that holds a URL with a user's name, a password, a token or a signature.

    Args:
        where: names the value; begins the message.
        value: nested lists and mappings of plain values.

    Raises:
        UserError: it does; the message shows none of it.
    """
    for key, text in _texts(where, value):
        require(
            not holds_credentials(text),
            f"{key} holds a URL with credentials, which SLURM, submitit and lists of processes would show; leave them "
            "out of the URL, and give them by the environment or by a file (docs/cluster.md, Credentials)",
        )


def refuse_credentials_in_config(config: Config) -> None:
    """:func:`refuse_credentials` for every key of a config."""
    for section, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            if f"{section}.{key}" not in TEXTS:
                refuse_credentials(f"{section}.{key}", value)


def refuse_credentials_in_words(words: Sequence[str]) -> None:
    """:func:`refuse_credentials` for a command line, whose options name their values."""
    option = "an argument"
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            option = name
        refuse_credentials(option, value if word.startswith("--") and equals else word)


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(f"{where}.{key}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(where, part)
