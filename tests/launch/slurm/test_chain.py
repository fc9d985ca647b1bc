"""``launch.submit`` from raw tables to exports, on two nodes, with a training that is disturbed three times.

One chain suffers what a cluster does to jobs: time limit, crash of a node, and preemption, one after another. It must
end as if nothing had happened, with the figures of an undisturbed run without SLURM, digit for digit.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.record import SubmittedStage, read_record
from tests.fixtures.demo_runs import NUM_STEPS, SIZES, demo_arguments, has_pending, last_step, paused, wait_for
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.slurm_cluster import SlurmCluster
from tests.fixtures.training import evaluation, figures, records

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(900)]

# SLURM sends the signal 8 to 38 seconds after the job's start: it looks every 30 seconds.
TIME_LIMIT = ["train:time=2", "train:signal=B:USR1@82"]
OPTIONS = ["--parts", "2", "--sbatch", *TIME_LIMIT, "evaluate:nodes=2"]
PAGE = REPOSITORY / "docs" / "cluster.md"


@dataclass(frozen=True)
class EndedChain:
    """A chain that has been followed to its end."""

    run: Path
    stages: dict[str, SubmittedStage]
    exit_code: int
    output: str
    evaluation_by_training: dict[str, Any]
    stopped_at: list[int]  # step after which each disturbance came

    def log(self, stage: str) -> str:
        return Path(self.stages[stage].logs[0]).read_text()


def chain_arguments(folder: Path) -> list[str]:
    """The first command of the docs, word by word, for a small demo with a store of its own."""
    command = PAGE.read_text().split("```")[1].strip().splitlines()[2]
    assert command.startswith(".venv/bin/python -m launch.submit ")
    words = shlex.split(command.replace("PARTITION", "main"))[1:]
    return [*words, *demo_arguments(folder, "chain"), "--store.path", str(folder / "chain-store"), *OPTIONS]


@pytest.fixture(scope="module")
def chain(slurm: SlurmCluster, folder: Path, request: pytest.FixtureRequest) -> EndedChain:
    run, output = folder / "chain", folder / "chain.out"
    process = slurm.start_command(sys.executable, *chain_arguments(folder), log=output)
    wait_for("all stages", lambda: output.exists() and "record and logs" in output.read_text())
    stages = {stage.stage: stage for stage in read_record(folder / "chain.jobs")}
    job, log = stages["train"].number, Path(stages["train"].logs[0])
    stopped_at = []

    with paused(run, 20):
        stopped_at.append(last_step(run))
        request.getfixturevalue("undisturbed")  # is trained while this run waits for the signal
        restarts = slurm.restarts(job)
        wait_for("USR1 at the time limit", lambda: has_pending(run, signal.SIGUSR1))
    wait_for("requeue at the time limit", lambda: slurm.restarts(job) > restarts)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=20")

    with paused(run, 60):
        stopped_at.append(last_step(run))
        restarts = slurm.restarts(job)
        slurm.crash("node2")
    try:
        wait_for("requeue after the crash", lambda: slurm.restarts(job) > restarts)
    finally:
        slurm.boot("node2")

    with paused(run, 100):
        stopped_at.append(last_step(run))
        restarts, saved = slurm.restarts(job), log.read_text().count("stopped by a signal")
        urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        wait_for("end by preemption", lambda: log.read_text().count("stopped by a signal") > saved)
    assert slurm.wait(urgent).state == "COMPLETED"
    wait_for("requeue after preemption", lambda: slurm.restarts(job) > restarts)

    assert slurm.wait(job).state == "COMPLETED", log.read_text()
    by_training = evaluation(run)
    (run / "evaluation.json").unlink()  # the next stages must write it
    exit_code = process.wait(240)
    return EndedChain(run, stages, exit_code, output.read_text(), by_training, stopped_at)


def test_the_chain_completes(chain: EndedChain, slurm: SlurmCluster, folder: Path) -> None:
    assert chain.exit_code == 0, chain.output
    assert list(chain.stages) == ["shards", "train", "evaluate", "join", "export"]
    assert [len(stage.jobs) for stage in chain.stages.values()] == [1, 1, 2, 1, 3]
    for stage in chain.stages.values():
        assert {slurm.facts(job)["JobState"] for job in stage.jobs} == {"COMPLETED"}
    assert f"built {folder / 'chain-store'}" in chain.log("shards")
    assert "2 process(es), engine multi_cpu" in chain.log("train")
    assert "building the demo store" not in chain.log("train")
    assert {path.name for path in chain.run.glob("export-*")} == {f"export-{size}" for size in SIZES}


def test_training_is_requeued_each_time_and_resumes(chain: EndedChain, slurm: SlurmCluster) -> None:
    """The signal reaches train.slurm itself, through submitit; the job stays the same, and the chain waits for it."""
    job, log = chain.stages["train"].number, chain.log("train")
    starts = [int(step) for step in re.findall(rf"from step (\d+) to at most {NUM_STEPS}", log)]
    assert len(starts) == 1 + slurm.restarts(job) >= 4
    by_time_limit, by_crash, by_preemption = chain.stopped_at
    assert starts[0] == 0 and starts == sorted(starts)
    assert starts[-3] >= by_time_limit  # saved at the signal
    assert by_crash - 20 <= starts[-2] <= by_crash and starts[-2] % 10 == 0  # the last checkpoint before the crash
    assert starts[-1] >= by_preemption
    assert log.count(f"job {job} is requeued and resumes from its checkpoint") == log.count("stopped by a signal") - 1
    assert not list(chain.run.with_name("chain.jobs").glob("*_result.pkl"))
    recorded = json.loads((chain.run.with_name("chain.jobs") / "submitted.json").read_text())
    assert recorded["stages"][1]["jobs"] == [job]


def test_its_run_is_the_undisturbed_one_digit_for_digit(chain: EndedChain, undisturbed: Path) -> None:
    """Losses, validation and the evaluation of training, of two nodes, are those of two processes on this machine."""
    assert [record["step"] for record in records(chain.run)] == list(range(1, NUM_STEPS + 1))
    assert figures(chain.run) == figures(undisturbed)
    assert chain.evaluation_by_training == evaluation(undisturbed)
    assert chain.log("train").count("test, 200 users, whole catalogue ranked") == 1
    assert not (chain.run / "requeue").exists()


def test_evaluation_in_parts_on_two_nodes_each(chain: EndedChain, undisturbed: Path, slurm: SlurmCluster) -> None:
    """The chain submits the join itself; its figures are the single evaluation's, digit for digit."""
    assert evaluation(chain.run) == evaluation(undisturbed)
    for number, log in enumerate(chain.stages["evaluate"].logs, 1):
        text = Path(log).read_text()
        assert f"test, part {number}/2: " in text and "joins the parts" not in text
    evaluate = chain.stages["evaluate"].number
    assert {slurm.facts(job)["NumNodes"] for job in chain.stages["evaluate"].jobs} == {"2"}
    assert slurm.call("squeue", "--states=all", "--noheader", f"--name=chain-evaluate-{evaluate}-join") == ""
    assert "test, 200 users, whole catalogue ranked" in chain.log("join")
    assert not (chain.run / "evaluation.parts").exists()


def test_the_first_page_of_the_docs_shows_its_last_line(chain: EndedChain) -> None:
    page = PAGE.read_text()
    clone, set_up, _ = page.split("```")[1].strip().splitlines()
    assert clone == "git clone URL fmrl-dist && cd fmrl-dist" and set_up.startswith("make setup ")
    example = re.search(r"^    (\d+ s  export .*)$", page, re.MULTILINE)
    assert example is not None
    shapes = [re.sub(r"\d+", "N", line).split() for line in (example[1], chain.output.splitlines()[-1])]
    assert shapes[0] == shapes[1]


def test_what_was_submitted_is_what_a_dry_run_prints(chain: EndedChain, slurm: SlurmCluster, folder: Path) -> None:
    arguments = [argument for argument in chain_arguments(folder) if argument != "--wait"]
    printed = slurm.call(sys.executable, *arguments, "--dry-run")
    for stage in chain.stages.values():
        text = (folder / "chain.jobs" / f"{stage.number}_submission.sh").read_text()
        for before in chain.stages.values():
            named = f"dependency=afterok:{before.stage.upper()}_JOB\n"
            text = text.replace(f"dependency=afterok:{before.number}\n", named)
        assert text.strip() in printed
