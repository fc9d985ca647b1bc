"""Processes that end with the one that started them: a worker with its process, a run with its launcher.

A launcher that is killed, or that does not pass TERM on (``accelerate launch`` with one process), would leave its
trainers running without anyone who knows of them. Only what a launcher has started ends with its parent: a command that
a shell has started outlives the shell, as ``nohup`` and ``disown`` promise.

Import this module before anything that takes long: what it notes about the parent must be from before it could end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_PROGRAMS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed")
LAUNCHER_MODULES = (
    *("accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
    *("torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch", "deepspeed.launcher.runner"),
    *("launch.submit", "launch.sweep", "launch.sweeps.worker"),
)
POLL_S = 0.5
GRACE_S = 300.0  # from the launcher's end to this process' own, for a step and a checkpoint


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, the process that started it, has ended.

    A worker whose parent was killed would otherwise wait for ever to write the rest of a message, or to read one, and
    hold the standard output that it inherited. Only Linux offers this; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher(grace_s: float = GRACE_S) -> None:
    """Send this process TERM once the launcher that started it has ended; end it if it still runs after ``grace_s``.

    Nothing happens where something else has started it, such as a shell. The kernel's own signal at a parent's death is
    not used: it comes when the parent's *thread* ends.
    """
    if _LAUNCHER:
        threading.Thread(target=_end_after, args=(_LAUNCHER, grace_s), name="launcher-watch", daemon=True).start()


def _end_after(launcher: int, grace_s: float) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_S)
    with contextlib.suppress(OSError):  # nobody may be left to read it
        os.write(2, f"the launcher (process {launcher}) has ended; this process ends too\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(128 + signal.SIGTERM)


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line starts one of the programs that start trainers and wait for them."""
    first = next((number for number, word in enumerate(command) if number and not word.startswith("-")), 0)
    option = command[first - 1] if first else ""
    if option in ("-m", "-c"):
        return option == "-m" and command[first] in LAUNCHER_MODULES
    return any(Path(word).name in LAUNCHER_PROGRAMS for word in (*command[:1], *command[first : first + 1]))


def _launching_parent() -> int:
    """The id of the process that started this one, if that is a launcher; else 0. Linux alone tells."""
    parent = os.getppid()
    try:
        command = os.fsdecode(Path(f"/proc/{parent}/cmdline").read_bytes()).split("\0")
    except OSError:
        return 0
    return parent if is_launcher(command) else 0


_LAUNCHER = _launching_parent()
