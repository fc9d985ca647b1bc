"""JSON files that another process, or a user, may have damaged: a value of the expected kind, or one line about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError, require

KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def read_object(path: Path, what: str, mend: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: an existing file.
        what: it is; begins the messages.
        mend: ends them.

    Raises:
        UserError: it is not UTF-8, not JSON, or holds another kind of value.
    """
    return parse_object(path.read_bytes(), f"{what} {path}", mend)


def read_objects(path: Path, mend: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file with an object each, and these objects, but for a last line that was not written to its end.

    Raises:
        UserError: another line is not an object; the message has its number.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = parse_object(line, f"{path}, line {number},", mend)
            except UserError:
                if line.startswith(b"{") and not line.endswith(b"\n"):
                    return  # its writer was killed
                raise
            yield line.decode().rstrip("\n"), record


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dict, for ``object_pairs_hook``: JSON's own would keep the last value of a repeated key, unsaid.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {repeated!r:.60} is there twice")
    return found


def parse_object(data: bytes, where: str, mend: str) -> dict[str, Any]:
    """The object in some JSON text; ``where`` begins the messages, ``mend`` ends them.

    Raises:
        UserError: as :func:`read_object`.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_repeats)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text; {mend}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply for JSON of ours; {mend}") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); {mend}") from None
    require(isinstance(value, dict), f"{where} holds {KINDS.get(type(value), 'null')}; expected an object: {mend}")
    found: dict[str, Any] = value
    return found
