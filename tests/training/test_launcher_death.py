"""A launcher that dies takes its trainers with it, after they have saved: real launchers, TERM and KILL."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.local.processes import is_alive
from tests.fixtures.demo_runs import last_step, wait_for
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import STEPS_PER_EPOCH, make_shop


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize(("num_processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGKILL), (2, signal.SIGKILL)])
def test_trainers_save_and_end(num_processes: int, number: signal.Signals, tmp_path: Path) -> None:
    config, run, log = make_shop(tmp_path), tmp_path / "run", tmp_path / "log"
    options = f"--num_machines 1 --num_processes {num_processes} --mixed_precision no --dynamo_backend no".split()
    options += ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
    words = ["--config", str(config), "--run.dir", str(run), "--train.epochs", "100000"]
    variables = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [str(Path(sys.executable).with_name("accelerate-launch")), *options, "-m", "fmrl_dist.train", *words],
            cwd=tmp_path,
            env=clean_environment() | variables,
            stdout=output,
            stderr=output,
        )
    everybody: list[psutil.Process] = []
    try:
        wait_for("training", lambda: last_step(run) > STEPS_PER_EPOCH or launcher.poll() is not None)
        everybody = psutil.Process(launcher.pid).children(recursive=True)
        assert len(everybody) >= 2 * num_processes  # trainers and their readers
        launcher.send_signal(number)
        assert launcher.wait(60) == -number
        wait_for("the trainers' end", lambda: not any(map(is_alive, everybody)), timeout_s=60)
    finally:
        launcher.kill()
        for process in filter(is_alive, everybody):
            process.kill()
    text = log.read_text()
    told = text.count(f"the launcher (process {launcher.pid}) has ended; this process ends too")
    assert 1 <= told <= num_processes  # the first to notice stops the others, perhaps before they have noticed
    assert "stopped by a signal; resume with --resume auto" in text and "Traceback" not in text
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{last_step(run):08d}"
