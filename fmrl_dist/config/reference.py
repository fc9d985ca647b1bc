"""What every config key means, read from the dataclasses: docs/config.md and ``--help-config`` are made here.

    python -m fmrl_dist.config.reference      # writes docs/config.md (make docs)

A key's values are its field's annotation, its meaning is the comment at the end of the field's line or on the lines
right above it. So the dataclasses stay the one place where a key is described; a test fails when docs/config.md is
older than they are, or when a field has no comment.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import json
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import FeatureConfig
from fmrl_dist.config.parsing import describe, field_types
from fmrl_dist.config.sections import Config

FILE = "docs/config.md"
ANY_FEATURE = "data.features.<name>"
CHOICE = re.compile(r"(^|\| )(\w+)(?=:| \||$)")  # in a meaning such as "last: one window per user | all: …"
HEAD = """\
<!-- Made from fmrl_dist/config by `make docs`. Do not edit: change the dataclasses there instead. -->
# Configuration

One YAML file drives build, train and evaluate; [configs/](../configs) has examples. Leave a key out to take its
default. An unknown key, a wrong value or an impossible combination ends a command with one line that says what to fix.

- `--section.key value` overrides a key on the command line; the value is read as YAML (`--model.sizes '[8, 16]'`).
- `--print-config` prints the configuration in force, and ends.
- `--help-config SECTION` prints what is below for one section or key.

"Text" is a string and "list" a YAML list, such as `[8, 16]`. `null` is YAML's empty value.
"""


@dataclass(frozen=True)
class Key:
    """One key of the configuration."""

    name: str  # model.depth
    kind: Any  # its annotation
    default: str  # as YAML
    meaning: str


@dataclass(frozen=True)
class Group:
    """The keys of one section, or of one source of features."""

    title: str
    about: str
    keys: tuple[Key, ...]


def reference() -> list[Group]:
    """Every section with its keys, in the order of the dataclasses; the sources of features after ``data``."""
    groups = []
    for name, kind in field_types(Config).items():
        groups.append(Group(name, _about(kind), tuple(_keys(kind, name))))
        if name == "data":
            groups += map(_feature_source, typing.get_args(FeatureConfig))
    return groups


def _feature_source(kind: type) -> Group:
    source = dataclasses.fields(kind)[0].default
    return Group(f"data.features, source {source}", _about(kind), tuple(_keys(kind, ANY_FEATURE)))


def _about(kind: type) -> str:
    """First paragraph of a docstring, as Markdown."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].replace("``", "`").split())


def _keys(kind: type, where: str) -> Iterator[Key]:
    types, comments = field_types(kind), field_comments(kind)
    for field in dataclasses.fields(kind):
        name, annotation = f"{where}.{field.name}", types[field.name]
        section = _section_of(annotation)
        if section is not annotation:  # a section is not a key; one that may be left out is both
            yield Key(name, annotation, _default(field), comments[field.name])
        if section is not None:
            yield from _keys(section, name)


def _section_of(annotation: Any) -> type | None:
    parts = (annotation, *typing.get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(value, str) and value.isprintable() and _reads_as_itself(value):
        return value
    return json.dumps(value)


def _reads_as_itself(text: str) -> bool:
    """Whether YAML reads an unquoted ``text`` as this text."""
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False


def field_comments(kind: type) -> dict[str, str]:
    """The comment of each field of a dataclass: at the end of its line, or on the lines right above it; "" if none."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and comments[first - 1].line.lstrip().startswith("#"):
                first -= 1
            lines = [comments[n].string for n in (*range(first, node.lineno), node.end_lineno) if n in comments]
            found[node.target.id] = " ".join(line.lstrip("# ") for line in lines)
    return found


def markdown() -> str:
    """docs/config.md."""
    return "\n".join([HEAD, *map(_group_as_markdown, reference())])


def _group_as_markdown(group: Group) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key in group.keys:
        values = describe(key.kind, quote=lambda value: f"`{value}`")
        meaning = CHOICE.sub(r"\1`\2`", key.meaning).replace(" | ", "; ")
        rows.append(f"| `{key.name}` | {_for_markdown(values)} | `{key.default}` | {_for_markdown(meaning)} |")
    return "\n".join([f"## {group.title}", _for_markdown(group.about), "", *rows, ""])


def _for_markdown(text: str) -> str:
    """Text for a cell of a table: what Markdown or HTML would take for its own is escaped."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def help_config(word: str | None) -> str:
    """What ``--help-config`` prints: the sections, or the keys under ``word``.

    Raises:
        UserError: there is no such section or key.
    """
    groups = reference()
    sections = [group for group in groups if group.title in field_types(Config)]
    if word is None:
        lines = [f"  {group.title:8} {group.about}" for group in sections]
        return "\n".join(["--help-config SECTION lists the keys of a section:", *lines, ""])
    found = [replace(group, keys=tuple(k for k in group.keys if is_under(k.name, word))) for group in groups]
    if not any(group.keys for group in found):
        names = [group.title for group in sections] + [key.name for group in groups for key in group.keys]
        close = difflib.get_close_matches(word, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"sections: {', '.join(group.title for group in sections)}"
        raise UserError(f"--help-config: the config has no section or key {word!r}; {hint}")
    return "\n".join(_group_for_terminal(group) for group in found if group.keys)


def is_under(key: str, word: str) -> bool:
    """Whether a key is ``word``, or in the section ``word``."""
    return key == word or key.startswith(f"{word}.")


def _group_for_terminal(group: Group) -> str:
    lines = [f"{group.title}: {group.about}"]
    for key in group.keys:
        lines.append(f"  --{key.name}  {describe(key.kind)}; default {key.default}")
        lines += textwrap.wrap(key.meaning, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    (Path(__file__).resolve().parents[2] / FILE).write_text(markdown(), encoding="utf-8")
