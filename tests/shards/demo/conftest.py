"""The demo data of the default size, generated once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.demo.catalogue import Attributes, make_attributes
from shards.demo.folder import write_demo
from tests.fixtures.demo import ITEMS, SEED, USERS


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo_data")
    write_demo(root, USERS, ITEMS, SEED)
    return root / "demo"


@pytest.fixture(scope="package")
def attributes() -> Attributes:
    return make_attributes(ITEMS, SEED)
