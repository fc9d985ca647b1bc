"""The world of the fuzzers, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.expected import Expected
from tests.fuzz.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part that a command may need; a case works on copies."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What each command gives where nothing disturbs it."""
    return Expected(world, tmp_path_factory.mktemp("expected"))
