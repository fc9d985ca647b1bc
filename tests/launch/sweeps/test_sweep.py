"""``python -m launch.sweep``: the study that workers share, sweeps on this machine, workers that are killed."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import psutil
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend

from fmrl_dist.config.loading import load_config
from launch import sweep
from launch.slurm.follow import Submitted, write_record
from launch.slurm.jobs import COMMANDS, script_options
from launch.sweeps.folder import run_of, worker_lock
from launch.sweeps.study import best_of
from launch.sweeps.worker import cause
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.sweeps import METRIC, begin, best_in_run, trials_of, write_space
from tests.fixtures.training import records, refusal, run_module

LONG = {"train.epochs": 40, "train.patience": 0, "train.checkpoint_every_steps": 20, "eval.every_steps": 200}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data and the store that the slow tests share."""
    return tmp_path_factory.mktemp("sweep")


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["configs/sweeps/demo.yaml", "--dry-run", "--cluster", "local", "--workers", "2"])
    assert (
        capsys.readouterr().out
        == f"""\
runs/demo-sweep: 6 trials over configs/demo.yaml, by validation ndcg@10@128
  --train.epochs 3
  --train.threads 1
  --run.tensorboard false
  --train.lr {{low: 0.0005, high: 0.02, log: true}}
  --model.depth {{low: 1, high: 2, step: 1}}
  --model.dropout {{choices: [0.0, 0.2, 0.4]}}
{sys.executable} -m launch.sweeps.worker runs/demo-sweep 0
{sys.executable} -m launch.sweeps.worker runs/demo-sweep 1
"""
    )


def test_dry_run_of_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--folder", str(tmp_path / "new"), "--workers", "3", "--sbatch", "time=60", "gpus-per-node=1"]
    sweep.main(["configs/sweeps/demo.yaml", "--dry-run", *words])
    text = capsys.readouterr().out
    assert re.findall(r"^### .*", text, re.MULTILINE) == [
        f"### bash launch/sweep.slurm {tmp_path}/new {worker}" for worker in range(3)
    ]
    for option in ("array=0-2%3", "time=60", "gpus-per-node=1", "signal=B:USR1@120", "requeue", "nodes=1"):
        assert f"#SBATCH --{option}\n" in text
    assert not (tmp_path / "new").exists()


def test_jobs_are_like_those_of_training() -> None:
    """What a sweep's job and a training job must have in common to be submitted again."""
    ours, training = (script_options(Path(f"launch/{name}.slurm")) for name in ("sweep", "train"))
    assert {k: v for k, v in training.items() if k not in ("job-name", "nodes")}.items() <= ours.items()


TAKE_ALL = """
import sys
from pathlib import Path
from launch.sweeps.folder import open_folder
_, study = open_folder(Path(sys.argv[1]))
numbers = []
while (trial := study.take(int(sys.argv[2]))) is not None:
    study.complete(trial.number, trial.number / 7)
    numbers.append(trial.number)
print(numbers)
"""


def test_workers_share_out_exactly_the_trials(tmp_path: Path) -> None:
    """Three processes take trials as fast as they can; each trial is one worker's, and there are as many as asked."""
    folder = tmp_path / "sweep"
    begin(write_space(tmp_path, trials=12), folder)
    commands = [[sys.executable, "-c", TAKE_ALL, str(folder), str(worker)] for worker in range(3)]
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for command in commands]
    taken = [yaml.safe_load(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(sum(taken, [])) == list(range(12))
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(12))
    for worker, numbers in enumerate(taken):
        assert numbers == [trial.number for trial in trials if trial.worker == worker]
    assert len({trial.words["train.lr"] for trial in trials}) == 12
    best = best_of(trials)
    assert best is not None and best.number == 11


def test_the_same_trials_whoever_draws_them(tmp_path: Path) -> None:
    """A worker that starts anew for every trial draws what one that lives on draws."""
    path = write_space(tmp_path, trials=12, sampler={"seed": 5})
    words = []
    for folder, lives in ((tmp_path / "one", 1), (tmp_path / "many", 12)):
        for _ in range(lives):
            _, study = begin(path, folder)
            for _ in range(12 // lives):
                trial = study.take(0)
                assert trial is not None
                study.complete(trial.number, float(trial.words["train.lr"]))
        words.append([trial.words for trial in trials_of(folder)])
    assert words[0] == words[1]


def test_a_trial_stays_with_its_worker(tmp_path: Path) -> None:
    path, folder = write_space(tmp_path, trials=2), tmp_path / "sweep"
    _, study = begin(path, folder)
    first = study.take(1)
    assert begin(path, folder)[1].take(1) == first
    other = study.take(0)
    assert first is not None and other is not None and (first.number, other.number) == (0, 1)
    assert study.take(2) is None
    study.fail(other.number, "FloatingPointError: loss")
    assert study.take(0) is None
    states = [(trial.state, trial.value, trial.why) for trial in trials_of(folder)]
    assert states == [("running", None, ""), ("failed", None, "FloatingPointError: loss")]
    assert best_of(trials_of(folder)) is None


def test_a_trial_whose_worker_died_as_it_was_drawn_does_not_count(tmp_path: Path) -> None:
    path, folder = write_space(tmp_path, trials=1), tmp_path / "sweep"
    space, study = begin(path, folder)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    optuna.load_study(storage=storage, study_name=space.study).ask()  # and not a word whose it is
    trial = study.take(0)
    assert trial is not None and trial.number == 1
    assert [trial.number for trial in trials_of(folder)] == [1]
    assert study.take(1) is None
    drawn, _ = optuna.load_study(storage=storage, study_name=space.study).trials
    assert (drawn.state.name, drawn.user_attrs) == ("FAIL", {"why": "its worker died before it began"})


def test_the_journal_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna unpickles snapshots, of backends that keep them; ours is lines of JSON."""

    def unpickled(*_: object) -> None:
        raise AssertionError("unpickled")

    path, folder = write_space(tmp_path, trials=120), tmp_path / "sweep"  # snapshots are for every hundredth trial
    _, study = begin(path, folder)
    while (trial := study.take(0)) is not None:
        study.complete(trial.number, 0.0)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, unpickled)
    assert len(trials_of(folder)) == 120
    assert all(isinstance(json.loads(line), dict) for line in (folder / "journal.log").read_text().splitlines())


def test_a_sweep_goes_on_only_as_itself(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    begin(write_space(tmp_path, trials=2), folder)
    assert begin(write_space(tmp_path, trials=3), folder)[0].trials == 3
    words = ["--cluster", "local", "--folder", folder]
    path = write_space(tmp_path, fixed={"train.lanes": 2})
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    line = refusal(sweep.main, path, *words)
    assert "holds a sweep with another base.train.lanes: 0, now 2; restore it, or choose another --folder" in line
    path = write_space(tmp_path, parameters={"train.lr": {"low": 0.5, "high": 1.0}})
    assert "another space.parameters.train.lr.low: 0.001, now 0.5" in refusal(sweep.main, path, *words)
    assert trials_of(folder) == []


def test_refusals(tmp_path: Path) -> None:
    path, folder = write_space(tmp_path), tmp_path / "sweep"
    words = [path, "--cluster", "local", "--folder", folder]
    assert "holds no sweep; start one with python -m launch.sweep SPACE" in refusal(sweep.main, *words, "--status")
    assert "--workers is 0; expected at least 1" in refusal(sweep.main, *words, "--workers", 0)
    assert "--sbatch is for SLURM; leave it out" in refusal(sweep.main, *words, "--sbatch", "time=1")
    assert "--sbatch 7: expected OPTION[=VALUE]" in refusal(sweep.main, path, "--sbatch", "7")
    assert "--sbatch nodes=2: the sweep sets nodes itself" in refusal(sweep.main, path, "--sbatch", "nodes=2")
    other = write_space(tmp_path, base="configs/ml1m.yaml", fixed={"store.path": str(tmp_path / "absent")})
    complaint = refusal(sweep.main, other, *words[1:])
    assert (
        f"store {tmp_path}/absent does not exist; build it with python -m shards.build --config configs/ml1m"
        in complaint
    )
    other = write_space(tmp_path, fixed={"store.path": "https://name:secret@host/store"})
    complaint = refusal(sweep.main, other, *words[1:])
    assert "store.path holds credentials" in complaint and "secret" not in complaint
    assert not folder.exists()
    _, study = begin(write_space(tmp_path), folder)
    study.take(2)
    (tmp_path / "store").mkdir()
    assert "trial 0 waits for worker 2, which has begun it; take at least --workers 3" in refusal(sweep.main, *words)
    with worker_lock(folder, 0, patience_s=0):
        assert f"worker 0 of {folder} is at work, or what it trains is; wait" in refusal(sweep.main, *words)


def pretend_slurm(folder: Path, patch: pytest.MonkeyPatch, squeue: str) -> None:
    """Put SLURM's commands first in the PATH: ``squeue`` is a line of shell, the others do nothing."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(f"#!/bin/sh\n{squeue if name == 'squeue' else 'true'}\n")
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_jobs_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not submitted twice, nor in the way once no trial is left for them."""
    path, folder = write_space(tmp_path, trials=1), tmp_path / "sweep"
    words = [path, "--folder", folder]
    pretend_slurm(tmp_path / "bin", monkeypatch, "echo 7 PENDING")
    _, study = begin(path, folder)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    (folder / "jobs").mkdir()
    write_record(folder / "jobs", [Submitted("workers", ("7",), ("7.log",))])
    for cluster in ("slurm", "local"):
        complaint = refusal(sweep.main, *words, "--cluster", cluster)
        assert f"the sweep in {folder} is under way: 7 PENDING; wait, or end it with --cancel" in complaint
    sweep.main([*map(str, words), "--status"])
    assert capsys.readouterr().out.splitlines()[-1] == "workers   job 7        PENDING"
    complaint = refusal(sweep.main, *words, "--cluster", "local", "--cancel")
    assert "--cancel is for SLURM; workers of this machine end with the command" in complaint
    trial = study.take(0)
    assert trial is not None
    study.complete(trial.number, 0.5)
    sweep.main([*map(str, words)])
    assert capsys.readouterr().out.endswith(f"wrote {folder}/best.yaml\n")


def test_a_controller_that_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space, study = begin(write_space(tmp_path), tmp_path / "sweep")
    busy = f"[ -e {tmp_path}/asked ] && echo 7 COMPLETED && exit; touch {tmp_path}/asked; echo busy now >&2; exit 1"
    pretend_slurm(tmp_path / "bin", monkeypatch, busy)
    monkeypatch.setattr("launch.slurm.jobs.ASK_AGAIN_S", 0.0)
    sweep.wait_for_slurm(["7"], study, space)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("squeue does not answer: busy now; ") and line.endswith("; asked again for 10 minutes")


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    complaint = refusal(sweep.main, write_space(tmp_path), "--cluster", "local", "--folder", tmp_path / "sweep")
    assert "optuna is not installed; install it with pip install -e '.[sweep]'" in complaint


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("step 1\nTraceback …\n  File\nFloatingPointError: loss\n", "FloatingPointError: loss"),
        (
            "a.b.CError: x\n\nTraceback (most recent call last):\nsubprocess.CalledProcessError: Command …\n",
            "a.b.CError: x",
        ),
        ("error: no store\ntorch.distributed.elastic.ChildFailedError:\n", "error: no store"),
        ("step 1\rstep 2\nKilled\n\n", "Killed"),
        ("", "exit code -9 without a word"),
    ],
)
def test_why_a_trial_failed(log: str, why: str) -> None:
    assert cause(log, -9) == why


@pytest.mark.slow
def test_a_local_sweep(shop: Path) -> None:
    """Two workers to the end: the store built once, every trial trained once, its value its run's; some fail."""
    folder = shop / "local"
    choices = {"train.lr": {"choices": [0.001, 0.01, 1e30]}}
    path = write_space(shop, trials=6, parameters=choices, sampler={"seed": 3}, fixed={"train.epochs": 1})
    words = [path, "--cluster", "local", "--folder", folder]
    result = run_module("launch.sweep", *words, "--workers", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("building the demo store") == 1 and result.stderr == ""
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(6))
    assert {trial.worker for trial in trials} == {0, 1}
    for trial in trials:
        run = run_of(folder, trial)
        assert run.with_suffix(".log").read_text().count("from step 0 to at most 7") == 1
        if trial.words["train.lr"] == "1e+30":
            assert trial.state == "failed" and trial.why.startswith("FloatingPointError: step ")
        else:
            assert (trial.state, trial.value) == ("complete", best_in_run(folder, trial))
            assert load_config(run / "config.yaml").train.lr == float(trial.words["train.lr"])
    assert {trial.state for trial in trials} == {"complete", "failed"}
    best = best_of(trials)
    assert best is not None and best.value == max(trial.value for trial in trials if trial.value is not None)

    config = load_config(folder / "best.yaml")
    assert (config.train.lr, config.train.epochs, config.run.dir) == (
        float(best.words["train.lr"]),
        1,
        str(folder / "best"),
    )
    assert f"best: trial {best.number}, validation {METRIC} {best.value:.6f}" in result.stdout
    status = run_module("launch.sweep", *words, "--status").stdout
    assert status in result.stdout
    command = status.splitlines()[-1].split(" -m ", 1)[1].split()
    assert run_module(*command).returncode == 0
    assert max(record[METRIC] for record in records(folder / "best", "valid")) == best.value

    journal = (folder / "journal.log").read_bytes()
    assert run_module("launch.sweep", *words).returncode == 0  # it is over: nothing is trained
    assert (folder / "journal.log").read_bytes() == journal


@pytest.mark.slow
def test_all_trials_fail(shop: Path) -> None:
    path = write_space(shop, trials=1, parameters={"train.lr": {"low": 1e30, "high": 2e30}})
    result = run_module("launch.sweep", path, "--cluster", "local", "--folder", shop / "failing")
    assert result.returncode == 1
    assert result.stderr == "error: all trials failed\n" and "FloatingPointError: step" in result.stdout
    assert not (shop / "failing" / "best.yaml").exists()


@contextmanager
def worker_of(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Worker 0; in the end everything that it has started is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.sweeps.worker", str(folder), "0"],
        cwd=REPOSITORY,
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        kill(family(process))
        process.wait()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)


def wait_for_steps(run: Path, least: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not records(run) or records(run)[-1]["step"] < least:
        assert time.monotonic() < deadline, f"{run} has not come to step {least}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_that_is_stopped_or_killed_goes_on_with_its_trial(shop: Path) -> None:
    """TERM, then kill -9 of the worker alone, then of all: the trial is one run, trained on, and counted once."""
    path, folder = write_space(shop, trials=2, fixed=LONG), shop / "killed"
    sweep.require_store(begin(path, folder)[0])
    run = folder / "trial-0000"
    with worker_of(folder) as process:
        wait_for_steps(run, 40)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (folder / "worker-0.stopped").read_text() == "TERM\n"
    assert "stopped by a signal; the trial goes on when its worker is started again" in output
    assert "stopped by a signal" in run.with_suffix(".log").read_text()
    begun = trials_of(folder)
    assert [(trial.number, trial.state, trial.value) for trial in begun] == [(0, "running", None)]
    assert not (run / "evaluation.json").exists()

    with worker_of(folder) as process:
        wait_for_steps(run, records(run)[-1]["step"] + 40)
        everybody = family(process)
        process.kill()
        process.wait()
        words = [path, "--cluster", "local", "--folder", folder]
        assert "worker 0 of" in refusal(sweep.main, *words)  # what it trains is alive
        kill(everybody)
    assert trials_of(folder) == begun

    with worker_of(folder) as process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    trials = trials_of(folder)
    assert [(trial.number, trial.worker, trial.state) for trial in trials] == [(0, 0, "complete"), (1, 0, "complete")]
    starts = [int(step) for step in re.findall(r"from step (\d+) to", run.with_suffix(".log").read_text())]
    assert starts[0] == 0 and 40 <= starts[1] < starts[2]
    assert [record["step"] for record in records(run)][-1] == 280
    assert [trial.value for trial in trials] == [best_in_run(folder, trial) for trial in trials]


@pytest.mark.slow
def test_an_interrupted_local_sweep_ends_its_workers(shop: Path) -> None:
    """In one line, with its trial saved; nothing of it lives on."""
    path, folder = write_space(shop, trials=1, fixed=LONG), shop / "interrupted"
    sweep.require_store(begin(path, folder)[0])
    command = [sys.executable, "-m", "launch.sweep", str(path), "--cluster", "local", "--folder", str(folder)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_steps(folder / "trial-0000", 20)
        everybody = family(process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        kill(family(process))
    assert (process.returncode, output) == (128 + signal.SIGINT, "stopped; the same command goes on\n")
    assert [other for other in everybody if other.is_running()] == []
    assert (folder / "worker-0.stopped").exists()
    assert trials_of(folder)[0].state == "running"
