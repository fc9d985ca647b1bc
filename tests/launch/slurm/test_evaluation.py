"""``launch/eval.slurm`` as an array on a real SLURM of two nodes, and the job that joins its parts."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from fmrl_dist import evaluate
from fmrl_dist.data.store.reader import Store
from tests.fixtures.slurm_cluster import SlurmCluster, read_log
from tests.fixtures.training import run_here, train_here
from tests.launch.slurm.test_launch import VENV, demo_words

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

START_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where store, run and logs of these tests are; every node sees it."""
    return tmp_path_factory.mktemp("slurm-evaluation")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A demo trained here, its 200 users in 7 blocks."""
    words = [*demo_words(folder, "run"), "--store.users_per_block", 32]
    return train_here(Path("configs/demo.yaml"), folder / "run", *words)


def submit(slurm: SlurmCluster, folder: Path, *words: object, **environment: str) -> int:
    """``sbatch words`` with logs of all tasks in ``folder``."""
    output = f"--output={folder}/slurm-%x-%A_%a.out"
    return slurm.submit(output, *words, "--threads", 1, environment=VENV | environment)


def wait_for_join_id(slurm: SlurmCluster, task: str) -> int:
    """The job that joins, as the log of an array's first task has it."""
    deadline = time.monotonic() + START_S
    while not (found := re.search(r"^job (\d+) joins the parts", read_log(slurm.facts(task)), re.MULTILINE)):
        assert time.monotonic() < deadline, slurm.facts(task)
        time.sleep(0.2)
    return int(found[1])


def bytes_here(run: Path, name: str, *words: object) -> bytes:
    """What a single evaluation in this process writes."""
    (run / name).unlink(missing_ok=True)
    run_here(evaluate.main, ["--checkpoint", run, *words, "--threads", 1])
    return (run / name).read_bytes()


def jobs_of(slurm: SlurmCluster, name: str) -> list[str]:
    return slurm.call("squeue", "--states=all", "--noheader", f"--name={name}", "--format=%A").split()


def test_array_and_its_join(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """Four parts, as the script has it; the figures are those of a single evaluation, byte for byte."""
    expected = bytes_here(run, "evaluation.json")
    (run / "evaluation.json").unlink()
    array = submit(slurm, folder, "launch/eval.slurm", run)
    tasks = [slurm.wait(f"{array}_{task}") for task in range(4)]
    assert {task.state for task in tasks} == {"COMPLETED"}, tasks
    for number, task in enumerate(tasks, 1):
        assert f"test, part {number}/4: " in task.log and ("joins the parts" in task.log) == (number == 1)
    join = slurm.wait(wait_for_join_id(slurm, f"{array}_0"))
    assert (join.state, join.exit_code) == ("COMPLETED", "0:0"), join.log
    assert join.log.startswith("test, 200 users, whole catalogue ranked:\n")
    facts = slurm.facts(join.id)
    assert Path(facts["StdOut"]) == folder / f"slurm-fmrl-eval-{array}-join.out"
    assert (facts["NumNodes"], facts["NumCPUs"], facts["TimeLimit"]) == ("1", "1", "00:30:00")
    assert (run / "evaluation.json").read_bytes() == expected
    assert not (run / "evaluation.parts").exists()


@pytest.mark.multiproc
def test_chain_submits_the_join(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """Each part on two nodes. The join is an array too where nobody says otherwise: only one of its tasks joins."""
    words = [run, "--split", "valid"]
    expected = bytes_here(run, "evaluation-valid.json", *words[1:])
    (run / "evaluation-valid.json").unlink()
    array = submit(slurm, folder, "--nodes=2", "--array=0-1", "launch/eval.slurm", *words, FMRL_CHAIN="1")
    after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
    join = submit(slurm, folder, *after, "launch/eval.slurm", "--join", *words, FMRL_CHAIN="1")
    tasks = [slurm.wait(f"{array}_{task}") for task in range(2)]
    assert [(task.state, "joins the parts" in task.log) for task in tasks] == [("COMPLETED", False)] * 2, tasks
    joins = [slurm.wait(f"{join}_{task}") for task in range(4)]
    assert [task.state for task in joins] == ["COMPLETED"] * 4, joins
    assert [bool(task.log) for task in joins] == [True, False, False, False]
    assert jobs_of(slurm, f"fmrl-eval-{array}-join") == []
    assert (run / "evaluation-valid.json").read_bytes() == expected


def test_requeued_task_submits_no_second_join(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """The join is in the array's partition and reservation, but takes no other options or variables from it."""
    expected = bytes_here(run, "evaluation-masked.json", "--mask-seen")
    (run / "evaluation-masked.json").unlink()
    reserved = ("reservation=ours", "starttime=now", "duration=10", "users=root", "nodes=ALL", "flags=ignore_jobs")
    slurm.call("scontrol", "create", *reserved)
    try:
        options = ["--array=4-5", "--partition=urgent", "--reservation=ours"]
        words = [*options, "launch/eval.slurm", run, "--mask-seen"]
        array = submit(slurm, folder, *words, SBATCH_EXCLUSIVE="exclusive")
        join = wait_for_join_id(slurm, f"{array}_4")
        slurm.call("scontrol", "requeue", f"{array}_4")
        first = slurm.wait(f"{array}_4")
        assert (first.state, slurm.facts(f"{array}_4")["Restarts"]) == ("COMPLETED", "1")
        assert f"job {join} joins the parts" in first.log and "test, part 1/2: " in first.log
        assert slurm.wait(join).state == "COMPLETED"
        assert jobs_of(slurm, f"fmrl-eval-{array}-join") == [str(join)]
        names = ("NumCPUs", "Partition", "Reservation")
        facts = [[slurm.facts(job)[name] for name in names] for job in (f"{array}_4", join)]
        assert facts == [["8", "urgent", "ours"], ["1", "urgent", "ours"]]
        assert (run / "evaluation-masked.json").read_bytes() == expected
    finally:
        slurm.call("scontrol", "delete", "reservation=ours")


def test_failed_task_leaves_no_evaluation(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """A damaged block is in the third part. The job that joins is cancelled, not left to wait for ever.

    Once the store is mended, the third part is all that there is to do.
    """
    expected = bytes_here(run, "evaluation.json")
    (run / "evaluation.json").unlink()
    store = folder / "damaged"
    shutil.copytree(folder / "store", store)
    block = Store.open(store).manifest.splits["test"][2]
    with (store / block.shard).open("r+b") as file:
        file.seek(block.offset + block.num_bytes // 2)
        file.write(b"\xff" * 64)
    array = submit(slurm, folder, "launch/eval.slurm", run, "--store", store)
    tasks = [slurm.wait(f"{array}_{task}") for task in range(4)]
    assert [task.state for task in tasks] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    (line,) = [line for line in tasks[2].log.splitlines() if line.startswith("error: ")]
    assert block.shard in line and "is damaged" in line
    join = slurm.wait(wait_for_join_id(slurm, f"{array}_0"))
    assert (join.state, join.log) == ("CANCELLED", "")
    assert not (run / "evaluation.json").exists()

    for words in (["launch/eval.slurm", run, "--part", "3/4"], ["launch/eval.slurm", "--join", run]):
        job = slurm.wait(submit(slurm, folder, "--array=0", *words))
        assert job.state == "COMPLETED", job.log
    assert (run / "evaluation.json").read_bytes() == expected


def test_join_that_cannot_be_submitted(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """The partition takes no new jobs; the task says so at once."""
    array = submit(slurm, folder, "--hold", "--array=0-1", "launch/eval.slurm", run)
    slurm.call("scontrol", "update", "PartitionName=main", "State=DRAIN")
    try:
        slurm.call("scontrol", "release", str(array))
        first = slurm.wait(f"{array}_0")
        slurm.call("scancel", str(array))
    finally:
        slurm.call("scontrol", "update", "PartitionName=main", "State=UP")
    slurm.wait(f"{array}_1")
    assert (first.state, first.exit_code) == ("FAILED", "2:0")
    line = "error: sbatch refused the job that joins (above); set FMRL_CHAIN=1 and submit it yourself after the array"
    assert first.log.splitlines()[-1] == line
    assert first.log.startswith("sbatch: error: ")


def test_preemption(slurm: SlurmCluster, run: Path, folder: Path) -> None:
    """Another job takes the node; the evaluation waits to be submitted again, and begins anew."""
    expected = bytes_here(run, "evaluation.json")
    (run / "evaluation.json").unlink()
    job_id = submit(slurm, folder, "--array=0", "--nodes=2", "launch/eval.slurm", run)
    deadline = time.monotonic() + START_S
    steps = ("squeue", "--noheader", "--steps", "--format=%i", f"--jobs={job_id}")
    while f"{job_id}_0.0" not in slurm.call(*steps).split():  # the launchers run
        assert time.monotonic() < deadline, slurm.facts(job_id)
        time.sleep(0.1)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert slurm.wait(urgent).state == "COMPLETED"
    job = slurm.wait(f"{job_id}_0")
    assert (job.state, slurm.facts(f"{job_id}_0")["Restarts"]) == ("COMPLETED", "1"), job.log
    assert f"waiting for SLURM to submit job {job_id}_0 again" in job.log
    assert (run / "evaluation.json").read_bytes() == expected


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
