"""A command ends with the launcher that started it, and with nothing else: real processes and signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fmrl_dist.base.parent_process import is_launcher
from launch.local.processes import is_alive
from tests.fixtures.demo_runs import wait_for
from tests.fixtures.processes import REPOSITORY, clean_environment

# As accelerate's launcher of one process: it waits, and passes no signal on.
STARTER = "import subprocess, sys\nsubprocess.Popen(sys.argv[1:]).wait()\n"
COMMAND = """
import os, signal, time
from fmrl_dist.base import errors, parent_process
parent_process.POLL_S = 0.02
def main(argv):
    print("started", flush=True)
    time.sleep(60)
{then}
"""
RUN = "errors.run_command(main)"
LATE = "parent = os.getppid()\nprint('started', flush=True)\nwhile os.getppid() == parent: time.sleep(0.02)\n" + RUN
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nparent_process.end_with_launcher(grace_s=0.3)\nmain([])"


def start(folder: Path, starter: str, then: str) -> tuple[subprocess.Popen[bytes], psutil.Process, Path]:
    """A program named ``starter``, the command that it has started, and the log of both."""
    (folder / starter).write_text(STARTER)
    command = [sys.executable, "-c", COMMAND.format(then=then)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(folder / starter), *command],
            cwd=REPOSITORY,
            env=clean_environment() | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_MIXED_PRECISION": "no"},
            stdout=output,
            stderr=output,
        )
    wait_for("the command's start", lambda: "started" in log.read_text())
    (child,) = psutil.Process(process.pid).children()
    return process, child, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("then", [RUN, LATE], ids=["while it runs", "before it watches"])
def test_a_command_ends_when_its_launcher_has_died(number: signal.Signals, then: str, tmp_path: Path) -> None:
    launcher, child, log = start(tmp_path, "accelerate", then)
    launcher.send_signal(number)
    assert launcher.wait(10) == -number
    wait_for("the command's end", lambda: not is_alive(child), timeout_s=20)
    lines = log.read_text().splitlines()
    assert f"the launcher (process {launcher.pid}) has ended; this process ends too" in lines
    assert lines[-1] == "ended by SIGTERM"


def test_one_that_does_not_end_is_ended(tmp_path: Path) -> None:
    launcher, child, _ = start(tmp_path, "torchrun", STUBBORN)
    launcher.kill()
    launcher.wait()
    wait_for("the command's end", lambda: not is_alive(child), timeout_s=20)


def test_a_command_outlives_what_is_no_launcher(tmp_path: Path) -> None:
    """Such as a shell, whose user has also set a variable that launchers set."""
    shell, child, log = start(tmp_path, "shell", RUN)
    try:
        shell.kill()
        shell.wait()
        wait_for("another parent", lambda: child.ppid() != shell.pid)
        with pytest.raises(psutil.TimeoutExpired):
            child.wait(0.5)
        assert log.read_text() == "started\n"
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /venv/bin/accelerate launch -m fmrl_dist.train", True),
        ("python /venv/bin/accelerate-launch --num_processes 1 -m fmrl_dist.train", True),
        ("/venv/bin/python -u /venv/bin/torchrun --nproc-per-node 2 -m fmrl_dist.train", True),
        ("accelerate launch train.py", True),
        ("python -m accelerate.commands.launch -m fmrl_dist.train", True),
        ("python -u -m deepspeed.launcher.launch train.py", True),
        ("python -m torch.distributed.run -m fmrl_dist.train", True),
        ("python -m launch.sweeps.worker runs/sweep 0", True),
        ("bash -c accelerate launch", False),
        ("bash", False),
        ("-bash", False),
        ("python -m fmrl_dist.train --run.dir accelerate", False),
        ("python -m pytest accelerate", False),
        ("make train", False),
        ("tmux new-session -d accelerate launch", False),
        ("", False),
    ],
)
def test_what_a_launcher_is(command: str, expected: bool) -> None:
    assert is_launcher(command.split()) == expected
