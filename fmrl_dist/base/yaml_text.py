"""YAML that a user wrote, read with a bound on what it may expand to; a key that stands twice is refused."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.urls import hide_credentials

MAX_BYTES = 128 * 1024  # of a file
MAX_VALUES = 20_000  # keys and values, each as often as aliases repeat it


class _Shortened(reprlib.Repr):
    """A short form of a value. Credentials are hidden first: half of a URL no longer shows where they end."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(hide_credentials(x), level)


_SHORT = _Shortened()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 12, 12, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def read_yaml(path: Path, what: str) -> Any:
    """The value of a YAML file.

    Args:
        path: an existing file.
        what: begins the messages, such as "config".

    Raises:
        UserError: it is not UTF-8, not YAML, too large, or a key stands twice in a mapping.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    require(len(data) <= MAX_BYTES, f"{what} {path} has more than {MAX_BYTES // 1024} KiB; expected a short YAML file")
    try:
        return parse_yaml(data.decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise UserError(f"{what} {path} is not YAML: {' '.join(_problem(error).split())[:300]}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: not YAML, more than ``MAX_VALUES``, or a key stands twice in a mapping.
        ValueError: an impossible date, or a number that Python refuses.
    """
    loader = yaml.SafeLoader(text)  # not libyaml's, whose composer overflows the stack where nesting is deep
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _problem(error: Exception) -> str:
    """What an error says, with the place, but not the text there: cut short, it may hold half of a credential."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    place = f", in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return " ".join(part for part in (error.context, error.problem) if part) + place


def shown(value: Any) -> str:
    """A value for a message, however large it is."""
    return _SHORT.repr(value)


def _check(root: yaml.Node) -> None:
    """Refuse mappings with a key twice, and aliases that multiply."""
    sizes: dict[int, int] = {}  # of finished nodes, by id
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        children = _children(node)
        if is_done:
            open_nodes.discard(id(node))
            sizes[id(node)] = min(1 + sum(sizes[id(child)] for child in children), MAX_VALUES + 1)
        elif id(node) not in sizes:
            if id(node) in open_nodes:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias stands within its own anchor")
            open_nodes.add(id(node))
            _check_keys(node)
            stack.append((node, True))
            stack += [(child, False) for child in children]
    if sizes[id(root)] > MAX_VALUES:
        raise yaml.YAMLError(f"it holds more than {MAX_VALUES:,} keys and values, counting what aliases repeat")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.Node) -> None:
    seen: dict[tuple[str, str], int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if (key.tag, key.value) in seen:
            first = seen[key.tag, key.value]
            raise yaml.YAMLError(f"key {key.value!r} stands twice, in lines {first} and {line}; keep one of them")
        seen[key.tag, key.value] = line
