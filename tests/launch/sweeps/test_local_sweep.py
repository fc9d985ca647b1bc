"""Sweeps on this machine: to the end, interrupted, and with workers that are stopped or killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fmrl_dist.config.loading import load_config
from launch import sweep
from launch.local.processes import is_alive, process_tree, send_signal
from launch.sweeps.folder import run_of
from launch.sweeps.study import best_of
from launch.sweeps.worker import failure_in
from tests.fixtures.demo_runs import METRIC, NUM_STEPS, STEPS_PER_EPOCH, has_pending, ignoring, paused, wait_for
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.sweeps import best_in_run, start_sweep_on_store, trials_of, write_space
from tests.fixtures.training import records, refusal, run_module


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
        ("", "exit code -9 and no output"),
    ],
)
def test_why_a_trial_failed(log: str, why: str) -> None:
    assert failure_in(log, -9) == why


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data and the store that these sweeps share."""
    return tmp_path_factory.mktemp("sweep")


@pytest.mark.slow
def test_a_local_sweep(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers to the end: the store is built once, each trial trained once, its value its run's; some fail."""
    folder = shop / "local"
    choices = {"train.lr": {"choices": [0.001, 0.01, 1e30]}}
    path = write_space(shop, trials=4, parameters=choices, sampler={"seed": 3}, fixed={"train.epochs": 1})
    arguments = [str(path), "--cluster", "local", "--folder", str(folder)]
    result = run_module("launch.sweep", *arguments, "--workers", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("building the demo store") == 1 and result.stderr == ""
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(4))
    assert {trial.worker for trial in trials} == {0, 1}
    for trial in trials:
        run = run_of(folder, trial)
        assert run.with_suffix(".log").read_text().count(f"from step 0 to at most {STEPS_PER_EPOCH}") == 1
        if trial.parameters["train.lr"] == "1e+30":
            assert trial.state == "failed" and trial.why.startswith("error: step ")
        else:
            assert (trial.state, trial.value) == ("complete", best_in_run(folder, trial))
            assert load_config(run / "config.yaml").train.lr == float(trial.parameters["train.lr"])
    assert {trial.state for trial in trials} == {"complete", "failed"}
    best = best_of(trials)
    assert best is not None and best.value == max(trial.value for trial in trials if trial.value is not None)

    config = load_config(folder / "best.yaml")
    assert config.train.lr == float(best.parameters["train.lr"])
    assert (config.train.epochs, config.run.dir) == (1, str(folder / "best"))
    assert f"best: trial {best.number}, validation {METRIC} {best.value:.6f}" in result.stdout
    capsys.readouterr()
    sweep.main([*arguments, "--status"])
    status = capsys.readouterr().out
    assert status in result.stdout
    command = status.splitlines()[-1].split(" -m ", 1)[1].split()
    assert run_module(*command).returncode == 0
    assert max(record[METRIC] for record in records(folder / "best", "valid")) == best.value

    journal = (folder / "journal.log").read_bytes()
    sweep.main(arguments)  # the sweep is over: nothing is trained
    assert (folder / "journal.log").read_bytes() == journal


@contextmanager
def worker_of(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Worker 0; at the end everything that it has started is gone."""
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
        if process.poll() is None:
            send_signal(process_tree(psutil.Process(process.pid)), signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_worker_that_is_stopped_or_killed_resumes_its_trial(shop: Path) -> None:
    """TERM, then kill -9 of the worker alone, then of all: the trial is one resumed run, and is counted once."""
    path, folder = write_space(shop, trials=1), shop / "killed"
    start_sweep_on_store(path, folder)
    run = folder / "trial-0000"
    with worker_of(folder) as process:
        with paused(run, 20):
            process.terminate()
            wait_for("TERM", lambda: has_pending(run, signal.SIGTERM))
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (folder / "worker-0.stopped").read_text() == "TERM\n"
    assert "stopped by a signal; the trial resumes when its worker is started again" in output
    assert "stopped by a signal" in run.with_suffix(".log").read_text()
    started = trials_of(folder)
    assert [(trial.number, trial.state, trial.value) for trial in started] == [(0, "running", None)]
    assert not (run / "evaluation.json").exists()

    with worker_of(folder) as process, paused(run, 60):
        everything = process_tree(psutil.Process(process.pid))
        process.kill()
        process.wait()
        complaint = refusal(sweep.main, path, "--cluster", "local", "--folder", folder)
        assert f"worker 0 of {folder}, or a training that it started, is running" in complaint
        send_signal(everything, signal.SIGKILL)
    wait_for("the end of all", lambda: not any(map(is_alive, everything)))
    assert trials_of(folder) == started

    with worker_of(folder) as process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    (trial,) = trials_of(folder)
    assert (trial.number, trial.worker, trial.state) == (0, 0, "complete")
    starts = [int(step) for step in re.findall(r"from step (\d+) to", run.with_suffix(".log").read_text())]
    assert starts[0] == 0 and 20 <= starts[1] < starts[2]
    assert [record["step"] for record in records(run)] == list(range(1, NUM_STEPS + 1))
    assert trial.value == best_in_run(folder, trial)


@pytest.mark.slow
def test_an_interrupted_local_sweep_ends_its_workers(shop: Path) -> None:
    """Started with INT ignored, it ends by INT, in one line, with its trial saved; no process is left."""
    path, folder = write_space(shop, trials=1), shop / "interrupted"
    start_sweep_on_store(path, folder)
    command = [sys.executable, "-m", "launch.sweep", str(path), "--cluster", "local", "--folder", str(folder)]
    process = subprocess.Popen(
        [*ignoring(signal.SIGINT), *command],
        cwd=REPOSITORY,
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = folder / "trial-0000"
    everything: list[psutil.Process] = []
    try:
        with paused(run, 20):
            everything = process_tree(psutil.Process(process.pid))
            process.send_signal(signal.SIGINT)
            wait_for("TERM", lambda: has_pending(run, signal.SIGTERM))
        output, _ = process.communicate(timeout=60)
    finally:
        send_signal(everything, signal.SIGKILL)
        process.wait()
    assert (process.returncode, output) == (128 + signal.SIGINT, "stopped; run the same command to resume\n")
    assert len(everything) >= 3 and [other for other in everything if is_alive(other)] == []
    assert (folder / "worker-0.stopped").read_text() == "TERM\n"
    assert "stopped by a signal" in run.with_suffix(".log").read_text()
    assert trials_of(folder)[0].state == "running"
