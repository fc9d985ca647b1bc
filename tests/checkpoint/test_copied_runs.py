"""A run that was copied without its links, or with folders in their place, is the same run."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from fmrl_dist import evaluate, export, train
from fmrl_dist.checkpoint.folder import find_checkpoint, linked_checkpoint, load_checkpoint
from tests.fixtures.training import STEPS_PER_EPOCH, evaluation, figures, make_shop, refusal, run_here, train_here


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("copied"))


@pytest.fixture(scope="module")
def whole(shop: Path) -> Path:
    return train_here(shop, shop.parent / "whole")


@pytest.fixture(scope="module")
def stopped(shop: Path) -> Path:
    """Stopped after the second epoch, so that its best and its latest checkpoint differ."""
    run = train_here(shop, shop.parent / "stopped", "--train.max_steps", 2 * STEPS_PER_EPOCH)
    (run / "evaluation.json").unlink()
    return run


def copy(run: Path, target: Path, how: str) -> Path:
    """As ``cp -rL`` does, or as a bucket does, which holds no links."""
    ignored = shutil.ignore_patterns("latest", "best") if how == "no links" else None
    return Path(shutil.copytree(run, target, symlinks=how == "links", ignore=ignored))


@pytest.mark.parametrize("how", ["no links", "folders"])
def test_a_copy_resumes_where_the_run_was(
    how: str, shop: Path, whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run", how)
    train_here(shop, run, "--resume", "auto")
    assert f"from step {2 * STEPS_PER_EPOCH} to" in capsys.readouterr().out
    assert figures(run) == figures(whole) and evaluation(run) == evaluation(whole)
    for link in ("latest", "best"):
        assert (run / "checkpoints" / link).is_symlink()
        assert find_checkpoint(run, link).name == find_checkpoint(whole, link).name
    assert len([path for path in (run / "checkpoints").iterdir() if not path.is_symlink()]) <= 3


@pytest.mark.parametrize("how", ["no links", "folders"])
def test_a_copy_is_evaluated_and_exported_at_its_best(how: str, whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run", how)
    best = load_checkpoint(whole).state.step
    assert best != load_checkpoint(whole, "latest").state.step
    assert load_checkpoint(run).state.step == best
    run_here(evaluate.main, ["--checkpoint", run, "--split", "valid", "--threads", 1])
    assert (run / "evaluation-valid.json").is_file(), "beside the run's other figures, since it is its best"
    run_here(export.main, ["--checkpoint", run, "--size", 4])
    assert (run / "export-4" / "config.json").is_file()


def test_a_finished_copy_is_finished(shop: Path, whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run", "no links")
    before = figures(run)
    train_here(shop, run, "--resume", "auto")
    assert figures(run) == before and not (run / "checkpoints" / "latest").exists(), "nothing was done"


def test_a_file_system_without_links(shop: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a bucket that is mounted: the kernel answers as here; the records say what the links would."""

    def symlink_to(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2 * STEPS_PER_EPOCH, "--train.keep_checkpoints", 1)
    train_here(shop, run, "--resume", "auto", "--train.keep_checkpoints", 1)
    assert not [path for path in (run / "checkpoints").iterdir() if path.is_symlink()]
    assert figures(run) == figures(whole) and evaluation(run) == evaluation(whole)
    for link in ("latest", "best"):
        found = linked_checkpoint(run / "checkpoints", link)
        assert found is not None and found.name == find_checkpoint(whole, link).name


def test_damaged_checkpoints_without_links_are_not_passed_over(shop: Path, stopped: Path, tmp_path: Path) -> None:
    """A run never starts at step 0 beside checkpoints."""
    run = copy(stopped, tmp_path / "run", "no links")
    for record in (run / "checkpoints").glob("*/state.json"):
        record.write_text("{}")
    line = refusal(train.main, "--config", shop, "--run.dir", run, "--resume", "auto")
    assert "are damaged: start over in another --run.dir" in line


def test_a_folder_that_is_no_checkpoint_is_not_removed(shop: Path, stopped: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path / "run", "no links")
    (run / "checkpoints" / "latest").mkdir()
    (run / "checkpoints" / "latest" / "thesis.txt").write_text("mine")
    line = refusal(train.main, "--config", shop, "--run.dir", run, "--resume", "auto")
    assert "latest is a folder but not an intact checkpoint; expected a link" in line
    assert (run / "checkpoints" / "latest" / "thesis.txt").read_text() == "mine"
