"""``python -m launch.sweep``: what it would start, what it refuses, and when it is over. Nothing is trained here."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from fmrl_dist.base.errors import UserError
from launch import sweep
from launch.local.processes import is_alive
from launch.slurm.job_states import COMMANDS
from launch.slurm.jobs import BatchJob, batch_script, sbatch_text, script_options
from launch.slurm.record import SubmittedStage, write_record
from launch.sweeps.folder import worker_lock
from launch.sweeps.space import read_space
from launch.sweeps.worker import main as run_worker
from shards.store.builder import build_store
from tests.fixtures.stores import tiny_config, write_raw
from tests.fixtures.sweeps import start_sweep, start_sweep_on_store, trials_of, write_space
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


def test_trials_of_one_store(tmp_path: Path) -> None:
    """A sweep whose store was built again from something else does not go on, nor does its worker."""
    path, folder = write_space(tmp_path), tmp_path / "sweep"
    rows = write_raw(tmp_path / "raw")
    before, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    study = start_sweep_on_store(path, folder)
    trial = study.take(0)
    np.save(tmp_path / "raw" / "vectors.npy", rows + 1)
    now, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"), overwrite=True)
    for complaint in (
        refusal(sweep.main, path, "--cluster", "local", "--folder", folder),
        refusal(run_worker, folder, 0),
    ):
        assert f"store {tmp_path}/store has the manifest {now.manifest.sha256[:12]}, but the sweep in " in complaint
        assert f"{folder} began on one with {before.manifest.sha256[:12]}, and its trials would not" in complaint
    assert trials_of(folder) == [trial]
    (folder / "store.json").unlink()
    assert f"{folder}/store.json is missing; restore it, or choose another" in refusal(run_worker, folder, 0)


def test_paths_that_no_script_survives(tmp_path: Path) -> None:
    words = ["configs/sweeps/demo.yaml", "--dry-run", "--folder", f"{tmp_path}/a\ncommand\n#"]
    assert refusal(sweep.main, *words).startswith(f"error: --folder is {words[-1]!r}, with a character that cannot be")
    scripts = (batch_script("launch/sweep.slurm"),)
    with pytest.raises(UserError, match="the folder of the jobs' logs is .* cannot be printed"):
        sbatch_text(BatchJob("workers", "name", scripts, tmp_path / "a\ncommand\n#", {}))


def test_jobs_that_cannot_be_recorded_are_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_slurm(tmp_path / "bin", monkeypatch, "true")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    (tmp_path / "bin" / "scancel").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/cancelled\n")
    job = sweep.Sweep(read_space(write_space(tmp_path)), tmp_path / "sweep", 2, {})
    (tmp_path / "sweep" / "jobs" / "submitted.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        sweep.submit_workers(job)
    assert (tmp_path / "cancelled").read_text() == "7\n"


def test_files_of_others_stay_beside_jobs_that_sbatch_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_slurm(tmp_path / "bin", monkeypatch, "true")
    jobs = tmp_path / "sweep" / "jobs"
    (tmp_path / "bin" / "sbatch").write_text(
        f"#!/bin/sh\necho mine > {jobs}/notes.txt\necho no such partition >&2\nexit 1\n"
    )
    job = sweep.Sweep(read_space(write_space(tmp_path)), tmp_path / "sweep", 2, {})
    with pytest.raises(UserError, match="sbatch rejects small-sweep: no such partition"):
        sweep.submit_workers(job)
    assert [path.name for path in jobs.iterdir()] == ["notes.txt"]


def test_a_worker_that_cannot_start_ends_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.Sweep, "commands", [("sleep", "1234")] * 2)
    job = sweep.Sweep(read_space(write_space(tmp_path)), tmp_path / "sweep", 2, {})
    (tmp_path / "sweep" / "jobs" / "small-sweep_1_log.out").mkdir(parents=True)
    before = set(psutil.Process().children())
    with pytest.raises(IsADirectoryError):
        sweep.run_workers_here(job)
    assert (tmp_path / "sweep" / "jobs" / "small-sweep_0_log.out").exists()
    started = set(psutil.Process().children()) - before
    assert [child for child in started if is_alive(child)] == []


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
