"""``python -m launch.sweep`` on a real SLURM: an array of workers, one of which runs out of time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from launch import sweep
from launch.sweep_folder import run_of
from tests.slurm_cluster import SlurmCluster
from tests.sweep_fixture import begin, best_in_run, trials_of, write_space
from tests.training_fixture import records

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]

LONG = {"train.epochs": 60, "train.patience": 0, "train.checkpoint_every_steps": 50, "eval.every_steps": 210}


def test_an_array_of_workers(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The first worker is told that its time is over amid its trial: it is submitted again, and goes on with it."""
    path, folder = write_space(tmp_path, trials=2, fixed=LONG), tmp_path / "sweep"
    sweep.require_store(begin(path, folder)[0])
    command: list[str | Path] = [sys.executable, "-m", "launch.sweep", path, "--folder", folder]
    said = slurm.call(*command, "--workers", "2", "--sbatch", "time=10")
    array = int(slurm.call("squeue", "--noheader", "--name=small-sweep", "--format=%A").split()[0])
    assert f"small-sweep: job(s) {array}_0, {array}_1, logs in {folder}/jobs" in said

    deadline = time.monotonic() + 120
    while not (folder / "journal.log").exists() or not [t for t in trials_of(folder) if t.worker == 0]:
        assert time.monotonic() < deadline, slurm.facts(f"{array}_0")
        time.sleep(0.5)
    (trial,) = [trial for trial in trials_of(folder) if trial.worker == 0]
    run = run_of(folder, trial)
    while not (run / "metrics.jsonl").exists() or not records(run) or records(run)[-1]["step"] < 20:
        assert time.monotonic() < deadline, f"{run} has not come to step 20"
        time.sleep(0.2)
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
