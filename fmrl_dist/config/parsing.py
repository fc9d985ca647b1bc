"""Plain YAML values into frozen dataclasses, with messages that name the key, and command-line overrides on the way.

Nothing here knows a particular section: the types are read from the dataclasses' annotations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from fmrl_dist.base.errors import UserError, require


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {value!r}; expected one of: {', '.join(choices)}")


def require_at_least(section: object, prefix: str, low: float, *keys: str) -> None:
    """Raise :class:`UserError` where one of the section's ``keys`` is less than ``low``."""
    for key in keys:
        value = getattr(section, key)
        require(value >= low, f"{prefix}.{key} is {value}; expected at least {low}")


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write each ``--section.key value`` (or ``--section.key=value``) into ``raw``, its value read as YAML.

    Raises:
        UserError: a word is no override, a value is missing or not YAML, or a section's name holds a value.
    """
    words = iter(overrides)
    for word in words:
        flag, equals, text = word.partition("=")
        require(
            flag.startswith("--") and "." in flag,
            f"argument {word!r} is not known; overrides are written --section.key value",
        )
        if not equals:
            text = next(words, "--")
            require(not text.startswith("--"), f"override {flag} has no value; write --section.key value")
        node = raw
        *parents, key = flag[2:].split(".")
        for parent in parents:
            node = open_section(node, parent)
            require(isinstance(node, dict), f"override {flag}: {parent!r} holds a value, not a section")
        try:
            node[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"override {flag}: {text!r} is not a YAML value") from None


def open_section(node: dict[str, Any], key: str) -> Any:
    """``node[key]``, made an empty section where it is missing or empty (YAML reads a bare ``run:`` as null)."""
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def build(kind: Any, value: Any, where: str) -> Any:
    """Turn plain YAML ``value`` into type ``kind``; ``where`` names the key for messages.

    Raises:
        UserError: an unknown key, a value of another type, or what the dataclass itself refuses.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is typing.Literal:
        require(value in arguments, f"{where} is {value!r}; expected {' or '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} is {value!r}; expected a list")
        return tuple(build(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), f"{where} is {value!r}; expected a mapping")
        return {str(k): build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    matches = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    require(matches, f"{where} is {value!r}; expected {kind.__name__}")
    require(not isinstance(value, float) or math.isfinite(value), f"{where} is {value!r}; expected a finite number")
    return value


def _build_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(sorted((k for k in kinds if k is not type(None)), key=lambda k: k is str))  # a number before a name
    if len(kinds) == 1:
        return build(kinds[0], value, where)
    if all(dataclasses.is_dataclass(kind) for kind in kinds):
        return _build_dataclass(_tagged(kinds, value, where), value, where)
    for kind in kinds:
        with contextlib.suppress(UserError):
            return build(kind, value, where)
    raise UserError(f"{where} is {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}")


def _tagged(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The dataclass that ``value`` asks for: their first field is a literal that tells them apart."""
    tag = dataclasses.fields(kinds[0])[0]
    by_name = {dataclasses.fields(kind)[0].default: kind for kind in kinds}
    name = value.get(tag.name, tag.default) if isinstance(value, dict) else tag.default
    found = by_name.get(name) if isinstance(name, str) else None
    require(found is not None, f"{_join(where, tag.name)} is {name!r}; expected one of: {', '.join(map(str, by_name))}")
    return found


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    value = {} if value is None else value
    require(isinstance(value, dict), f"{where or 'the config'} is {value!r}; expected a mapping")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown config key {_join(where, key)!r}; {hint}")
    return kind(**{key: build(hints[key], v, _join(where, key)) for key, v in value.items()})


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
