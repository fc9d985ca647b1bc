"""``python -m launch.sweep`` on a real SLURM: an array of workers; one that runs out of time, one that is preempted."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from launch import sweep
from launch.sweeps.folder import run_of
from launch.sweeps.study import Trial
from tests.fixtures.slurm_cluster import SlurmCluster
from tests.fixtures.sweeps import begin, best_in_run, trials_of, write_space
from tests.fixtures.training import records
from tests.launch.slurm.test_launch import log_in
from tests.launch.slurm.test_requeue import wait_for_steps

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]

LONG = {"train.epochs": 60, "train.patience": 0, "train.checkpoint_every_steps": 50, "eval.every_steps": 210}


def wait_for_run(folder: Path) -> Path:
    """The run of worker 0's trial, once it is under way."""
    deadline = time.monotonic() + 120
    while not (mine := [trial for trial in begun(folder) if trial.worker == 0]):
        assert time.monotonic() < deadline, "worker 0 has not begun"
        time.sleep(0.5)
    run = run_of(folder, mine[0])
    wait_for_steps(run, 20)
    return run


def begun(folder: Path) -> list[Trial]:
    return trials_of(folder) if (folder / "journal.log").exists() else []


def test_an_array_of_workers(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The first worker is told that its time is over amid its trial: it is submitted again, and goes on with it."""
    path, folder = write_space(tmp_path, trials=2, fixed=LONG), tmp_path / "sweep"
    sweep.require_store(begin(path, folder)[0])
    command: list[str | Path] = [sys.executable, "-m", "launch.sweep", path, "--folder", folder]
    slurm.call(*command, "--sbatch", "hold")
    again = slurm.command(*command)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1), again.stderr
    assert f"the sweep in {folder} is under way: " in again.stderr and " PENDING; wait" in again.stderr
    assert slurm.call(*command, "--status").splitlines()[-1].endswith(" PENDING")
    assert re.fullmatch(r"cancelled: \d+", slurm.call(*command, "--cancel"))
    assert slurm.call(*command, "--cancel") == "cancelled: nothing, all jobs have ended"
    assert slurm.call(*command, "--status").splitlines()[-1].endswith(" CANCELLED")

    said = slurm.call(*command, "--workers", "2", "--sbatch", "time=10")
    array = int(slurm.call("squeue", "--noheader", "--name=small-sweep", "--format=%F").split()[0])
    assert f"small-sweep: job(s) {array}_0, {array}_1, logs in {folder}/jobs" in said

    run = wait_for_run(folder)
    slurm.call("scancel", "--batch", "--signal=USR1", f"{array}_0")

    jobs = [slurm.wait(f"{array}_{task}", 300) for task in range(2)]
    assert [(job.state, job.exit_code) for job in jobs] == [("COMPLETED", "0:0")] * 2, [job.log for job in jobs]
    assert [int(slurm.facts(f"{array}_{task}")["Restarts"]) for task in range(2)] == [1, 0]
    assert f"job {array}_0 is submitted again and goes on with its trial" in jobs[0].log
    trials = trials_of(folder)
    assert [(trial.number, trial.state) for trial in trials] == [(0, "complete"), (1, "complete")]
    assert sorted(trial.worker for trial in trials) == [0, 1]
    assert [trial.value for trial in trials] == [best_in_run(folder, trial) for trial in trials]
    log = run.with_suffix(".log").read_text()
    assert log.count("from step ") == 2 and "1 process(es), engine no" in log
    assert [record["step"] for record in records(run)][-1] == 420

    assert f"wrote {folder}/best.yaml" in slurm.call(*command)  # it is over: nothing is submitted


def test_a_preempted_worker(slurm: SlurmCluster, tmp_path: Path) -> None:
    """It and its trainer are told, its trial is saved then and there, and SLURM itself submits it again."""
    fixed = {**LONG, "train.checkpoint_every_steps": 1000, "train.epochs": 90}
    path, folder = write_space(tmp_path, trials=1, fixed=fixed), tmp_path / "sweep"
    sweep.require_store(begin(path, folder)[0])
    slurm.call(sys.executable, "-m", "launch.sweep", path, "--folder", folder)
    job_id = slurm.call("squeue", "--noheader", "--name=small-sweep", "--format=%F").split()[0]
    run = wait_for_run(folder)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", log_in(tmp_path), "--wrap=sleep 1")
    assert slurm.wait(urgent, 120).state == "COMPLETED"
    job = slurm.wait(job_id, 300)
    assert (job.state, slurm.facts(job_id)["Restarts"]) == ("COMPLETED", "1"), job.log
    assert "stopped by a signal; the trial goes on" in job.log
    log = run.with_suffix(".log").read_text()
    steps = [int(step) for step in re.findall(r"from step (\d+) to", log)]
    assert len(steps) == 2 and 20 <= steps[1] < 630 and steps[1] % 210 != 0
    (trial,) = trials_of(folder)
    assert (trial.state, trial.value) == ("complete", best_in_run(folder, trial))
