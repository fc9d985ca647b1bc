"""``python -m launch.sweep`` on a real SLURM: an array of workers, one whose time is over and one that is preempted."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from launch.sweeps.folder import run_of
from launch.sweeps.study import Trial
from tests.fixtures.demo_runs import NUM_STEPS, has_pending, paused, wait_for
from tests.fixtures.slurm_cluster import SlurmCluster
from tests.fixtures.sweeps import best_in_run, start_sweep_on_store, trials_of, write_space
from tests.fixtures.training import records

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]

# A step in between can only have been saved at a signal.
RARELY = {"train.checkpoint_every_steps": 1000, "eval.every_steps": NUM_STEPS}


@pytest.fixture
def command(slurm: SlurmCluster, tmp_path: Path) -> list[str]:
    """That of a sweep of two trials, whose store is there."""
    path = write_space(tmp_path, trials=2, fixed=RARELY)
    start_sweep_on_store(path, tmp_path / "sweep")
    return [sys.executable, "-m", "launch.sweep", str(path), "--folder", str(tmp_path / "sweep")]


def trial_of(folder: Path, worker: int) -> Trial:
    """A worker's trial, once it has started."""
    found: list[Trial] = []

    def has_started() -> bool:
        if (folder / "journal.log").exists():
            found[:] = [trial for trial in trials_of(folder) if trial.worker == worker]
        return bool(found)

    wait_for(f"worker {worker} starts", has_started)
    return found[0]


def test_one_sweep_at_a_time_and_how_to_end_it(slurm: SlurmCluster, command: list[str], tmp_path: Path) -> None:
    slurm.call(*command, "--sbatch", "hold")
    again = slurm.command(*command)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1), again.stderr
    assert f"the sweep in {tmp_path / 'sweep'} is in progress: " in again.stderr and " PENDING; wait" in again.stderr
    assert slurm.call(*command, "--status").splitlines()[-1].endswith(" PENDING")
    assert re.fullmatch(r"cancelled: \d+", slurm.call(*command, "--cancel"))
    assert slurm.call(*command, "--cancel") == "cancelled: nothing, all jobs have ended"
    assert slurm.call(*command, "--status").splitlines()[-1].endswith(" CANCELLED")


def test_disturbed_workers_resume_their_trials(slurm: SlurmCluster, command: list[str], tmp_path: Path) -> None:
    """The first worker gets the time limit's signal, the second is preempted: each saves, is requeued, and resumes."""
    folder = tmp_path / "sweep"
    said = slurm.call(*command, "--workers", "2", "--sbatch", "time=10", "cpus-per-task=8")  # a node for each
    array = int(slurm.call("squeue", "--noheader", "--name=small-sweep", "--format=%F").split()[0])
    assert f"small-sweep: job(s) {array}_0, {array}_1, logs in {folder}/jobs" in said

    runs = [run_of(folder, trial_of(folder, worker)) for worker in range(2)]
    logs = [run.with_suffix(".log") for run in runs]
    with paused(runs[0], 20), paused(runs[1], 20):
        slurm.call("scancel", "--batch", "--signal=USR1", f"{array}_0")
        wait_for("USR1", lambda: has_pending(runs[0], signal.SIGUSR1))
        node = slurm.facts(f"{array}_1")["NodeList"]
        options = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
        urgent = slurm.submit(*options, "--wrap=sleep 1")
        wait_for("end by preemption", lambda: "stopped by a signal" in logs[1].read_text())
    assert slurm.wait(urgent).state == "COMPLETED"

    jobs = [slurm.wait(f"{array}_{worker}") for worker in range(2)]
    assert [(job.state, job.exit_code) for job in jobs] == [("COMPLETED", "0:0")] * 2, [job.log for job in jobs]
    assert [slurm.restarts(f"{array}_{worker}") for worker in range(2)] == [1, 1]
    assert f"job {array}_0 is requeued and resumes its trial" in jobs[0].log
    assert f"waiting for SLURM to requeue job {array}_1" in jobs[1].log
    assert [job.log.count("stopped by a signal; the trial resumes") for job in jobs] == [1, 1]
    trials = trials_of(folder)
    assert [(trial.number, trial.state) for trial in trials] == [(0, "complete"), (1, "complete")]
    assert sorted(trial.worker for trial in trials) == [0, 1]
    assert [trial.value for trial in trials] == [best_in_run(folder, trial) for trial in trials]
    for run, log in zip(runs, logs, strict=True):
        starts = [int(step) for step in re.findall(r"from step (\d+) to", log.read_text())]
        assert len(starts) == 2 and starts[0] == 0 and 20 <= starts[1] < NUM_STEPS
        assert "1 process(es), engine no" in log.read_text()
        assert [record["step"] for record in records(run)] == list(range(1, NUM_STEPS + 1))

    assert f"wrote {folder}/best.yaml" in slurm.call(*command)  # the sweep is over: nothing is submitted
