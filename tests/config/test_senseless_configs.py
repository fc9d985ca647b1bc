"""Any value of any key: a config, or one line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config

odd_numbers = st.integers(-5, 5) | st.sampled_from([2**70, 1e308, math.nan, math.inf, -math.inf])
values = st.recursive(
    st.none() | st.booleans() | odd_numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
sections = {name: value for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}
keys = st.sampled_from(
    [(name, key) for name, section in sections.items() for key in (*vars(section), "unknown")] + [("unknown", "key")]
)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(keys, values), min_size=1, max_size=2))
def test_senseless_configs(
    changes: list[tuple[tuple[str, str], Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any value of any key: a config, or one line."""
    raw: dict[str, Any] = {}
    for (section, key), value in changes:
        raw.setdefault(section, {})[key] = value
    path = tmp_path_factory.getbasetemp() / "senseless.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    try:
        config = load_config(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert load_config(path).hash == config.hash
