"""``python -m launch.sweep``: what it would start, what it refuses, and when it is over. Nothing is trained here."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from launch import sweep
from launch.slurm.job_states import COMMANDS
from launch.slurm.jobs import script_options
from launch.slurm.record import SubmittedStage, write_record
from launch.sweeps.folder import worker_lock
from launch.sweeps.worker import main as run_worker
from tests.fixtures.sweeps import start_sweep, trials_of, write_space
from tests.fixtures.training import refusal


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["configs/sweeps/demo.yaml", "--dry-run", "--cluster", "local", "--workers", "2"])
    assert (
        capsys.readouterr().out
        == f"""\
runs/demo-sweep: 6 trials over configs/demo.yaml, by validation ndcg@10@128
  --train.epochs 3
  --train.threads 1
  --run.tensorboard false
  --train.lr {{low: 0.0005, high: 0.02, log: true}}
  --model.depth {{low: 1, high: 2, step: 1}}
  --model.dropout {{choices: [0.0, 0.2, 0.4]}}
{sys.executable} -m launch.sweeps.worker runs/demo-sweep 0
{sys.executable} -m launch.sweeps.worker runs/demo-sweep 1
"""
    )


def test_dry_run_of_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--folder", str(tmp_path / "new"), "--workers", "3", "--sbatch", "time=60", "gpus-per-node=1"]
    sweep.main(["configs/sweeps/demo.yaml", "--dry-run", *arguments])
    text = capsys.readouterr().out
    assert re.findall(r"^### .*", text, re.MULTILINE) == [
        f"### bash launch/sweep.slurm {tmp_path}/new {worker}" for worker in range(3)
    ]
    for option in ("array=0-2%3", "time=60", "gpus-per-node=1", "signal=B:USR1@120", "requeue", "nodes=1"):
        assert f"#SBATCH --{option}\n" in text
    assert not (tmp_path / "new").exists()


def test_a_workers_job_is_requeued_like_a_training_job() -> None:
    worker, training = (script_options(Path(f"launch/{name}.slurm")) for name in ("sweep", "train"))
    assert {k: v for k, v in training.items() if k not in ("job-name", "nodes")}.items() <= worker.items()


def test_only_the_same_sweep_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    start_sweep(write_space(tmp_path, trials=2), folder)
    assert start_sweep(write_space(tmp_path, trials=3), folder)[0].trials == 3
    arguments = ["--cluster", "local", "--folder", folder]
    path = write_space(tmp_path, fixed={"train.lanes": 2})
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    line = refusal(sweep.main, path, *arguments)
    assert "holds a sweep with a different base.train.lanes: 0, now 2; restore it, or choose another --folder" in line
    path = write_space(tmp_path, parameters={"train.lr": {"low": 0.5, "high": 1.0}})
    assert "different space.parameters.train.lr.low: 0.001, now 0.5" in refusal(sweep.main, path, *arguments)
    assert trials_of(folder) == []


def test_refusals(tmp_path: Path) -> None:
    path, folder = write_space(tmp_path), tmp_path / "sweep"
    arguments = [path, "--cluster", "local", "--folder", folder]
    assert "holds no sweep; start one with python -m launch.sweep SPACE" in refusal(sweep.main, *arguments, "--status")
    assert "--workers is 0; expected at least 1" in refusal(sweep.main, *arguments, "--workers", 0)
    assert "--sbatch needs SLURM; leave it out" in refusal(sweep.main, *arguments, "--sbatch", "time=1")
    assert "--sbatch 7: expected [STAGE:]OPTION[=VALUE] with" in refusal(sweep.main, path, "--sbatch", "7")
    assert "--sbatch nodes=2: the command sets nodes itself" in refusal(sweep.main, path, "--sbatch", "nodes=2")
    other = write_space(tmp_path, base="configs/ml1m.yaml", fixed={"store.path": str(tmp_path / "absent")})
    complaint = refusal(sweep.main, other, *arguments[1:])
    assert (
        f"store {tmp_path}/absent does not exist; build it with python -m shards.build --config configs/ml1m"
        in complaint
    )
    other = write_space(tmp_path, fixed={"store.path": "https://name:secret@host/store"})
    complaint = refusal(sweep.main, other, *arguments[1:])
    assert "store.path holds a URL with credentials" in complaint and "secret" not in complaint
    assert not folder.exists()
    _, study = start_sweep(write_space(tmp_path), folder)
    study.take(2)
    (tmp_path / "store").mkdir()
    assert "trial 0 belongs to worker 2, which has started it; use at least --workers 3" in refusal(
        sweep.main, *arguments
    )
    with worker_lock(folder, 0, patience_s=0):
        assert f"worker 0 of {folder}, or a training that it started, is running; wait" in refusal(
            sweep.main, *arguments
        )


def pretend_slurm(folder: Path, patch: pytest.MonkeyPatch, squeue: str) -> None:
    """Put stand-ins for SLURM's commands first in the PATH: ``squeue`` is a line of shell, the others do nothing."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(f"#!/bin/sh\n{squeue if name == 'squeue' else 'true'}\n")
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_jobs_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not submitted twice, and do not matter once no trial is left for them."""
    path, folder = write_space(tmp_path, trials=1), tmp_path / "sweep"
    arguments = [path, "--folder", folder]
    pretend_slurm(tmp_path / "bin", monkeypatch, "echo 7 PENDING")
    _, study = start_sweep(path, folder)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    (folder / "jobs").mkdir()
    write_record(folder / "jobs", [SubmittedStage("workers", ("7",), ("7.log",))])
    for cluster in ("slurm", "local"):
        complaint = refusal(sweep.main, *arguments, "--cluster", cluster)
        assert f"the sweep in {folder} is in progress: 7 PENDING; wait for it, or end it with --cancel" in complaint
    sweep.main([*map(str, arguments), "--status"])
    assert capsys.readouterr().out.splitlines()[-1] == "workers   job 7        PENDING"
    complaint = refusal(sweep.main, *arguments, "--cluster", "local", "--cancel")
    assert "--cancel needs SLURM; workers of this machine end with the command" in complaint
    trial = study.take(0)
    assert trial is not None
    study.complete(trial.number, 0.5)
    sweep.main([*map(str, arguments)])
    assert capsys.readouterr().out.endswith(f"wrote {folder}/best.yaml\n")


def test_a_controller_that_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space, study = start_sweep(write_space(tmp_path), tmp_path / "sweep")
    busy = f"[ -e {tmp_path}/asked ] && echo 7 COMPLETED && exit; touch {tmp_path}/asked; echo busy now >&2; exit 1"
    pretend_slurm(tmp_path / "bin", monkeypatch, busy)
    monkeypatch.setattr("launch.slurm.job_states.ASK_AGAIN_S", 0.0)
    sweep.wait_for_slurm(["7"], study, space)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("squeue does not answer: busy now; ") and line.endswith("; retrying for 10 minutes")


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    complaint = refusal(sweep.main, write_space(tmp_path), "--cluster", "local", "--folder", tmp_path / "sweep")
    assert "optuna is not installed; install it with pip install -e '.[sweep]'" in complaint


def test_all_trials_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the sweep nor a worker succeeds."""
    path, folder = write_space(tmp_path, trials=1), tmp_path / "sweep"
    _, study = start_sweep(path, folder)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    trial = study.take(0)
    assert trial is not None
    study.fail(trial.number, "FloatingPointError: step 3")
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(path), "--cluster", "local", "--folder", str(folder)])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (1, "error: all trials failed\n")
    assert "  failed" in said.out and "FloatingPointError: step 3" in said.out
    assert not (folder / "best.yaml").exists()
    with pytest.raises(SystemExit) as ended:
        run_worker([str(folder), "0"])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (1, "worker 0: no trial is left to start\n")
    assert said.err == f"error: all 1 trials of {folder} failed; last: FloatingPointError: step 3\n"
