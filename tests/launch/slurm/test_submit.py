"""``launch.submit`` on a real SLURM: chains that fail, are cancelled or rejected; a SLURM that does not answer."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.record import SubmittedStage, read_record, write_record
from tests.fixtures.demo_runs import demo_arguments, wait_for
from tests.fixtures.slurm_cluster import SYSTEM_PATH, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]


def submit(slurm: SlurmCluster, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m launch.submit arguments`` at the head, with ``environment`` on top."""
    command = [sys.executable, "-m", "launch.submit", *map(str, arguments)]
    return slurm.command(*command, environment=environment, timeout_s=400)


def record(folder: Path, run: str) -> dict[str, SubmittedStage]:
    return {stage.stage: stage for stage in read_record(folder / f"{run}.jobs")}


def states(slurm: SlurmCluster, stages: dict[str, SubmittedStage]) -> dict[str, set[str]]:
    """The states of each stage's jobs, as SLURM says."""
    return {name: {slurm.facts(job)["JobState"] for job in stage.jobs} for name, stage in stages.items()}


def wait_until_ended(slurm: SlurmCluster, stages: dict[str, SubmittedStage]) -> None:
    jobs = ",".join(stage.number for stage in stages.values())
    wait_for("an empty queue", lambda: slurm.call("squeue", "--noheader", f"--jobs={jobs}") == "")


def test_a_store_that_cannot_be_built_ends_all_stages(slurm: SlurmCluster, folder: Path) -> None:
    arguments = [*demo_arguments(folder, "unbuilt"), "--store.path", folder / "unbuilt-store"]
    arguments += ["--data.items.id", "number"]
    result = submit(slurm, *arguments, "--parts", 2, "--sizes", "8,32", "--wait")
    stages = record(folder, "unbuilt")
    (log,) = stages["shards"].logs
    assert (result.returncode, result.stderr) == (1, ""), result
    assert f"shards failed: job {stages['shards'].number} is FAILED; its log is {log} and ends with" in result.stdout
    assert "    error: table " in result.stdout and "has no column 'number'" in result.stdout
    wait_until_ended(slurm, stages)
    assert states(slurm, stages) == {"shards": {"FAILED"}, **dict.fromkeys(list(stages)[1:], {"CANCELLED"})}
    lines = submit(slurm, *arguments, "--status").stdout.splitlines()
    assert [line.split()[-1] for line in lines if not line.startswith(" ")] == ["FAILED", *["CANCELLED"] * 4]


def test_a_damaged_store_ends_training_and_what_follows(slurm: SlurmCluster, folder: Path, undisturbed: Path) -> None:
    """Its length is right, so it is kept; training reads it and stops. The shown end of the log has the error."""
    damaged = folder / "damaged-for-training"
    shutil.copytree(folder / "store", damaged)
    for shard in damaged.glob("train-*"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    arguments = [*demo_arguments(folder, "stopped"), "--store.path", damaged]
    result = submit(slurm, *arguments, "--sizes", "8", "--sbatch", "train:nodes=1", "--wait")
    stages = record(folder, "stopped")
    assert result.returncode == 1, result
    assert f"train failed: job {stages['train'].number} is FAILED; its log is" in result.stdout
    assert f"kept {damaged}" in Path(stages["shards"].logs[0]).read_text()
    shown = result.stdout.partition("ends with\n")[2]
    assert re.search(rf"^    error: block at byte \d+ of shard {damaged}/train-", shown, re.MULTILINE), shown
    wait_until_ended(slurm, stages)
    assert states(slurm, stages) == {
        **{"shards": {"COMPLETED"}, "train": {"FAILED"}},
        **{"evaluate": {"CANCELLED"}, "export": {"CANCELLED"}},
    }


def test_one_chain_at_a_time_and_how_to_end_it(slurm: SlurmCluster, folder: Path) -> None:
    arguments = demo_arguments(folder, "held")
    result = submit(slurm, *arguments, "--sizes", "8", "--sbatch", "shards:hold")
    assert result.returncode == 0, result
    stages = record(folder, "held")
    first = stages["shards"].number
    again = submit(slurm, *arguments)
    assert (again.returncode, again.stdout) == (2, "")
    (line,) = again.stderr.splitlines()
    assert line.startswith(f"error: the chain of {folder / 'held'} is in progress: {first} PENDING, ")
    assert submit(slurm, *arguments, "--status").stdout.count("PENDING") == 4
    assert first in submit(slurm, *arguments, "--cancel").stdout
    wait_until_ended(slurm, stages)
    assert states(slurm, stages) == dict.fromkeys(stages, {"CANCELLED"})
    assert submit(slurm, *arguments, "--cancel").stdout == "cancelled: nothing, all jobs have ended\n"


def test_the_jobs_do_not_depend_on_who_follows_them(slurm: SlurmCluster, folder: Path) -> None:
    arguments, output = demo_arguments(folder, "followed"), folder / "followed.out"
    command = [sys.executable, "-m", "launch.submit", *arguments, "--stages", "shards", "--sbatch", "hold", "--wait"]
    process = slurm.start_command(*command, log=output)
    wait_for("the first state", lambda: output.exists() and "PENDING" in output.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert output.read_text().splitlines()[-1] == "no longer following; the jobs continue: see --status and --cancel"
    (shards,) = record(folder, "followed").values()
    assert slurm.facts(shards.number)["JobState"] == "PENDING"
    slurm.call("scancel", shards.number)


def test_what_sbatch_rejects_leaves_no_job(slurm: SlurmCluster, folder: Path) -> None:
    before = slurm.call("squeue", "--noheader")
    arguments = demo_arguments(folder, "rejected")
    result = submit(slurm, *arguments, "--sbatch", "partition=nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: sbatch rejects rejected-shards: invalid partition specified: nowhere")
    assert not (folder / "rejected.jobs").exists()
    result = submit(slurm, *arguments, "--sbatch", "export:partition=nowhere", "shards:hold")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: sbatch rejects rejected-export: ")
    wait_until_ended(slurm, record(folder, "rejected"))
    assert slurm.call("squeue", "--noheader") == before


def test_no_accounting_and_a_controller_that_is_busy_once(
    slurm: SlurmCluster, folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The chain is followed to its end. Jobs that squeue has forgotten are UNKNOWN, and hinder nothing."""
    shutil.copytree(undisturbed, folder / "alone", symlinks=True)
    busy = f'mkdir {tmp_path}/asked 2>/dev/null || exec {shutil.which("squeue")} "$@"\necho busy >&2\nexit 1'
    for name, script in {"squeue": busy, "sacct": "echo no slurmdbd >&2\nexit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{SYSTEM_PATH}"
    arguments = [*demo_arguments(folder, "alone"), "--stages", "export", "--sizes", "8"]
    result = submit(slurm, *arguments, "--wait", PATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "export " in result.stdout and "COMPLETED" in result.stdout
    assert result.stderr.splitlines() == [
        "squeue does not answer: busy; try again, or ask the cluster's administrators; retrying for 10 minutes"
    ]

    jobs = folder / "alone.jobs"
    write_record(jobs, [SubmittedStage("train", ("999999",), ("",)), *read_record(jobs)])
    result = submit(slurm, *arguments, "--status", PATH=path)
    assert (result.returncode, len(result.stderr.splitlines())) == (0, 1), result.stderr
    assert "sacct does not answer: no slurmdbd" in result.stderr
    lines = [line.split()[-1] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert lines == ["UNKNOWN", "COMPLETED"]
    assert submit(slurm, *arguments, "--sbatch", "hold", PATH=path).returncode == 0
    assert submit(slurm, *arguments, "--cancel", PATH=path).returncode == 0
