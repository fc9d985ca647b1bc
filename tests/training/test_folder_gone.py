"""A run's folder, or its store, that is deleted or moved while a command works on it: one line, and nothing new."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist import evaluate, train
from fmrl_dist.data import batches
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.store.reader import Store
from tests.fixtures.training import STEPS_PER_EPOCH, contents, make_shop, refusal, train_here

GONE = "is gone: it was deleted, moved or replaced while the run wrote to it; if it was moved, resume with --resume"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("gone"))


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def move(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace(folder: Path) -> None:
    """As by another run of the same name."""
    move(folder)
    folder.mkdir()
    (folder / ".lock").touch()


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Has training call a function before it reads the batches of a step."""

    def arrange(at: int, act: Callable[[], Any]) -> None:
        batches_of = BatchFeed.batches
        acted: list[None] = []

        def acting(self: BatchFeed, step: int) -> Any:
            if step == at and not acted:
                acted.append(act())
            return batches_of(self, step)

        monkeypatch.setattr(BatchFeed, "batches", acting)

    return arrange


@pytest.fixture
def at_evaluation(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], None]:
    """Has an evaluation of a split call a function as it starts to read users."""

    def arrange(of_split: str, act: Callable[[], Any]) -> None:
        blocks = batches.evaluation_blocks
        acted: list[None] = []

        def acting(store: Store, split: str, *words: Any, **more: Any) -> Iterator[batches.EvaluationBlock]:
            if split == of_split and not acted:
                acted.append(act())
            return blocks(store, split, *words, **more)

        monkeypatch.setattr("fmrl_dist.evaluation.histograms.evaluation_blocks", acting)

    return arrange


def folders(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.iterdir())


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH - 1], ids=["in an epoch", "before a validation"])
@pytest.mark.parametrize("act", [delete, move, replace])
def test_a_run_folder_that_goes_while_it_trains(
    act: Callable[[Path], None], step: int, shop: Path, tmp_path: Path, at_step: Any
) -> None:
    run = tmp_path / "run"
    at_step(step, lambda: act(run))
    words = ["--run.dir", run, "--run.tensorboard", "true"]
    assert refusal(train.main, "--config", shop, *words).startswith(f"error: run folder {run} {GONE}")
    left = {"delete": [], "move": ["moved"], "replace": ["moved", "run"]}
    assert folders(tmp_path) == left[act.__name__]
    assert act is not replace or list(contents(run)) == [".lock"]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_folder_that_goes_during_an_evaluation(
    split: str, shop: Path, tmp_path: Path, at_evaluation: Any
) -> None:
    run = tmp_path / "run"
    at_evaluation(split, lambda: delete(run))
    line = refusal(train.main, "--config", shop, "--run.dir", run)
    assert line.startswith(f"error: run folder {run} {GONE}")
    assert folders(tmp_path) == []


def test_a_moved_run_resumes_where_it_is(shop: Path, tmp_path: Path, at_step: Any) -> None:
    at_step(STEPS_PER_EPOCH + 2, lambda: move(tmp_path / "run"))
    refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run")
    train_here(shop, tmp_path / "moved", "--resume", "auto")
    assert (tmp_path / "moved" / "finished.json").exists()


def test_a_run_that_goes_while_it_is_evaluated(shop: Path, tmp_path: Path, at_evaluation: Any) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", STEPS_PER_EPOCH)
    at_evaluation("test", lambda: delete(run))
    line = refusal(evaluate.main, "--checkpoint", run, "--threads", 1)
    assert line == (
        f"error: {run}/evaluation.json cannot be written: its folder does not exist, or was deleted or moved"
    )
    assert folders(tmp_path) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_goes_while_a_run_trains(workers: int, shop: Path, tmp_path: Path, at_step: Any) -> None:
    """The run is intact: it resumes when the store is back."""
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(shop.parent / "store", store)
    at_step(STEPS_PER_EPOCH, lambda: move(store))
    words = ["--store.path", store, "--run.dir", run, "--train.workers", workers, "--train.shuffle_blocks", 1]
    line = refusal(train.main, "--config", shop, *words)
    assert line == f"error: store {store} is gone; mount it again, then resume"
    (tmp_path / "moved").rename(store)
    train_here(shop, run, "--store.path", store, "--train.shuffle_blocks", 1, "--resume", "auto")
    assert (run / "finished.json").exists()
