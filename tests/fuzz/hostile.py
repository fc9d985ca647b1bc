"""Hostile values for every key of a config: the keys are those of fmrl_dist/config, so a new key is fuzzed, too."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

from fmrl_dist.config.parsing import field_types
from fmrl_dist.config.sections import Config

KeyPath = tuple[str, ...]

HOSTILE_VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    " ",
    "auto",
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    5e-324,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "1e400",
    "nan",
    "0x10",
    [],
    {},
    [None],
    [[]],
    [4, 8],
    [4, 2**62],
    [0.5] * 3,
    {"a": {"b": [1]}},
    {"source": "npy"},
    {"source": ["npy"]},
    "x" * 300,
    "x" * 5000,
    "a/" * 2000,
    "/",
    ".",
    "..",
    "../..",
    "~",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/nowhere/at/all",
    "shop.yaml",
    "shop.yaml/below",
    "raw",
    "raw/items.parquet",
    "nul\0l",
    "tab\there",
    "line\nbreak",
    "\x1b[31mred",
    "\u202egnp.exe",
    "\ud800",
    "𝔘𝔫𝔦 ☃",
    "$(touch x)",
    "`touch x`",
    "; touch x",
    "'",
    '"',
    "-",
    "--overwrite",
    "%s%n",
    "{title.__class__}",
    "{",
    "{item_id:>999999999}",
    "http://",
    "http://user:secret@localhost:1/x",
    "s3://nowhere",
    "file:///etc/passwd",
    "pipe:touch x",
]
HOSTILE_TEXTS: list[bytes] = [
    b"",
    b"\xef\xbb\xbftrain: {epochs: 1}",
    b"\xff\xfe",
    b"\x00",
    b"train:\n\tepochs: 1",
    b"train: {epochs: 1",
    b"[" * 60_000,
    b"{a: " * 20_000,
    b"- " * 60_000,
    b"a: &a [*a]",
    b"a: &a {b: *a}\ntrain: *a",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 112)),
    b"<<: &x {<<: *x}",
    b"train: !!python/object/apply:os.system ['touch x']",
    b"train: !!binary aGFsbG8=",
    b"train: !!set {a, b}",
    b"train: 2001-99-99",
    b"train: {epochs: 1}\ntrain: {epochs: 2}",
    b"train: {epochs: 1, epochs: 2}",
    b"train:\n---\ntrain:\n",
    b"? [a, b]\n: c",
    b"1: 2",
    b"null: 1",
    b"train: {1: 2, null: 3}",
    b"train: {epochs: " + b"9" * 100_000 + b"}",
    b"train: {lr: ." + b"9" * 100_000 + b"}",
    b"run: {dir: '" + b"x" * 130_000 + b"'}",
    b"# " + b"x" * 200_000,
    b"%YAML 9.9\n---\ntrain: {}",
    b"3",
    b"text",
    b"- train",
]


def key_paths(kind: Any = Config, where: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Every section and key below a dataclass, with the values that its siblings need to be read at all."""
    for name, annotation in field_types(kind).items():
        yield (*where, name), {}
        for inner in _dataclasses_in(annotation):
            below = (*where, name, "fuzzed") if typing.get_origin(annotation) is dict else (*where, name)
            tag = dataclasses.fields(inner)[0]
            needed = {tag.name: tag.default} if typing.get_origin(annotation) is dict else {}
            for path, _ in key_paths(inner, below):
                yield path, needed


def _dataclasses_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _dataclasses_in(argument)]


def hostile_config(base: dict[str, Any], generator: np.random.Generator) -> tuple[str, bytes]:
    """A YAML file with a hostile value in one or two places; and what they are."""
    if generator.random() < 0.15:
        text = HOSTILE_TEXTS[generator.integers(len(HOSTILE_TEXTS))]
        return f"text {text[:60]!r}", text
    raw, said, paths = yaml.safe_load(yaml.safe_dump(base)), [], list(key_paths())
    for _ in range(generator.integers(1, 3)):
        path, needed = paths[generator.integers(len(paths))]
        value = HOSTILE_VALUES[generator.integers(len(HOSTILE_VALUES))]
        _set(raw, path, value, needed)
        said.append(f"{'.'.join(path)}: {str(value)[:60]!r}")
    return ", ".join(said), yaml.safe_dump(raw, sort_keys=False).encode("utf-8", "surrogatepass")


def _set(raw: dict[str, Any], path: KeyPath, value: Any, needed: dict[str, Any]) -> None:
    node = raw
    for name in path[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    node |= {**needed, **node, path[-1]: value}
