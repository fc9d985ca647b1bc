"""A user without a home: a container's id without a name, and no HOME."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import home_folder
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.store.reader import Store
from launch import submit, sweep
from launch.slurm.jobs import batch_script
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import make_shop, train_here


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: object) -> None:
        raise KeyError(f"uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    assert home_folder() is None


def test_a_run(tmp_path: Path) -> None:
    run = train_here(make_shop(tmp_path), tmp_path / "run", "--train.max_steps", 1)
    assert (run / "finished.json").exists()


def test_a_store_at_a_url_needs_a_place_for_its_cache() -> None:
    with pytest.raises(UserError, match=r"no home folder to keep a cache in; set store\.cache_dir, or HOME"):
        Store.open("memory://shop")
    with pytest.raises(UserError, match=r"store\.cache_dir is ~/cache, but there is no such home folder"):
        Store.open("memory://shop", StoreConfig(cache_dir="~/cache"))


def test_what_starts_jobs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    for action in (["--cluster", "local"], []):
        submit.main(["--dry-run", *action])
        sweep.main(["configs/sweeps/demo.yaml", "--dry-run", *action])
    assert "launch.sweeps.worker" in capsys.readouterr().out
    batch_script("launch/train.slurm")
