"""Jobs of this machine end with everything they have started, whatever signals they ignore."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from launch.local.processes import LocalJob, end_jobs, is_alive, send_signal
from launch.local.signals import EndedBySignal, ending_signals_raise
from tests.fixtures.demo_runs import ignoring, wait_for
from tests.fixtures.processes import REPOSITORY, clean_environment

# A child in the job's session, one in a session of its own, as launchers start their trainers; and the job waits.
FAMILY = "sleep 1000 & setsid sleep 1000 & echo ready; wait; wait"


def start(tmp_path: Path, script: str, *ignored: signal.Signals) -> LocalJob:
    """A job of bash that has come to ``echo ready``."""
    prefix = ignoring(*ignored) if ignored else []
    job = LocalJob([*prefix, "bash", "-c", script], tmp_path / "jobs" / "job_log.out")
    wait_for("ready", lambda: "ready" in job.log.read_text())
    return job


def assert_gone(job: LocalJob, family: list[psutil.Process]) -> None:
    assert [process for process in family if is_alive(process)] == []
    assert job.processes() == []
    assert job.status is not None


def has_ended(job: LocalJob) -> bool:
    return job.status is not None


def test_status_and_log(tmp_path: Path) -> None:
    """A new log replaces an older one; nothing is read from the terminal."""
    log = tmp_path / "new" / "log"
    for _ in range(2):
        job = LocalJob(["bash", "-c", "echo out; echo err >&2; cat; exit 3"], log)
        wait_for("the end", partial(has_ended, job))
        assert (job.status, log.read_text()) == (3, "out\nerr\n")


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT,)], ids=["usual", "SIGINT ignored"])
def test_a_job_ends_with_everything_it_has_started(ignored: tuple[signal.Signals, ...], tmp_path: Path) -> None:
    job = start(tmp_path, FAMILY, *ignored)
    family = job.processes()
    assert len(family) == 3
    start_s = time.monotonic()
    end_jobs([job], grace_s=30)
    assert time.monotonic() - start_s < 10
    assert_gone(job, family)


def test_a_job_that_ignores_term_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    job = start(tmp_path, FAMILY, signal.SIGINT, signal.SIGTERM)
    family, start_s = job.processes(), time.monotonic()
    end_jobs([job], grace_s=0.5)
    assert time.monotonic() - start_s >= 0.5
    assert job.status == -signal.SIGKILL
    assert_gone(job, family)


def test_a_job_has_time_to_save(tmp_path: Path) -> None:
    job = start(tmp_path, "trap 'sleep 0.5; echo saved; exit' TERM; echo ready; while true; do sleep 0.1; done")
    end_jobs([job], grace_s=30)
    assert job.log.read_text().splitlines()[-1] == "saved"
    assert job.status == 0


def test_what_outlives_the_command_is_ended_too(tmp_path: Path) -> None:
    job = start(tmp_path, "sleep 1000 & echo ready")
    wait_for("the command's end", lambda: job.status == 0)
    (sleeper,) = job.processes()
    end_jobs([job], grace_s=30)
    assert_gone(job, [sleeper])


def test_a_second_signal_ends_the_grace_period(tmp_path: Path) -> None:
    job = start(tmp_path, FAMILY, signal.SIGTERM)
    family, start_s = job.processes(), time.monotonic()
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    threading.Timer(0.3, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    with pytest.raises(EndedBySignal) as ended, ending_signals_raise():
        end_jobs([job], grace_s=60)
    assert time.monotonic() - start_s < 30
    assert ended.value.code == 130
    assert_gone(job, family)


COMMAND = """
import sys
from pathlib import Path
from fmrl_dist.base.errors import run_command
from launch.local.signals import ENDING, listening
from launch.submit import run_local_job

def main(argv):
    with listening(ENDING) as signals:
        run_local_job("train", ["bash", "-c", "echo $$; sleep 1000; true"], Path(argv[0]), signals)

run_command(main)
"""


@pytest.mark.parametrize("stdout", ["pipe", "terminal"])
def test_a_command_whose_terminal_is_gone_ends_its_job(stdout: str, tmp_path: Path) -> None:
    """What is written to the terminal then raises an error."""
    log, (terminal, ours) = tmp_path / "log", pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(log)],
        cwd=REPOSITORY,
        env=clean_environment(),
        stdout=subprocess.PIPE if stdout == "pipe" else ours,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    ) as command:
        os.close(ours)
        wait_for("the job", lambda: log.exists() and log.read_text().endswith("\n"))
        job = psutil.Process(int(log.read_text()))
        family = [job, *job.children()]
        try:
            os.close(terminal)
            os.kill(command.pid, signal.SIGHUP)
            assert command.wait(timeout=30) == 128 + (signal.SIGHUP if stdout == "pipe" else signal.SIGPIPE)
            assert [process for process in family if is_alive(process)] == []
        finally:
            send_signal(family, signal.SIGKILL)


def test_another_process_with_the_same_id_is_left_alone(tmp_path: Path) -> None:
    """The kernel reuses the id of a job that has ended."""
    job = LocalJob(["true"], tmp_path / "log")
    wait_for("the end", lambda: job.status is not None)
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as other:
        job._process.pid = other.pid
        assert job.processes() == []
        end_jobs([job], grace_s=0)
        assert other.poll() is None
        other.kill()
