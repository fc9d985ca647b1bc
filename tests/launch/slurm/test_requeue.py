"""``launch/train.slurm`` disturbed on a real SLURM, by time limit, node crash, preemption: it ends as the same run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fixtures.processes import launch
from tests.fixtures.slurm_cluster import Job, SlurmCluster
from tests.fixtures.training import figures, records
from tests.launch.slurm.test_launch import VENV, demo_words, log_in

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(900)]

NUM_STEPS = 7 * 350
START_S = 120.0


def long_words(folder: Path, run: str) -> list[str]:
    """A run of about a minute; it saves every 50 steps, so that a crash loses little."""
    values = {
        **{"train.epochs": NUM_STEPS // 7, "train.log_every_steps": 1, "train.checkpoint_every_steps": 50},
        **{"eval.every_steps": 700, "train.patience": 0},
    }
    return [*demo_words(folder, run), *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requeue")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The run in two local processes."""
    result = launch(2, ["-m", "fmrl_dist.train", *long_words(folder, "undisturbed")], timeout_s=400)
    assert result.returncode == 0, result.stderr
    return folder / "undisturbed"


def wait_for_steps(run: Path, least: int) -> None:
    deadline = time.monotonic() + START_S
    while not (run / "metrics.jsonl").exists() or not records(run) or records(run)[-1]["step"] < least:
        assert time.monotonic() < deadline, f"{run} has not come to step {least}"
        time.sleep(0.2)


def wait_for_restart(slurm: SlurmCluster, job_id: int) -> None:
    deadline = time.monotonic() + START_S
    while int(slurm.facts(job_id)["Restarts"]) == 0:
        assert time.monotonic() < deadline, slurm.facts(job_id)
        time.sleep(0.5)


def assert_same_run(job: Job, run: Path, undisturbed: Path) -> None:
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log[-4000:]
    assert figures(run) == figures(undisturbed)
    assert (run / "evaluation.json").read_bytes() == (undisturbed / "evaluation.json").read_bytes()
    assert not (run / "requeue").exists()


def test_time_limit(slurm: SlurmCluster, undisturbed: Path, folder: Path) -> None:
    """A minute of time, of which SLURM takes what it likes for its signal; then, to be done soon, as much as needed."""
    options = [log_in(folder), "--time=1", "--signal=B:USR1@35"]
    job_id = slurm.submit(*options, "launch/train.slurm", *long_words(folder, "limited"), environment=VENV)
    wait_for_restart(slurm, job_id)
    slurm.call("scontrol", "update", f"JobId={job_id}", "TimeLimit=10")
    job = slurm.wait(job_id, 600)
    assert "is submitted again and goes on from its checkpoint" in job.log
    assert "from step 0 to" in job.log and job.log.count("from step ") >= 2
    assert_same_run(job, folder / "limited", undisturbed)


def test_node_crash(slurm: SlurmCluster, undisturbed: Path, folder: Path) -> None:
    job_id = slurm.submit(log_in(folder), "launch/train.slurm", *long_words(folder, "crashed"), environment=VENV)
    wait_for_steps(folder / "crashed", 600)
    slurm.crash("node2")
    try:
        wait_for_restart(slurm, job_id)
    finally:
        slurm.boot("node2")
    job = slurm.wait(job_id, 600)
    assert job.log.count("from step ") >= 2
    assert_same_run(job, folder / "crashed", undisturbed)


def test_preemption(slurm: SlurmCluster, undisturbed: Path, folder: Path) -> None:
    """Another job takes the nodes; this one saves, waits, and goes on."""
    job_id = slurm.submit(log_in(folder), "launch/train.slurm", *long_words(folder, "preempted"), environment=VENV)
    wait_for_steps(folder / "preempted", 600)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", log_in(folder), "--wrap=sleep 3")
    assert slurm.wait(urgent, 120).state == "COMPLETED"
    job = slurm.wait(job_id, 600)
    assert int(slurm.facts(job_id)["Restarts"]) == 1
    assert "stopped by a signal" in job.log
    assert_same_run(job, folder / "preempted", undisturbed)


def test_no_time_for_a_step(slurm: SlurmCluster, folder: Path) -> None:
    """Whichever step this life ends at, two lives have ended there before: it is the last."""
    run = folder / "short"
    words = ["--nodes=1", "launch/train.slurm", *long_words(folder, "short")]
    job_id = slurm.submit(log_in(folder), *words, environment=VENV)
    wait_for_steps(run, 1)
    lives = [f"job {job_id} at step-{step:08d}" for step in range(NUM_STEPS + 1)]
    (run / "lives").write_text("\n".join([*lives, *lives]) + "\n")
    slurm.call("scancel", "--batch", "--signal=USR1", str(job_id))  # as the time limit does
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.log
    life = f"job {job_id} at {(run / 'checkpoints' / 'latest').readlink()}"
    assert job.log.splitlines()[-1] == (
        f"error: the time limit has come three times to {life}: there is no time to evaluate, or for one step; "
        "submit it again with a longer --time"
    )


def test_cancelled(slurm: SlurmCluster, folder: Path) -> None:
    """It saves and ends, and asks no node. sbatch hands on one variable only, and is told of two tasks a node."""
    options = [log_in(folder), "--ntasks-per-node=2", "--export=FMRL_VENV"]
    job_id = slurm.submit(*options, "launch/train.slurm", *long_words(folder, "cancelled"), environment=VENV)
    wait_for_steps(folder / "cancelled", 1)
    slurm.call("scancel", str(job_id))
    job = slurm.wait(job_id)
    assert job.state == "CANCELLED", job.log
    assert job.log.count("2 process(es), engine multi_cpu") == 1
    assert "stopped by a signal" in job.log and "a node does not answer" not in job.log
