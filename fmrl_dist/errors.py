"""The user's mistakes, and how a command ends on one: one line, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Bad input. The message says what was found, what was expected and how to mend it, on one line."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``; end a :class:`UserError` with one line on stderr and exit code 2.

    Any other exception keeps its traceback and Python's exit code 1: that is a crash, and ours to mend.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # in one piece: other ranks may write the same
        sys.exit(EXIT_USER_ERROR)
