"""Signals: USR1 saves, requests a requeue and exits with 0; TERM saves and exits with 0; resuming repeats the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from fmrl_dist.data import batches
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.signals import REQUEUE_FILE, StopRequest
from tests.fixtures.processes import REPOSITORY, clean_environment, run_processes
from tests.fixtures.training import STEPS_PER_EPOCH, evaluation, figures, make_shop, records, train_here

SLOWLY = """
import sys, time
from fmrl_dist import train
from fmrl_dist.data.feed import BatchFeed
batches = BatchFeed.batches
def slowly(self, step):
    time.sleep(0.05)
    return batches(self, step)
BatchFeed.batches = slowly
train.main(sys.argv[1:])
"""
EPOCHS = 12


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    return train_here(shop, tmp_path_factory.mktemp("whole") / "run", "--train.epochs", EPOCHS)


def start_and_stop(shop: Path, run: Path, number: signal.Signals, everybody: bool) -> None:
    """Start a run, send a signal during its steps, and wait until it has saved and ended."""
    words = ["-c", SLOWLY, "--config", str(shop), "--run.dir", str(run), "--train.epochs", str(EPOCHS)]
    process = subprocess.Popen(
        [sys.executable, *words, "--train.workers", "2"],
        cwd=REPOSITORY,
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or len(records(run)) < STEPS_PER_EPOCH + 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        targets = [process.pid]
        if everybody:  # as SLURM does: workers receive it too
            targets += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        for pid in reversed(targets):
            os.kill(pid, number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "stopped by a signal; resume with --resume auto" in output
    done = len(records(run))
    assert STEPS_PER_EPOCH + 3 <= done < EPOCHS * STEPS_PER_EPOCH
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{done:08d}"
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize("everybody", [False, True], ids=["the process", "its workers too"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_0(
    number: signal.Signals, everybody: bool, shop: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start_and_stop(shop, run, number, everybody)
    assert (run / REQUEUE_FILE).exists() == (number == signal.SIGUSR1)
    train_here(shop, run, "--train.epochs", EPOCHS, "--resume", "auto")
    assert not (run / REQUEUE_FILE).exists()
    assert figures(run) == figures(whole)
    assert evaluation(run) == evaluation(whole)


def stop_one_rank(config: str, run: str, notified: int, at_step: int) -> None:
    batches = BatchFeed.batches

    def notify(self: BatchFeed, step: int) -> object:
        if (dist.get_rank(), step) == (notified, at_step):
            os.kill(os.getpid(), signal.SIGUSR1)
        return batches(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchFeed, "batches", notify)
        train_here(Path(config), Path(run), "--train.epochs", EPOCHS, "--resume", "auto")


@pytest.mark.multiproc
def test_all_ranks_end_when_one_is_notified(shop: Path, tmp_path: Path) -> None:
    """The notified rank is not the one that writes the requeue file."""
    run, notified = tmp_path / "run", 1
    run_processes(2, stop_one_rank, str(shop), str(run), notified, 10)
    assert [record["step"] for record in records(run)] == [*range(1, 12)]
    assert (run / REQUEUE_FILE).exists()
    run_processes(2, stop_one_rank, str(shop), str(run), notified, -1)
    assert len(records(run)) == EPOCHS * STEPS_PER_EPOCH
    assert (run / "evaluation.json").exists() and not (run / REQUEUE_FILE).exists()


@pytest.mark.parametrize("epochs", [EPOCHS, 1], ids=["during the run", "at its last step"])
def test_a_signal_in_a_step_that_validates(epochs: int, shop: Path, tmp_path: Path) -> None:
    """It saves at once, and the next job starts by validating."""
    words = ["--train.epochs", epochs]
    expected = train_here(shop, tmp_path / "whole", *words)
    run, batches = tmp_path / "run", BatchFeed.batches

    def notify(self: BatchFeed, step: int) -> object:
        if step == STEPS_PER_EPOCH - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchFeed, "batches", notify)
        train_here(shop, run, *words)
    assert len(records(run)) == STEPS_PER_EPOCH and not records(run, "valid")
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{STEPS_PER_EPOCH:08d}"
    train_here(shop, run, *words, "--resume", "auto")
    assert figures(run) == figures(expected) and evaluation(run) == evaluation(expected)


def notify_during_evaluation(split: str, notified: Sequence[int], patch: pytest.MonkeyPatch) -> None:
    """Have the ranks ``notified`` send themselves USR1 as they start to read users of ``split``."""
    blocks = batches.evaluation_blocks

    def notify(store: Store, of_split: str, *words: Any, **more: Any) -> Iterator[batches.EvaluationBlock]:
        if of_split == split and (dist.get_rank() if dist.is_initialized() else 0) in notified:
            os.kill(os.getpid(), signal.SIGUSR1)
        return blocks(store, of_split, *words, **more)

    patch.setattr("fmrl_dist.evaluation.histograms.evaluation_blocks", notify)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_signal_during_an_evaluation(split: str, shop: Path, tmp_path: Path) -> None:
    """It stops at once, and the next job starts with it; a run interrupted there in every job makes no progress."""
    expected, run = train_here(shop, tmp_path / "whole"), tmp_path / "run"
    for resume in ([], ["--resume", "auto"]):
        with pytest.MonkeyPatch.context() as patch:
            notify_during_evaluation(split, [0], patch)
            train_here(shop, run, *resume)
        epochs, validated = (1, 0) if split == "valid" else (3, 3)
        assert (run / REQUEUE_FILE).exists() and not (run / "evaluation.json").exists()
        assert (len(records(run)), len(records(run, "valid"))) == (epochs * STEPS_PER_EPOCH, validated)
        assert (run / "checkpoints" / "latest").resolve().name == f"step-{epochs * STEPS_PER_EPOCH:08d}"
    train_here(shop, run, "--resume", "auto")
    assert not (run / REQUEUE_FILE).exists()
    assert figures(run) == figures(expected) and evaluation(run) == evaluation(expected)


def stop_during_evaluation(config: str, run: str, catalogue: str, split: str, notified: Sequence[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        notify_during_evaluation(split, notified, patch)
        train_here(Path(config), Path(run), "--resume", "auto", "--loss.catalogue", catalogue)


@pytest.mark.multiproc
@pytest.mark.parametrize(("notified", "catalogue"), [([0, 1], "whole"), ([1], "split")], ids=["all", "one"])
def test_all_ranks_end_during_an_evaluation(notified: list[int], catalogue: str, shop: Path, tmp_path: Path) -> None:
    """Even if they rank together: a stopped rank still ranks for the others' users."""
    run = tmp_path / "run"
    run_processes(2, stop_during_evaluation, str(shop), str(run), catalogue, "valid", notified)
    assert (run / REQUEUE_FILE).exists() and not records(run, "valid")
    run_processes(2, stop_during_evaluation, str(shop), str(run), catalogue, "test", notified)
    assert (run / REQUEUE_FILE).exists() and len(records(run, "valid")) == 3
    assert not (run / "evaluation.json").exists()
    run_processes(2, stop_during_evaluation, str(shop), str(run), catalogue, "test", [])
    assert (run / "evaluation.json").exists() and not (run / REQUEUE_FILE).exists()


def test_a_signal_drops_only_what_is_not_done() -> None:
    """A signal after the last item drops nothing; one before it drops the rest."""
    with StopRequest() as stop:
        found = []
        for item in stop.until_requested(range(5)):
            found.append(item)
            if item == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        assert (found, stop.requested, stop.cut_short) == ([0, 1, 2, 3, 4], True, False)
        assert list(stop.until_requested(range(5))) == [] and stop.cut_short


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest() as stop:
        assert not stop.term and not stop.usr1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.term and not stop.usr1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
