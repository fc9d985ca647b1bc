"""What the tests of damaged and forged stores share: a built store, and its files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.training import make_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a built store, which must not be changed."""
    return make_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def files(shop: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (shop.parent / "store").iterdir()}


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing does nothing: hundreds of short-lived files would take minutes to reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(np.memmap, "flush", lambda array: None)
