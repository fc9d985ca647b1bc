"""Runs killed (SIGKILL: launcher, ranks, workers) at random instants resume bit for bit; full disks."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.crash import crash
from fmrl_dist import train
from fmrl_dist.checkpoint.folder import TrainState, load_checkpoint
from fmrl_dist.checkpoint.writer import CheckpointWriter
from fmrl_dist.training.learner import Learner
from fmrl_dist.training.run import Run
from fmrl_dist.training.steps import loop
from tests.fixtures.checkpoints import flip
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    contents,
    evaluation,
    figures,
    make_shop,
    records,
    refusal,
    train_here,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("crash"))


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_as_undisturbed_ones(ranks: int, shop: Path, tmp_path: Path) -> None:
    words = ["--train.epochs", "30", "--train.checkpoint_every_steps", "2", "--eval.every_steps", "50"]
    report = crash(shop, tmp_path, ranks, kills=2, seed=ranks, words=words)
    assert report.same
    assert report.kills >= 2, report
    assert max(report.steps_lost) < 50


def test_a_checkpoint_is_a_snapshot(tmp_path: Path) -> None:
    """Training changes tensors and state in place while the checkpoint is being written."""
    writer = CheckpointWriter(tmp_path, {"config": {}}, keep=2)
    free = threading.Event()
    writer._thread.submit(free.wait)  # nothing is written before
    model, moments, state = torch.ones(3), torch.ones(3), TrainState(step=7, skipped_blocks=[1])
    writer.save(state, {"weight": model}, {"exp_avg/weight": moments})
    for tensor in (model, moments):
        tensor.zero_()
    state.skipped_blocks.append(2)
    free.set()
    writer.wait()
    folder = tmp_path / "step-00000007"
    assert load_file(folder / "model.safetensors")["weight"].tolist() == [1, 1, 1]
    assert load_file(folder / "optimizer.safetensors")["exp_avg/weight"].tolist() == [1, 1, 1]
    assert '"skipped_blocks": [\n   1\n  ]' in (folder / "state.json").read_text()


EVERY_STEP = ["--train.checkpoint_every_steps", 1]


def test_resume_falls_back_past_damaged_checkpoints(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*EVERY_STEP, "--train.keep_checkpoints", 3]
    whole = train_here(shop, tmp_path / "whole", *words)
    run = train_here(shop, tmp_path / "run", *words, "--train.max_steps", 13)
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        f"step-{step:08d}"
        for step in (8, 11, 12, 13)  # 8 is the best
    ]
    flip(checkpoints / "step-00000013" / "optimizer.safetensors", -5)
    (checkpoints / "step-00000012" / "state.json").write_text("{}")
    capsys.readouterr()
    train_here(shop, run, *words, "--resume", "auto")
    said = capsys.readouterr().out
    assert said.count("falling back to the previous one") == 2 and "from step 11 to at most 24" in said
    assert figures(run) == figures(whole) and evaluation(run) == evaluation(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2)
    for path in (run / "checkpoints").glob("step-*"):
        (path / "state.json").unlink()
        (path / "state.json").touch()
    before = contents(run)
    line = refusal(train.main, "--config", shop, "--run.dir", run, "--resume", "auto")
    assert "is damaged" in line and "start over in another --run.dir" in line
    assert contents(run) == before


def test_a_damaged_best_restarts_the_search(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2 * STEPS_PER_EPOCH)
    assert load_checkpoint(run).state.step == STEPS_PER_EPOCH
    flip(run / "checkpoints" / "best" / "model.safetensors", -5)
    train_here(shop, run, "--resume", "auto")
    assert "the search for the best restarts" in capsys.readouterr().out
    assert load_checkpoint(run).state.step == 3 * STEPS_PER_EPOCH


def test_a_checkpoint_every_few_moments(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank 0's clock: every step takes longer than the interval here."""
    saved: list[int] = []
    save = loop.save

    def note(run: Run, learner: Learner, state: TrainState, writer: CheckpointWriter) -> None:
        saved.append(state.step)
        save(run, learner, state, writer)

    monkeypatch.setattr(loop, "save", note)
    train_here(shop, tmp_path / "run", "--train.max_steps", 5, "--train.checkpoint_every_minutes", 1e-7)
    assert saved == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5]


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A small file system in memory."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(shop: Path, tmp_path: Path) -> None:
    whole = train_here(shop, tmp_path / "whole")
    with small_disk(tmp_path / "disk", 2000) as disk:
        run = train_here(shop, disk / "run", "--train.max_steps", 8, *EVERY_STEP)
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(512))
        words = ("--run.dir", run, "--resume", "auto", "--train.keep_checkpoints", 9)
        assert "No space left on device" in refusal(train.main, "--config", shop, *words)
        assert load_checkpoint(run, "latest").state.step == 8
        assert not list((run / "checkpoints").glob(".step-*"))
        (disk / "ballast").unlink()
        train_here(shop, run, "--resume", "auto")
        assert evaluation(run) == evaluation(whole)
