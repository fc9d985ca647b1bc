"""YAML of users: what a key that stands twice, aliases that multiply, and sheer size come to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.yaml_text import MAX_BYTES, MAX_VALUES, parse_yaml, read_yaml, shown

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_values_are_read_as_they_were_written(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


def test_aliases_and_merges_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train:\n  lr: 1\n  epochs: 3\n  lr: 2", "key 'lr' stands twice, in lines 2 and 4"),
        ("model: {depth: 1}\nmodel: {depth: 2}", "key 'model' stands twice, in lines 1 and 2"),
        ("a: [{b: 1, b: 1}]", "key 'b' stands twice, in lines 1 and 1"),
        ("a: &a [*a]", "alias stands within its own anchor"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: [1", "expected ',' or ']'"),
    ],
)
def test_what_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        read_yaml(path, "config")
    assert str(error.value).startswith(f"config {path} is not YAML: ") and "\n" not in str(error.value)


def test_bombs_are_refused_before_any_work(tmp_path: Path) -> None:
    layers = ["l0: &l0 [1, 2]"] + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    began = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=f"more than {MAX_VALUES:,} keys and values"):
        parse_yaml("\n".join(layers))
    with pytest.raises(yaml.YAMLError, match="more than"):
        parse_yaml(f"[{', '.join(['1'] * (MAX_VALUES + 1))}]")
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=r"large.yaml has more than 128 KiB"):
        read_yaml(path, "space")
    with pytest.raises(UserError, match="is not YAML"):
        path.write_bytes(b"[" * 100_000)
        read_yaml(path, "config")
    assert time.monotonic() - began < 20


def test_values_in_messages_are_short() -> None:
    assert shown(3) == "3" and shown("auto") == "'auto'"
    assert len(shown(list(range(10**5)))) < 200 and len(shown("x" * 10**6)) < 200
