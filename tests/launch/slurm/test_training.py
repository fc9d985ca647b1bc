"""``launch/train.slurm`` given to sbatch by hand: cancelled, resumed, with GPUs, with DeepSpeed, with mistakes."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.fixtures.demo_runs import (
    NUM_STEPS,
    STEPS_PER_EPOCH,
    VENV,
    demo_arguments,
    has_pending,
    last_step,
    paused,
    wait_for,
)
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.slurm_cluster import EndedJob, SlurmCluster, read_log
from tests.fixtures.training import records

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]


def log_in(folder: Path) -> str:
    return f"--output={folder}/slurm-%x-%j.out"


def submit_training(slurm: SlurmCluster, folder: Path, *options: str) -> int:
    """A job that trains ``folder / "by-hand" / "run"``, with data and store of its own."""
    arguments = demo_arguments(folder / "by-hand", "run")
    return slurm.submit(log_in(folder), *options, "launch/train.slurm", *arguments, environment=VENV)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "by-hand" / "run"


@pytest.fixture(scope="module")
def cancelled(slurm: SlurmCluster, folder: Path, run: Path) -> EndedJob:
    """Held, released, and cancelled. sbatch passes on one variable only, and is given two tasks a node."""
    job_id = submit_training(slurm, folder, "--hold", "--ntasks-per-node=2", "--export=FMRL_VENV")
    assert slurm.facts(job_id)["JobState"] == "PENDING"
    slurm.call("scontrol", "release", str(job_id))
    with paused(run, 10):
        slurm.call("scancel", str(job_id))
        wait_for("the run's end", lambda: "stopped by a signal" in read_log(slurm.facts(job_id)))
    return slurm.wait(job_id)


def test_a_cancelled_job_saves_and_ends(cancelled: EndedJob, run: Path) -> None:
    """It has built the store, once, and started one launcher on each node; it does not check the nodes."""
    assert cancelled.state == "CANCELLED", cancelled.log
    assert cancelled.log.count("building the demo store") == 1
    assert cancelled.log.count("2 process(es), engine multi_cpu") == 1
    assert "a node does not answer" not in cancelled.log
    assert (run / "checkpoints" / "latest").readlink().name == f"step-{last_step(run):08d}"
    assert not (run / "evaluation.json").exists()


@pytest.fixture(scope="module")
def without_time(slurm: SlurmCluster, folder: Path, run: Path, cancelled: EndedJob) -> EndedJob:
    """Submitted again, on one node. Whichever step this life ends at, two lives have ended there before."""
    job_id = submit_training(slurm, folder, "--nodes=1")
    with paused(run, last_step(run) + 5):
        lives = [f"job {job_id} at step-{step:08d}" for step in range(NUM_STEPS + 1)]
        (run / "lives").write_text("\n".join([*lives, *lives]) + "\n")
        slurm.call("scancel", "--batch", "--signal=USR1", str(job_id))  # as SLURM does at the time limit
        wait_for("USR1", lambda: has_pending(run, signal.SIGUSR1))
    return slurm.wait(job_id)


def test_a_job_without_time_for_a_step_ends_with_an_error(without_time: EndedJob, run: Path) -> None:
    assert (without_time.state, without_time.exit_code) == ("FAILED", "2:0"), without_time.log
    assert "1 process(es), engine no" in without_time.log
    life = f"job {without_time.id} at {(run / 'checkpoints' / 'latest').readlink()}"
    assert without_time.log.splitlines()[-1] == (
        f"error: the time limit has ended {life} three times: there is not enough time to evaluate, or for one step; "
        "submit it again with a longer --time"
    )


def test_a_process_for_each_gpu(slurm: SlurmCluster, folder: Path, run: Path, without_time: EndedJob) -> None:
    """The run resumes with two processes for the two GPUs of a node, which SLURM counts but do not exist."""
    step = last_step(run)
    arguments = [*demo_arguments(folder / "by-hand", "run"), "--train.max_steps", str(step + 2)]
    options = [log_in(folder), "--nodes=1", "--gpus-per-node=2"]
    job = slurm.run(*options, "launch/train.slurm", *arguments, environment=VENV)
    assert "2 process(es), engine multi_cpu" in job.log
    assert f"from step {step} to at most {step + 2}" in job.log
    assert [record["step"] for record in records(run)] == list(range(1, step + 3))


def test_deepspeed_on_two_nodes(slurm: SlurmCluster, folder: Path, undisturbed: Path) -> None:
    """The losses of an epoch are those of local processes without DeepSpeed."""
    arguments = [*demo_arguments(folder, "zero"), "--train.max_steps", str(STEPS_PER_EPOCH)]
    environment = VENV | {"FMRL_DEEPSPEED": "launch/deepspeed/zero2.json"}
    job = slurm.run(log_in(folder), "launch/train.slurm", *arguments, environment=environment)
    assert "2 process(es), engine deepspeed ZeRO 2" in job.log
    expected = records(undisturbed)[:STEPS_PER_EPOCH]
    for found, plain in zip(records(folder / "zero"), expected, strict=True):
        for key in ("loss", "loss@8", "loss@32", "grad_norm"):
            assert found[key] == pytest.approx(plain[key], rel=1e-5), (found["step"], key)


MISTAKES = {
    "unknown key": (
        ["launch/train.slurm", "configs/demo.yaml", "--train.epoch", "3"],
        VENV,
        "unknown config key 'train.epoch'; did you mean 'train.epochs'?",
    ),
    "no environment": (
        ["launch/train.slurm"],
        {"FMRL_VENV": "/nonexistent"},
        f"no virtual environment in /nonexistent; run make setup in {REPOSITORY}, or set FMRL_VENV",
    ),
    "processes": (
        ["launch/train.slurm"],
        VENV | {"FMRL_PROCESSES_PER_NODE": "two"},
        "FMRL_PROCESSES_PER_NODE is 'two'; expected a number of at least 1",
    ),
    "credentials": (
        ["launch/train.slurm", "--store.path", "https://me:secret@host/shop"],
        VENV,
        "an argument holds a URL with credentials, which SLURM has recorded: replace them, leave them out of the URL, "
        "and give them by the environment or by a file (docs/cluster.md, Credentials)",
    ),
    "no run": (
        ["--array=0", "launch/eval.slurm", "--split", "valid"],
        VENV,
        "no run to evaluate; submit as sbatch launch/eval.slurm RUN [--split valid …]",
    ),
    "lanes": (
        ["launch/train.slurm", "--train.batch_size", "96", "--train.lanes", "3"],
        VENV | {"FMRL_PROCESSES_PER_NODE": "2"},
        "4 processes (2 nodes with 2 each) share 3 lanes; raise --train.lanes (a divisor of train.batch_size, 96), "
        "or ask for fewer nodes or processes",
    ),
}


@pytest.fixture(scope="module")
def mistaken_jobs(slurm: SlurmCluster, folder: Path) -> dict[str, int]:
    """All at once, by name of the mistake."""
    return {
        name: slurm.submit(log_in(folder), *words, environment=environment)
        for name, (words, environment, _) in MISTAKES.items()
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_job_with_one_line(mistake: str, slurm: SlurmCluster, mistaken_jobs: dict[str, int]) -> None:
    job = slurm.wait(mistaken_jobs[mistake])
    assert (job.state, job.exit_code, job.log) == ("FAILED", "2:0", f"error: {MISTAKES[mistake][2]}\n")


def test_a_mistake_that_is_found_on_the_node(slurm: SlurmCluster, folder: Path) -> None:
    """One process has no launcher, which would add a traceback of its own and an exit code of 1."""
    words = [log_in(folder), "--array=0", "launch/eval.slurm", folder / "no-run"]
    job = slurm.wait(slurm.submit(*words, environment=VENV))
    assert (job.state, job.exit_code, slurm.facts(job.id)["NumNodes"]) == ("FAILED", "2:0", "1")
    (line,) = [line for line in job.log.splitlines() if not line.startswith("srun: ")]
    assert line.startswith(f"error: {folder / 'no-run'} holds no checkpoint")


def test_a_job_from_another_folder_runs_in_the_project_of_its_script(slurm: SlurmCluster, folder: Path) -> None:
    script = REPOSITORY / "launch" / "train.slurm"
    sbatch = ["env", f"--chdir={folder}", "sbatch", "--parsable", log_in(folder), str(script)]
    job = slurm.wait(int(slurm.call(*sbatch, "configs/demo.yaml", "--train.epoch", "3", environment=VENV)))
    assert (job.state, job.exit_code, slurm.facts(job.id)["WorkDir"]) == ("FAILED", "2:0", str(folder))
    assert job.log.splitlines() == [
        f"submitted in {folder}; this job runs in {REPOSITORY}, and relative paths start there",
        "error: unknown config key 'train.epoch'; did you mean 'train.epochs'?",
    ]


def test_nodes_with_unequal_numbers_of_gpus(slurm: SlurmCluster, folder: Path) -> None:
    """Three on two nodes. Every node would start as many processes as the first has GPUs."""
    words = ["--nodes=2", "--gpus=3", "launch/train.slurm", *demo_arguments(folder, "unequal")]
    job = slurm.wait(slurm.submit(log_in(folder), *words, environment=VENV))
    assert job.state == "FAILED"
    assert re.search(r"^error: node2 has . GPU", job.log, re.MULTILINE), job.log
    (line,) = [line for line in job.log.splitlines() if line.startswith("error: node")]
    assert line.endswith("expected the same number on each: use --gpus-per-node, or set FMRL_PROCESSES_PER_NODE")
    assert not (folder / "unequal").exists()
