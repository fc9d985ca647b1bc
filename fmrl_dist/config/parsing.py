"""Plain YAML values into frozen dataclasses, with messages that name the key, and command-line overrides on the way.

Nothing here knows a particular section: types, choices (``Literal``) and limits (``Annotated`` with :class:`Limits`)
are read from the dataclasses' annotations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import yaml

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.yaml_text import parse_yaml, shown


@dataclass(frozen=True)
class Limits:
    """The smallest and largest number that a value may be."""

    low: float
    high: float = math.inf
    without_low: bool = False  # more than low, not low itself
    without_high: bool = False

    def hold(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        return above and (value < self.high if self.without_high else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'more than' if self.without_low else 'at least'} {self.low:g}"
        signs = ["<" if without else "<=" for without in (self.without_low, self.without_high)]
        return f"{self.low:g} {signs[0]} value {signs[1]} {self.high:g}"


PositiveInt = Annotated[int, Limits(1)]
NonNegativeInt = Annotated[int, Limits(0)]
PositiveFloat = Annotated[float, Limits(0, without_low=True)]
NonNegativeFloat = Annotated[float, Limits(0)]
Fraction = Annotated[float, Limits(0, 1, without_high=True)]


def require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {shown(value)}; expected one of: {', '.join(choices)}")


def field_types(section: type) -> dict[str, Any]:
    """Each field's annotation, limits included."""
    return typing.get_type_hints(section, include_extras=True)


def check_fields(section: object, where: str) -> None:
    """Check each field of a dataclass against its annotation, as :func:`build` does for YAML.

    Fields that hold dataclasses are skipped: those have checked themselves. A text in the place of one has not.
    """
    for name, kind in field_types(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, str) or not _holds_dataclasses(kind):
            build(kind, value, f"{where}.{name}")


def changed_keys(section: object) -> list[str]:
    """Names of a dataclass's fields whose values are not their defaults."""
    found = []
    for one in dataclasses.fields(section):  # type: ignore[arg-type]
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if getattr(section, one.name) != default:
            found.append(one.name)
    return found


def _holds_dataclasses(kind: Any) -> bool:
    return (isinstance(kind, type) and dataclasses.is_dataclass(kind)) or any(
        map(_holds_dataclasses, typing.get_args(kind))
    )


def describe(*kinds: Any, quote: Callable[[str], str] = str) -> str:
    """Which values annotations take, in words; ``quote`` is applied to literal values."""
    *others, last = [words for kind in kinds for words in _alternatives(kind, quote)]
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(kind: Any, quote: Callable[[str], str]) -> list[str]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return [words for argument in arguments for words in _alternatives(argument, quote)]
    if origin is typing.Literal:
        return [quote(value) for value in arguments]
    if origin is Annotated:
        return [f"{describe(arguments[0])} ({arguments[1]})"]
    if origin is tuple:
        return [f"list of {describe(arguments[0], quote=quote)}"]
    if origin is dict or dataclasses.is_dataclass(kind):
        return ["mapping"]
    if kind is types.NoneType:
        return [quote("null")]
    return [{str: "text", bool: "true or false"}.get(kind, kind.__name__)]


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write each ``--section.key value`` (or ``--section.key=value``) into ``raw``, its value read as YAML.

    Raises:
        UserError: a word is not an override, a value is missing or not YAML, or a section's name holds a value.
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
            node[key] = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            raise UserError(
                f"override {flag}: {shown(text)} is not a YAML value; a text with special characters needs quotes of "
                "its own, such as '\"*.csv\"'"
            ) from None


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
    if origin is Annotated:
        value, limits = build(arguments[0], value, where), arguments[1]
        require(limits.hold(value), f"{where} is {value}; expected {limits}")
        return value
    if origin is typing.Literal:
        require_choice(where, value, arguments)
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} is {shown(value)}; expected a list")
        return tuple(build(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), f"{where} is {shown(value)}; expected a mapping")
        return {str(k): build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # more than a float holds: refused below
            value = float(value)
    if kind is str and isinstance(value, datetime.date):  # YAML reads an unquoted date as one
        value = value.isoformat()
    matches = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    require(matches, f"{where} is {shown(value)}; expected {kind.__name__}")
    require(
        not isinstance(value, float) or math.isfinite(value), f"{where} is {shown(value)}; expected a finite number"
    )
    return value


def _build_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(sorted((k for k in kinds if k is not type(None)), key=lambda k: k is str))  # a number before a name
    if len(kinds) == 1:
        return build(kinds[0], value, where)
    if all(dataclasses.is_dataclass(kind) for kind in kinds):
        return _build_dataclass(_tagged(kinds, value, where), value, where)
    if isinstance(value, dict):
        for kind in filter(dataclasses.is_dataclass, kinds):  # whose message names the key that is wrong
            return _build_dataclass(kind, value, where)
    for kind in kinds:
        with contextlib.suppress(UserError):
            return build(kind, value, where)
    raise UserError(f"{where} is {shown(value)}; expected {describe(*kinds)}")


def _tagged(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The dataclass that ``value`` asks for: their first field is a literal that distinguishes them."""
    tag = dataclasses.fields(kinds[0])[0]
    by_name = {dataclasses.fields(kind)[0].default: kind for kind in kinds}
    name = value.get(tag.name, tag.default) if isinstance(value, dict) else tag.default
    found = by_name.get(name) if isinstance(name, str) else None
    require(
        found is not None, f"{_join(where, tag.name)} is {shown(name)}; expected one of: {', '.join(map(str, by_name))}"
    )
    return found


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    value = {} if value is None else value
    require(isinstance(value, dict), f"{where or 'the config'} is {shown(value)}; expected a mapping")
    hints = field_types(kind)
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {_join(where, close[0])!r}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown config key {shown(_join(where, key))}; {hint}")
    return kind(**{key: build(hints[key], v, _join(where, key)) for key, v in value.items()})


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
