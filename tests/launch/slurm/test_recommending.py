"""``launch/recommend.slurm`` as an array: requeued, submitted again with other tasks, with mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fmrl_dist import recommend
from tests.fixtures.demo_runs import VENV, wait_for
from tests.fixtures.exports import random_export, write_random_export
from tests.fixtures.slurm_cluster import SlurmCluster
from tests.fixtures.training import contents, run_here

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]

SCRIPT = "launch/recommend.slurm"


def submit(slurm: SlurmCluster, folder: Path, *words: object) -> int:
    return slurm.submit(f"--output={folder}/slurm-%x-%A_%a.out", *words, environment=VENV)


def test_an_array_and_what_it_left_out(slurm: SlurmCluster, folder: Path) -> None:
    """A requeued task keeps what it has written. The bytes are one process', also of two processes on two nodes."""
    export = write_random_export(folder / "random-export", random_export(num_items=100))
    lines = [json.dumps({"user": user, "history": [f"i{user % 100}", f"i{user % 7}"]}) for user in range(5000)]
    (folder / "users.jsonl").write_text("\n".join(lines))
    words = [export, "--histories", folder / "users.jsonl", "--part-users", 100]
    run_here(recommend.main, [*words, "--output", folder / "expected"])
    expected = contents(folder / "expected")

    lists = folder / "lists"
    array = submit(slurm, folder, "--array=3-4", SCRIPT, *words, "--output", lists)
    wait_for("a part", lambda: lists.is_dir() and any(lists.glob("part-*")))
    slurm.call("scontrol", "requeue", f"{array}_3")
    tasks = [slurm.wait(f"{array}_{task}") for task in (3, 4)]
    assert [task.state for task in tasks] == ["COMPLETED"] * 2, tasks
    assert any(f"finished: {lists}" in task.log for task in tasks)
    assert contents(lists) == expected

    for name in ("_SUCCESS", "part-00000.parquet", "part-00031.parquet"):
        (lists / name).unlink()
    job = slurm.wait(submit(slurm, folder, "--array=0", "--nodes=2", SCRIPT, *words, "--output", lists))
    assert job.state == "COMPLETED" and "200 users" in job.log, job.log
    assert contents(lists) == expected
    shutil.rmtree(lists)


def test_mistakes(slurm: SlurmCluster, folder: Path) -> None:
    gaps = submit(slurm, folder, "--array=0,2", SCRIPT, folder / "export", "--histories", "x")
    none = submit(slurm, folder, "--array=0", SCRIPT, "--histories", "x")
    for task, complaint in {
        f"{gaps}_0": "the array's ids are not consecutive; submit it as --array=0-1",
        f"{none}_0": "no export; submit as sbatch launch/recommend.slurm EXPORT --histories PATH --output FOLDER",
    }.items():
        job = slurm.wait(task)
        assert (job.state, job.exit_code, job.log) == ("FAILED", "2:0", f"error: {complaint}\n")
