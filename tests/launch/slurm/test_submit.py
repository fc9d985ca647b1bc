"""``launch.submit`` on a real SLURM of two nodes: chains that complete, fail, are refused, cancelled, requeued."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm.follow import Submitted, read_record, write_record
from tests.fixtures.processes import REPOSITORY, launch
from tests.fixtures.slurm_cluster import SYSTEM_PATH, SlurmCluster
from tests.fixtures.training import evaluation
from tests.launch.slurm.test_launch import demo_words
from tests.launch.slurm.test_requeue import long_words, wait_for_restart

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data, store, runs and records of these tests are; every node sees it."""
    return tmp_path_factory.mktemp("chain")


def submit(slurm: SlurmCluster, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m launch.submit words`` at the head, with ``environment`` on top."""
    command = [sys.executable, "-m", "launch.submit", *map(str, words)]
    return slurm.command(*command, environment=environment, timeout_s=400)


def record(folder: Path, run: str) -> dict[str, Submitted]:
    return {stage.stage: stage for stage in read_record(folder / f"{run}.jobs")}


def states(slurm: SlurmCluster, stages: dict[str, Submitted]) -> dict[str, set[str]]:
    """SLURM's own word on the jobs of each stage."""
    return {name: {slurm.facts(job)["JobState"] for job in stage.jobs} for name, stage in stages.items()}


def wait_until_over(slurm: SlurmCluster, stages: dict[str, Submitted]) -> None:
    deadline = time.monotonic() + 60
    jobs = ",".join(stage.jobs[0].split("_")[0] for stage in stages.values())
    while slurm.call("squeue", "--noheader", f"--jobs={jobs}"):
        assert time.monotonic() < deadline, slurm.call("squeue")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def chain(slurm: SlurmCluster, folder: Path) -> subprocess.CompletedProcess[str]:
    """The demo on two nodes, from raw tables to exports, into the folder ``chain``."""
    options = ["--parts", 2, "--sizes", "8,32", "--sbatch", "time=10", "--sbatch", "train:time=20"]
    return submit(slurm, *demo_words(folder, "chain"), *options, "--wait")


def test_the_chain(chain: subprocess.CompletedProcess[str], slurm: SlurmCluster, folder: Path) -> None:
    assert chain.returncode == 0, chain.stdout + chain.stderr
    stages = record(folder, "chain")
    assert list(stages) == ["shards", "train", "evaluate", "join", "export"]
    assert [len(stage.jobs) for stage in stages.values()] == [1, 1, 2, 1, 2]
    assert states(slurm, stages) == dict.fromkeys(stages, {"COMPLETED"})
    assert chain.stdout.splitlines()[-1].split()[-2:] == ["2", "COMPLETED"]
    logs = {name: Path(stage.logs[0]).read_text() for name, stage in stages.items()}
    assert f"built {folder / 'store'}" in logs["shards"]
    assert "2 process(es), engine multi_cpu" in logs["train"] and "building the demo store" not in logs["train"]
    assert "part 1/2" in logs["evaluate"] and "test, 200 users, whole catalogue ranked" in logs["join"]
    assert sorted(path.name for path in (folder / "chain").glob("export-*")) == ["export-32", "export-8"]


def test_the_chain_evaluates_as_local_processes(chain: subprocess.CompletedProcess[str], folder: Path) -> None:
    """Digit for digit, though in two parts."""
    assert chain.returncode == 0, chain.stdout + chain.stderr
    result = launch(2, ["-m", "fmrl_dist.train", *demo_words(folder, "local")])
    assert result.returncode == 0, result.stderr
    by_chain, local = (folder / run / "evaluation.json" for run in ("chain", "local"))
    assert by_chain.read_bytes() == local.read_bytes()


def test_what_was_submitted_is_what_a_dry_run_prints(
    chain: subprocess.CompletedProcess[str], slurm: SlurmCluster, folder: Path
) -> None:
    options = ["--parts", 2, "--sizes", "8,32", "--sbatch", "time=10", "--sbatch", "train:time=20"]
    printed = submit(slurm, *demo_words(folder, "chain"), *options, "--dry-run").stdout
    stages = record(folder, "chain")
    for stage in stages.values():
        number = stage.jobs[0].split("_")[0]
        text = (folder / "chain.jobs" / f"{number}_submission.sh").read_text()
        for before in stages.values():
            own = before.jobs[0].split("_")[0]
            text = text.replace(f"dependency=afterok:{own}\n", f"dependency=afterok:{before.stage.upper()}_JOB\n")
        assert text in printed


def test_a_store_that_cannot_be_built_ends_all_stages(slurm: SlurmCluster, folder: Path) -> None:
    words = [*demo_words(folder, "unbuilt"), "--store.path", folder / "unbuilt-store", "--data.items.id", "number"]
    result = submit(slurm, *words, "--parts", 2, "--sizes", "8,32", "--wait")
    stages = record(folder, "unbuilt")
    (log,) = stages["shards"].logs
    assert (result.returncode, result.stderr) == (1, ""), result
    assert f"shards failed: job {stages['shards'].jobs[0]} is FAILED; its log is {log} and ends with" in result.stdout
    assert "    error: table " in result.stdout and "has no column 'number'" in result.stdout
    wait_until_over(slurm, stages)
    assert states(slurm, stages) == {"shards": {"FAILED"}, **dict.fromkeys(list(stages)[1:], {"CANCELLED"})}
    told = submit(slurm, *words, "--status").stdout.splitlines()
    assert [line.split()[-1] for line in told if not line.startswith(" ")] == ["FAILED", *["CANCELLED"] * 4]


def test_a_damaged_store_ends_training_and_what_follows(
    chain: subprocess.CompletedProcess[str], slurm: SlurmCluster, folder: Path
) -> None:
    """Its length is right, so it is kept; training reads it and stops."""
    damaged = folder / "damaged"
    shutil.copytree(folder / "store", damaged)
    for shard in damaged.glob("train-*"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    words = [*demo_words(folder, "stopped"), "--store.path", damaged]
    result = submit(slurm, *words, "--sizes", "8", "--wait")
    stages = record(folder, "stopped")
    assert result.returncode == 1, result
    assert f"train failed: job {stages['train'].jobs[0]} is FAILED; its log is" in result.stdout
    assert f"kept {damaged}" in Path(stages["shards"].logs[0]).read_text()
    shown = result.stdout.partition("ends with\n")[2].splitlines()
    assert shown[0].startswith("    error: block at byte ") and f" of shard {damaged}/train-" in shown[0]
    assert len(shown) == 22  # and the log's end
    wait_until_over(slurm, stages)
    assert states(slurm, stages) == {
        **{"shards": {"COMPLETED"}, "train": {"FAILED"}},
        **{"evaluate": {"CANCELLED"}, "export": {"CANCELLED"}},
    }


def test_one_chain_at_a_time_and_how_to_end_it(slurm: SlurmCluster, folder: Path) -> None:
    words = demo_words(folder, "held")
    result = submit(slurm, *words, "--sizes", "8", "--sbatch", "shards:hold")
    assert result.returncode == 0, result
    stages = record(folder, "held")
    first = stages["shards"].jobs[0]
    again = submit(slurm, *words)
    assert (again.returncode, again.stdout) == (2, "")
    (line,) = again.stderr.splitlines()
    assert line.startswith(f"error: the chain of {folder / 'held'} is under way: {first} PENDING, ")
    assert submit(slurm, *words, "--status").stdout.count("PENDING") == 4
    assert first in submit(slurm, *words, "--cancel").stdout
    wait_until_over(slurm, stages)
    assert states(slurm, stages) == dict.fromkeys(stages, {"CANCELLED"})
    assert submit(slurm, *words, "--cancel").stdout == "cancelled: nothing, all jobs have ended\n"


def test_what_sbatch_refuses_leaves_no_job(slurm: SlurmCluster, folder: Path) -> None:
    before = slurm.call("squeue", "--noheader")
    words = demo_words(folder, "refused")
    result = submit(slurm, *words, "--sbatch", "partition=nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: sbatch refuses refused-shards: invalid partition specified: nowhere")
    assert not (folder / "refused.jobs").exists()
    result = submit(slurm, *words, "--sbatch", "export:partition=nowhere", "--sbatch", "shards:hold")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: sbatch refuses refused-export: ")
    wait_until_over(slurm, record(folder, "refused"))
    assert slurm.call("squeue", "--noheader") == before


def test_the_first_page_of_the_docs(chain: subprocess.CompletedProcess[str], slurm: SlurmCluster, folder: Path) -> None:
    """Word by word, but for the clone and the set-up, whose place the tests' own take, and a demo of two steps."""
    assert chain.returncode == 0, chain.stdout + chain.stderr
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    clone, set_up, command = page.split("```")[1].strip().splitlines()
    assert clone == "git clone URL fmrl-dist && cd fmrl-dist"
    assert set_up.startswith("make setup ") and command.startswith(".venv/bin/python -m launch.submit ")
    words = shlex.split(command.replace("PARTITION", "main"))[1:]
    result = slurm.command(
        *(sys.executable, *words, *demo_words(folder, "docs"), "--train.max_steps", "2"), timeout_s=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    example = re.search(r"^    (\d+ s  export .*)$", page, re.MULTILINE)
    assert example is not None
    shape = [re.sub(r"\d+", "N", line).split() for line in (example[1], result.stdout.splitlines()[-1])]
    assert shape[0] == shape[1]
    assert {path.name for path in (folder / "docs").glob("export-*")} == {f"export-{8 << i}" for i in range(5)}


def test_no_accounting_and_a_controller_that_is_busy_once(
    chain: subprocess.CompletedProcess[str], slurm: SlurmCluster, folder: Path, tmp_path: Path
) -> None:
    """The chain is followed to its end. What squeue has forgotten is UNKNOWN, and in the way of nothing."""
    assert chain.returncode == 0, chain.stdout + chain.stderr
    shutil.copytree(folder / "chain", folder / "alone", symlinks=True)
    busy = f'mkdir {tmp_path}/asked 2>/dev/null || exec {shutil.which("squeue")} "$@"\necho busy >&2\nexit 1'
    for name, script in {"squeue": busy, "sacct": "echo no slurmdbd >&2\nexit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{SYSTEM_PATH}"
    words = [*demo_words(folder, "alone"), "--stages", "export", "--sizes", "8"]
    result = submit(slurm, *words, "--wait", PATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "export " in result.stdout and "COMPLETED" in result.stdout
    assert result.stderr.splitlines() == [
        "squeue does not answer: busy; try again, or ask who runs the cluster; asked again for 10 minutes"
    ]

    jobs = folder / "alone.jobs"
    write_record(jobs, [Submitted("train", ("999999",), ("",)), *read_record(jobs)])
    result = submit(slurm, *words, "--status", PATH=path)
    assert (result.returncode, len(result.stderr.splitlines())) == (0, 1), result.stderr
    assert "sacct does not answer: no slurmdbd" in result.stderr
    told = [line.split()[-1] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert told == ["UNKNOWN", "COMPLETED"]
    assert submit(slurm, *words, "--sbatch", "hold", PATH=path).returncode == 0
    assert submit(slurm, *words, "--cancel", PATH=path).returncode == 0


def test_time_limit(slurm: SlurmCluster, folder: Path) -> None:
    """The signal reaches train.slurm, which requeues its job; the same job goes on, and the chain with it."""
    limit = ["--sbatch", "train:time=2", "--sbatch", "train:signal=B:USR1@80"]  # 10 to 40 seconds from its start
    words = [*long_words(folder, "limited"), "--stages", "shards,train,evaluate", *limit]
    assert submit(slurm, *words).returncode == 0
    stages = record(folder, "limited")
    train = int(stages["train"].jobs[0])
    wait_for_restart(slurm, train)
    assert not list((folder / "limited.jobs").glob("*_result.pkl"))
    slurm.call("scontrol", "update", f"JobId={train}", "TimeLimit=10")
    result = submit(slurm, *words, "--status", "--wait")
    assert result.returncode == 0, result.stdout + result.stderr
    log = Path(stages["train"].logs[0]).read_text()
    assert f"job {train} is submitted again and goes on from its checkpoint" in log
    assert log.count("from step ") == 1 + int(slurm.facts(train)["Restarts"])
    assert states(slurm, stages) == dict.fromkeys(stages, {"COMPLETED"})
    assert json.loads((folder / "limited.jobs" / "submitted.json").read_text())["stages"][1]["jobs"] == [str(train)]
    assert evaluation(folder / "limited")["users"] == 200
