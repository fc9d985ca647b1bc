"""A model that the tests of the image encoder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.random_image_encoder import write_random_encoder
from tests.fixtures.processes import REPOSITORY


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights of the small open_clip model of ``configs``; tests must not change the file."""
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    write_random_encoder(str(REPOSITORY / "configs" / "clip-random-small.json"), 0, path)
    return path
