"""``launch/eval.slurm`` as an array, and the job that joins its parts: requeued, failed, preempted, with mistakes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fmrl_dist import evaluate
from fmrl_dist.data.store.reader import Store
from tests.fixtures.demo_runs import VENV, wait_for
from tests.fixtures.slurm_cluster import SlurmCluster, read_log
from tests.fixtures.training import run_here

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(undisturbed: Path, folder: Path) -> Path:
    """A run of 200 users in 7 blocks."""
    shutil.copytree(undisturbed, folder / "evaluated", symlinks=True)
    return folder / "evaluated"


def submit(slurm: SlurmCluster, folder: Path, *words: object, **environment: str) -> int:
    """``sbatch words`` with logs of all tasks in ``folder``."""
    output = f"--output={folder}/slurm-%x-%A_%a.out"
    return slurm.submit(output, *words, "--threads", 1, environment=VENV | environment)


def wait_for_join_id(slurm: SlurmCluster, task: str) -> int:
    """The job that joins, which the log of an array's first task names."""
    found: list[str] = []

    def is_named() -> bool:
        found[:] = re.findall(r"^job (\d+) joins the parts", read_log(slurm.facts(task)), re.MULTILINE)
        return bool(found)

    wait_for(f"task {task} submits the join", is_named)
    return int(found[0])


def expected_bytes(run: Path, name: str, *words: object) -> bytes:
    """What a single evaluation in this process writes; the file is removed."""
    run_here(evaluate.main, ["--checkpoint", run, *words, "--threads", 1])
    content = (run / name).read_bytes()
    (run / name).unlink()
    return content


def test_a_requeued_array_and_its_join(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """The requeued first task submits no second join. The figures are a single evaluation's, byte for byte.

    The join is in the array's partition and reservation, but takes no other options or variables from it.
    """
    expected = expected_bytes(run, "evaluation-masked.json", "--mask-seen")
    reserved = ("reservation=ours", "starttime=now", "duration=10", "users=root", "nodes=ALL", "flags=ignore_jobs")
    slurm.call("scontrol", "create", *reserved)
    try:
        options = ["--array=4-5", "--partition=urgent", "--reservation=ours"]
        words = [*options, "launch/eval.slurm", run, "--mask-seen"]
        array = submit(slurm, folder, *words, SBATCH_EXCLUSIVE="exclusive")
        join_id = wait_for_join_id(slurm, f"{array}_4")
        slurm.call("scontrol", "requeue", f"{array}_4")
        tasks = [slurm.wait(f"{array}_{task}") for task in (4, 5)]
        join = slurm.wait(join_id)
        facts = slurm.facts(join_id)
    finally:
        slurm.call("scontrol", "delete", "reservation=ours")
    assert [task.state for task in tasks] == ["COMPLETED"] * 2, tasks
    assert [slurm.restarts(f"{array}_{task}") for task in (4, 5)] == [1, 0]
    for number, task in enumerate(tasks, 1):
        assert f"test, part {number}/2: " in task.log
    assert set(re.findall(r"^job (\d+) joins", tasks[0].log, re.MULTILINE)) == {str(join_id)}
    assert "joins the parts" not in tasks[1].log
    joins = ("squeue", "--states=all", "--noheader", f"--name=fmrl-eval-{array}-join", "--format=%A")
    assert slurm.call(*joins).split() == [str(join_id)]
    assert slurm.facts(f"{array}_4")["NumCPUs"] == "8"
    assert (join.state, join.exit_code) == ("COMPLETED", "0:0"), join.log
    assert join.log.startswith("test, 200 users, ")
    assert Path(facts["StdOut"]) == folder / f"slurm-fmrl-eval-{array}-join.out"
    names = ("NumNodes", "NumCPUs", "TimeLimit", "Partition", "Reservation")
    assert [facts[name] for name in names] == ["1", "1", "00:30:00", "urgent", "ours"]
    assert (run / "evaluation-masked.json").read_bytes() == expected
    assert not (run / "evaluation-masked.parts").exists()


def test_a_failed_task_leaves_no_evaluation(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """A block of the second part is damaged. The job that joins is cancelled, and does not wait for ever.

    Once the store is repaired, only the second part is missing. Of an array that joins, a single task does.
    """
    expected = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    store = folder / "damaged"
    shutil.copytree(folder / "store", store)
    block = Store.open(store).manifest.splits["test"][1]
    with (store / block.shard).open("r+b") as file:
        file.seek(block.offset + block.num_bytes // 2)
        file.write(b"\xff" * 64)
    array = submit(slurm, folder, "--array=0-1", "launch/eval.slurm", run, "--store", store)
    tasks = [slurm.wait(f"{array}_{task}") for task in range(2)]
    assert [task.state for task in tasks] == ["COMPLETED", "FAILED"]
    (line,) = [line for line in tasks[1].log.splitlines() if line.startswith("error: ")]
    assert block.shard in line and "is damaged" in line
    join = slurm.wait(wait_for_join_id(slurm, f"{array}_0"))
    assert (join.state, join.log) == ("CANCELLED", "")
    assert not (run / "evaluation.json").exists()

    part = slurm.wait(submit(slurm, folder, "--array=0", "launch/eval.slurm", run, "--part", "2/2"))
    assert part.state == "COMPLETED", part.log
    array = submit(slurm, folder, "launch/eval.slurm", "--join", run)
    joins = [slurm.wait(f"{array}_{task}") for task in range(4)]
    assert [join.state for join in joins] == ["COMPLETED"] * 4, joins
    assert [bool(join.log) for join in joins] == [True, False, False, False]
    assert (run / "evaluation.json").read_bytes() == expected


def test_a_preempted_evaluation_on_two_nodes(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """It waits until SLURM requeues it, and starts again. The processes meet on the interface that is named."""
    words = [run, "--split", "valid"]
    expected = expected_bytes(run, "evaluation-valid.json", *words[1:])
    options = ["--array=0", "--nodes=2", "launch/eval.slurm"]
    job_id = submit(slurm, folder, *options, *words, FMRL_INTERFACE="eth0")
    steps = ("squeue", "--noheader", "--steps", "--format=%i", f"--jobs={job_id}")
    wait_for("the launchers' step", lambda: f"{job_id}_0.0" in slurm.call(*steps).split())
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert slurm.wait(urgent).state == "COMPLETED"
    job = slurm.wait(f"{job_id}_0")
    assert (job.state, slurm.restarts(f"{job_id}_0")) == ("COMPLETED", 1), job.log
    assert f"waiting for SLURM to requeue job {job_id}_0" in job.log
    assert (run / "evaluation-valid.json").read_bytes() == expected


def test_a_join_that_cannot_be_submitted(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """The partition accepts no new jobs; the task says so at once."""
    array = submit(slurm, folder, "--hold", "--array=0-1", "launch/eval.slurm", run)
    slurm.call("scontrol", "update", "PartitionName=main", "State=DRAIN")
    try:
        slurm.call("scontrol", "release", str(array))
        first = slurm.wait(f"{array}_0")
        slurm.call("scancel", str(array))
    finally:
        slurm.call("scontrol", "update", "PartitionName=main", "State=UP")
    assert (first.state, first.exit_code) == ("FAILED", "2:0")
    line = "error: sbatch rejected the job that joins (above); set FMRL_CHAIN=1 and submit it yourself after the array"
    assert first.log.splitlines()[-1] == line
    assert first.log.startswith("sbatch: error: ")
    slurm.wait(f"{array}_1")


def test_mistakes(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """One line, and exit code 2: of an array with gaps, and of a join without parts."""
    gaps = submit(slurm, folder, "--array=0,2", "launch/eval.slurm", run)
    early = submit(slurm, folder, "--array=0", "launch/eval.slurm", "--join", run, "--split", "valid", "--mask-seen")
    parts = run / "evaluation-valid-masked.parts"
    for task, complaint in {
        f"{gaps}_0": "the array's ids are not consecutive; submit it as --array=0-1",
        f"{early}_0": f"{parts} holds no parts to join; evaluate them with --part 1/N to N/N",
    }.items():
        job = slurm.wait(task)
        assert (job.state, job.exit_code, job.log) == ("FAILED", "2:0", f"error: {complaint}\n")
