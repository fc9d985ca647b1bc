"""What every test gets: fixed seeds, an environment without ranks, and the fixtures below."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from tests.fixtures.processes import REPOSITORY, is_launch_variable
from tests.fixtures.slurm_cluster import SlurmCluster, what_is_missing
from tests.fixtures.stores import tiny_config, write_raw

SHARED_DATA = REPOSITORY.parent / "shared" / "data"

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other

# `make test &` has a shell ignore SIGINT for us, and so it would be ignored by what a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Likewise `nohup make test` and SIGHUP, which still must not end us: a program that we start has a handler as default.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

settings.register_profile("fmrl", deadline=None)  # a first call that compiles or warms up is no failure
settings.load_profile("fmrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin: of two processes, neither is left alone at the end with one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank, world size, address or thread count left behind by a launcher around pytest."""
    for name in list(os.environ):
        if is_launch_variable(name):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found: {SHARED_DATA} does not exist")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound store of six items; tests must not change it."""
    root = tmp_path_factory.mktemp("tiny")
    write_raw(root / "raw")
    return build_store(tiny_config(root / "raw", root / "store"))[0].path


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Store:
    """A copy of :func:`tiny_store` that the test may change."""
    return Store.open(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A SLURM of two idle nodes. Where none can be had, the test is skipped; with ``CI`` set, it fails."""
    if missing := what_is_missing():
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    with SlurmCluster(num_nodes=2) as cluster:
        yield cluster
