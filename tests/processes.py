"""Tests in several processes: :func:`run_processes` for collectives, :func:`launch` for commands.

Each rank is an ordinary subprocess (``python -m tests.processes``) with the environment a launcher would give it. It
joins a gloo group, calls the function and leaves its result as JSON, in which float64 survives exactly.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent
TAIL_CHARACTERS = 4000
POLL_S = 0.05
START_S = 120.0  # for all ranks to import torch and meet
GRACE_S = 5.0  # for a hung rank to write where it stands
IN_COLLECTIVE = "torch/distributed/"  # in a stack: the rank is inside the process group
LAUNCH_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"}
LAUNCH_PREFIXES = ("MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")


def is_launch_variable(name: str) -> bool:
    """Whether a launcher sets environment variable ``name``, so that tests must not inherit it."""
    return name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES)


def clean_environment() -> dict[str, str]:
    """A copy of the environment without what launchers set."""
    return {name: value for name, value in os.environ.items() if not is_launch_variable(name)}


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_processes(
    num_processes: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120
) -> list[Any]:
    """Call ``function(*arguments)`` in ``num_processes`` gloo ranks on the CPU, one thread each.

    Args:
        num_processes: ranks to start.
        function: defined at the top of a test module; inside, the process group is up.
        arguments: what JSON can carry, as is the function's result.
        timeout_s: for all ranks together, from the moment they have met.

    Returns:
        The result of each rank, in rank order.

    Raises:
        AssertionError: a rank died or hung; the message names it and shows the end of what it wrote.
    """
    assert "<" not in function.__qualname__, f"{function.__qualname__} is not defined at the top of its module"
    call = [f"{function.__module__}:{function.__qualname__}", json.dumps(arguments), str(timeout_s)]
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        ranks = [_start_rank(rank, num_processes, port, call, folder) for rank in range(num_processes)]
        try:
            failed = _wait(ranks, timeout_s, folder)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        assert not failed, "\n".join(_describe(rank, what, folder) for rank, what in failed.items())
        return [json.loads(_result_path(folder, rank).read_text()) for rank in range(num_processes)]


def _start_rank(rank: int, num_processes: int, port: int, call: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = clean_environment() | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.processes", *call, str(folder)]
    with _log_path(folder, rank).open("wb") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float, folder: Path) -> dict[int, str]:
    """Wait for all ranks, or for the first failure; returns what went wrong, by rank."""
    met, deadline = False, time.monotonic() + START_S
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        failed = {rank: f"died with exit code {code}" for rank, code in enumerate(codes) if code}
        if failed or None not in codes:
            return failed
        if not met and all(_met_path(folder, rank).exists() for rank in range(len(ranks))):
            met, deadline = True, time.monotonic() + timeout_s
        time.sleep(POLL_S)
    hung = {rank: process for rank, process in enumerate(ranks) if process.poll() is None}
    for process in hung.values():
        process.send_signal(signal.SIGABRT)  # faulthandler writes where it stands
    for process in hung.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    return {rank: f"hung for {timeout_s if met else START_S} s" for rank in hung}


def _describe(rank: int, what: str, folder: Path) -> str:
    text = _log_path(folder, rank).read_text(errors="replace")
    if what.startswith("hung") and IN_COLLECTIVE in text:
        what += ", waiting for other ranks"
    return f"rank {rank} {what}:\n{text[-TAIL_CHARACTERS:]}"


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


def _met_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.met"


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def launch(
    num_processes: int | None,
    arguments: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    timeout_s: float = 240,
    config_file: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``accelerate launch … arguments`` on the CPU and return its exit code and output.

    Args:
        num_processes: ranks; 1 starts no process group. None: as many as ``config_file`` says.
        arguments: what follows, such as ``["-m", "fmrl_dist.train", "--config", path]``; the launcher's options first.
        environment: variables on top of the cleaned environment.
        cwd: where the command runs; the repository can be imported from everywhere.
        timeout_s: then the launcher and all its descendants are killed.
        config_file: of the launcher, which says what is started; None: DDP.

    Raises:
        AssertionError: it ran past ``timeout_s``; the message shows the end of what it wrote.
    """
    variables = clean_environment() | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    options = ["--main_process_port", "0"]
    if num_processes is not None:
        options += ["--num_processes", str(num_processes)]
    if config_file is not None:
        options += ["--config_file", str(config_file)]
    else:
        options += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        if num_processes != 1:  # `--cpu --num_processes 2` would silently start one process
            options += ["--multi_gpu"]
            variables["ACCELERATE_USE_CPU"] = "true"
    # `accelerate launch` without its imports: timm, where there is one, and so torchvision, fit for this torch or not.
    command = [str(Path(sys.executable).with_name("accelerate-launch")), *options, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=variables | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_tree(process.pid)
        stdout, stderr = process.communicate()
        tails = f"{stdout[-TAIL_CHARACTERS:]}\n{stderr[-TAIL_CHARACTERS:]}"
        raise AssertionError(f"{' '.join(command)} ran longer than {timeout_s} s:\n{tails}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _kill_tree(pid: int) -> None:
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _run_rank(target: str, arguments: str, timeout_s: str, folder: str) -> None:
    """One rank of :func:`run_processes`."""
    torch.set_num_threads(1)
    # Longer than the parent's patience, so that a rank that waits is told from the one that it waits for.
    dist.init_process_group("gloo", timeout=timedelta(seconds=2 * max(START_S, float(timeout_s))))
    rank = dist.get_rank()
    _met_path(Path(folder), rank).touch()
    module, name = target.split(":")
    value = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    _result_path(Path(folder), rank).write_text(json.dumps(value))
    dist.destroy_process_group()


if __name__ == "__main__":
    _run_rank(*sys.argv[1:])
