"""What the tests on a SLURM share: a folder that all nodes see, and the run that no test disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.demo_runs import demo_arguments
from tests.fixtures.processes import launch


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data, stores, runs and logs are."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="session")
def undisturbed(folder: Path) -> Path:
    """The demo trained without SLURM, by two processes."""
    result = launch(2, ["-m", "fmrl_dist.train", *demo_arguments(folder, "undisturbed")])
    assert result.returncode == 0, result.stderr
    return folder / "undisturbed"
