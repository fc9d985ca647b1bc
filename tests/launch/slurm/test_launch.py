"""``launch/*.slurm`` on a real SLURM of two nodes: what a job trains and evaluates, and how it ends on a mistake."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fmrl_dist import evaluate
from tests.fixtures.processes import REPOSITORY, launch
from tests.fixtures.slurm_cluster import Job, SlurmCluster
from tests.fixtures.training import figures, records, run_here

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]

VENV = {"FMRL_VENV": sys.prefix}
NUM_STEPS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data, store, runs and logs of these tests are; every node sees it."""
    return tmp_path_factory.mktemp("slurm")


def log_in(folder: Path) -> str:
    return f"--output={folder}/slurm-%x-%j.out"


def demo_words(folder: Path, run: str) -> list[str]:
    """A small demo with a store of its own, and two epochs with dropout on it, into ``folder / run``."""
    values = {
        **{"data.root": folder / "data", "store.path": folder / "store", "run.dir": folder / run},
        **{"data.demo.users": 200, "data.demo.items": 120, "data.features.text.dim": 16},
        **{"model.dropout": 0.2, "model.lru_dropout": 0.2, "run.tensorboard": "false"},
        **{"train.epochs": 2, "train.batch_size": 32, "train.threads": 1, "train.log_every_steps": 1},
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def two_nodes(slurm: SlurmCluster, folder: Path) -> Job:
    """The demo trained on two nodes, from raw tables on, into the folder ``two-nodes``."""
    words = ["launch/train.slurm", *demo_words(folder, "two-nodes")]
    job_id = slurm.submit("--hold", log_in(folder), *words, environment=VENV)
    assert slurm.facts(job_id)["JobState"] == "PENDING"
    slurm.call("scontrol", "release", str(job_id))
    return slurm.wait(job_id)


def test_training_on_two_nodes(two_nodes: Job, folder: Path) -> None:
    assert (two_nodes.state, two_nodes.exit_code) == ("COMPLETED", "0:0"), two_nodes.log
    assert "2 process(es), engine multi_cpu" in two_nodes.log
    assert two_nodes.log.count("building the demo store") == 1
    assert two_nodes.log.count("test, 200 users, whole catalogue ranked") == 1
    assert [record["step"] for record in records(folder / "two-nodes")] == list(range(1, NUM_STEPS + 1))


def test_two_nodes_train_as_two_local_processes(two_nodes: Job, folder: Path) -> None:
    """Digit for digit: losses, validation and final evaluation. Dropout is drawn by (seed, step, rank)."""
    result = launch(2, ["-m", "fmrl_dist.train", *demo_words(folder, "local")])
    assert result.returncode == 0, result.stderr
    assert figures(folder / "two-nodes") == figures(folder / "local")
    by_slurm, local = (folder / run / "evaluation.json" for run in ("two-nodes", "local"))
    assert by_slurm.read_bytes() == local.read_bytes()


def test_evaluation_on_two_nodes(slurm: SlurmCluster, two_nodes: Job, folder: Path) -> None:
    """Equal to an evaluation here; the processes meet through the interface that is named."""
    words = [folder / "two-nodes", "--split", "valid", "--mask-seen", "--threads", 1]
    environment = VENV | {"FMRL_INTERFACE": "eth0"}
    slurm.run(log_in(folder), "--nodes=2", "--array=0", "launch/eval.slurm", *words, environment=environment)
    result = folder / "two-nodes" / "evaluation-valid-masked.json"
    by_slurm = result.read_bytes()
    result.unlink()
    run_here(evaluate.main, ["--checkpoint", *words])
    assert result.read_bytes() == by_slurm


def test_one_node_and_resumed_with_a_process_per_gpu(slurm: SlurmCluster, two_nodes: Job, folder: Path) -> None:
    """One process is no process group. For two GPUs, which SLURM counts but nobody has, two go on, on the CPU."""
    words = [log_in(folder), "--nodes=1", "launch/train.slurm", *demo_words(folder, "one-node"), "--train.max_steps"]
    job = slurm.run(*words, 2, environment=VENV)
    assert "1 process(es), engine no" in job.log
    job = slurm.run("--gpus-per-node=2", *words, 4, environment=VENV)
    assert "2 process(es), engine multi_cpu" in job.log
    assert "from step 2 to at most 4" in job.log
    assert [record["step"] for record in records(folder / "one-node")] == [1, 2, 3, 4]


def test_deepspeed_on_two_nodes(slurm: SlurmCluster, two_nodes: Job, folder: Path) -> None:
    """The losses of local processes without DeepSpeed, at dropout 0."""
    same = ["--model.dropout", "0", "--model.lru_dropout", "0", "--train.max_steps", "7"]
    result = launch(2, ["-m", "fmrl_dist.train", *demo_words(folder, "ddp"), *same])
    assert result.returncode == 0, result.stderr
    words = [log_in(folder), "launch/train.slurm", *demo_words(folder, "zero"), *same]
    job = slurm.run(*words, environment=VENV | {"FMRL_DEEPSPEED": "launch/deepspeed/zero2.json"})
    assert "2 process(es), engine deepspeed ZeRO 2" in job.log
    for found, expected in zip(records(folder / "zero"), records(folder / "ddp"), strict=True):
        for key in ("loss", "loss@8", "loss@128", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (found["step"], key)


@pytest.mark.parametrize(
    ("words", "environment", "complaint"),
    [
        pytest.param(
            ["launch/train.slurm", "configs/demo.yaml", "--train.epoch", "3"],
            VENV,
            "unknown config key 'train.epoch'; did you mean 'epochs'?",
            id="unknown key",
        ),
        pytest.param(
            ["launch/train.slurm"],
            {"FMRL_VENV": "/nonexistent"},
            f"no virtual environment in /nonexistent; run make setup in {REPOSITORY}, or set FMRL_VENV",
            id="no environment",
        ),
        pytest.param(
            ["launch/train.slurm"],
            VENV | {"FMRL_PROCESSES_PER_NODE": "two"},
            "FMRL_PROCESSES_PER_NODE is 'two'; expected a number of at least 1",
            id="processes",
        ),
        pytest.param(
            ["--array=0", "launch/eval.slurm", "--split", "valid"],
            VENV,
            "no run to evaluate; submit as sbatch launch/eval.slurm RUN [--split valid …]",
            id="no run",
        ),
        pytest.param(
            ["launch/train.slurm", "--train.batch_size", "96", "--train.lanes", "3"],
            VENV | {"FMRL_PROCESSES_PER_NODE": "2"},
            "4 processes (2 nodes with 2 each) share 3 lanes; raise --train.lanes (a divisor of train.batch_size, 96), "
            "or ask for fewer nodes or processes",
            id="lanes",
        ),
    ],
)
def test_mistake_ends_the_job_with_one_line(
    words: list[str], environment: dict[str, str], complaint: str, slurm: SlurmCluster, folder: Path
) -> None:
    job = slurm.wait(slurm.submit(log_in(folder), *words, environment=environment))
    assert (job.state, job.exit_code, job.log) == ("FAILED", "2:0", f"error: {complaint}\n")


def test_mistake_that_is_found_on_the_node(slurm: SlurmCluster, folder: Path) -> None:
    """The launcher adds a traceback of its own and an exit code of 1; the line is there all the same."""
    words = [log_in(folder), "--array=0", "launch/eval.slurm", folder / "no-run"]
    job = slurm.wait(slurm.submit(*words, environment=VENV))
    assert (job.state, job.exit_code, slurm.facts(job.id)["NumNodes"]) == ("FAILED", "1:0", "1")
    (line,) = [line for line in job.log.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {folder / 'no-run'} holds no checkpoint")


def test_nodes_with_unequal_numbers_of_gpus(slurm: SlurmCluster, folder: Path) -> None:
    """Three on two nodes. Every node would start as many processes as the first has GPUs."""
    words = ["--nodes=2", "--gpus=3", "launch/train.slurm", *demo_words(folder, "unequal")]
    job = slurm.wait(slurm.submit(log_in(folder), *words, environment=VENV))
    assert job.state == "FAILED"
    assert re.search(r"^error: node2 has . GPU", job.log, re.MULTILINE), job.log
    (line,) = [line for line in job.log.splitlines() if line.startswith("error: node")]
    assert line.endswith("expected as many on each: use --gpus-per-node, or set FMRL_PROCESSES_PER_NODE")
    assert not (folder / "unequal").exists()
