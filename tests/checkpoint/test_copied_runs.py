"""A run that was copied without its links, or with folders in their place, is the same run."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from fmrl_dist import evaluate, export, train
from fmrl_dist.checkpoint.folder import find_checkpoint, linked_checkpoint, load_checkpoint
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    contents,
    evaluation,
    figures,
    make_shop,
    refusal,
    run_here,
    train_here,
)


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
    """As ``cp -rL`` does, perhaps of the links only, or as a bucket does, which holds no links."""
    ignored = {"no links": ("latest", "best"), "folders": (), "only the links' folders": ("step-*",)}[how]
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns(*ignored)))


@pytest.mark.parametrize("how", ["no links", "folders", "only the links' folders"])
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


@pytest.mark.parametrize("how", ["no links", "folders", "only the links' folders"])
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


def test_a_copy_of_the_best_alone_resumes_there(
    shop: Path, whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run", "only the links' folders")
    shutil.rmtree(run / "checkpoints" / "latest")
    step = load_checkpoint(stopped).state.step
    train_here(shop, run, "--resume", "auto")
    assert f"from step {step} to" in capsys.readouterr().out and 0 < step < 2 * STEPS_PER_EPOCH
    assert figures(run) == figures(whole) and evaluation(run) == evaluation(whole)


@pytest.mark.parametrize("left", [("finished.json",), ("evaluation.json",), ("metrics.jsonl",)])
def test_a_copy_without_checkpoints_is_not_begun_anew(
    left: tuple[str, ...], shop: Path, whole: Path, tmp_path: Path
) -> None:
    """Each of these files alone says that there were checkpoints; nothing of them is touched."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", *left):
        shutil.copy(whole / name, run / name)
    before = contents(run)
    line = refusal(train.main, "--config", shop, "--run.dir", run, "--resume", "auto")
    assert f"run folder {run} holds {', '.join(left)} of a run that was saved, but no checkpoint: copy" in line
    assert contents(run) == before


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(shop: Path, whole: Path, tmp_path: Path) -> None:
    """Perhaps while it wrote that checkpoint; ``--resume auto`` must then need nobody."""
    for name, num_lines in (("before", STEPS_PER_EPOCH), ("meanwhile", 2 * STEPS_PER_EPOCH)):
        run = tmp_path / name
        run.mkdir()
        shutil.copy(whole / "config.yaml", run)
        lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)[:num_lines]
        (run / "metrics.jsonl").write_text("".join(lines))
        if name == "meanwhile":
            (run / "checkpoints" / ".step-00000008").mkdir(parents=True)
        train_here(shop, run, "--resume", "auto")
        assert figures(run) == figures(whole) and evaluation(run) == evaluation(whole)


@pytest.mark.parametrize("resume", ["auto", "a run"])
def test_a_folder_of_others_is_not_trained_into(resume: str, shop: Path, whole: Path, tmp_path: Path) -> None:
    """Its files may be named like a run's."""
    folder = tmp_path / "mine"
    folder.mkdir()
    words = ["--config", shop, "--run.dir", folder, "--resume", whole if resume == "a run" else resume]
    for name in ("requeue", "evaluation.json", "config.yaml"):
        (folder / name).write_text("model: mine\n")
        before = contents(folder)
        line = refusal(train.main, *words)
        assert f"folder {folder} holds " in line and "and is not a run's: it lacks the config.yaml" in line
        assert contents(folder) == before


def test_a_folder_with_nothing_but_a_log_is_trained_into(shop: Path, whole: Path, tmp_path: Path) -> None:
    """As ``train … > run/train.log`` makes it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").write_text("begins\n")
    train_here(shop, run, "--resume", "auto")
    assert figures(run) == figures(whole) and (run / "train.log").read_text() == "begins\n"
