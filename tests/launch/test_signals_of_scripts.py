"""SLURM's TERM reaches a batch script and its steps at once (scancel, end of a grace time); the script waits for them.

If it ended first, SLURM would kill trainers that are still saving, and the job would count as failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.demo_runs import wait_for
from tests.fixtures.processes import REPOSITORY, clean_environment

# A step that saves until it is released, whatever signal comes; all other steps end at once.
SRUN = """#!/bin/bash
[[ $* == *start_node* ]] || exit 0
trap '' TERM
touch started
until [[ -e saved ]]; do sleep 0.02; done
{end}
"""
SCONTROL = "#!/bin/bash\necho ' JobId=7 JobState=RUNNING PreemptTime=None '\n"


@pytest.mark.parametrize("script", ["train", "sweep"])
def test_a_script_waits_for_its_step(script: str, tmp_path: Path) -> None:
    end = {"train": "", "sweep": "echo TERM > worker-0.stopped"}[script]  # as the worker does
    for name, text in {"srun": SRUN.format(end=end), "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    variables |= {"FMRL_ROOT": str(tmp_path), "FMRL_VENV": sys.prefix, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    arguments = {"train": [str(REPOSITORY / "configs/demo.yaml"), "--run.dir", "run"], "sweep": [".", "0"]}[script]
    process = subprocess.Popen(
        ["bash", f"launch/{script}.slurm", *arguments],
        cwd=tmp_path,
        env=clean_environment() | variables | {"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        wait_for("the step", lambda: (tmp_path / "started").exists() or process.poll() is not None)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert process.poll() is None
        (tmp_path / "saved").touch()
        assert process.wait(30) == 143
    finally:
        (tmp_path / "saved").touch()
        process.kill()
        process.wait()
