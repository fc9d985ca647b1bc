"""How ``launch/train.slurm`` ends once its step has: by what the run's own state says, not by links or evaluations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmrl_dist.base.files import json_sha256
from tests.fixtures.processes import REPOSITORY, clean_environment

SCONTROL = "#!/bin/bash\necho \"$*\" >> asked\necho ' JobId=7 JobState=RUNNING PreemptTime=None '\n"


def save_checkpoint(run: Path, step: int) -> str:
    """A checkpoint that is all record, with no link to it; returns the record's hash."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    record = {"state": {"step": step, "best_step": step}}
    sha256 = json_sha256(record)
    (folder / "state.json").write_text(json.dumps(record | {"sha256": sha256}))
    return sha256


def end_of_job(folder: Path, step: str = "") -> subprocess.CompletedProcess[str]:
    """The script on a node of its own whose step is a line of shell; the run is ``folder / "run"``."""
    srun = f"#!/bin/bash\n[[ $* == *start_node* ]] || exit 0\n{step}\n"
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    variables |= {"FMRL_ROOT": str(folder), "FMRL_VENV": sys.prefix, "PATH": f"{folder}:{os.environ['PATH']}"}
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    return subprocess.run(
        ["bash", "launch/train.slurm", str(REPOSITORY / "configs/demo.yaml"), "--run.dir", "run"],
        cwd=folder,
        env=clean_environment() | variables | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("is_finished", "status"), [(False, 143), (True, 0)])
def test_a_job_completes_with_its_run(is_finished: bool, status: int, tmp_path: Path) -> None:
    """An evaluation of a run that was stopped does not start the next stage of a chain."""
    sha256 = save_checkpoint(tmp_path / "run", 77)
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    if is_finished:
        (tmp_path / "run" / "finished.json").write_text(json.dumps({"latest_sha256": sha256}))
    result = end_of_job(tmp_path)
    assert (result.returncode, result.stderr) == (status, "")


@pytest.mark.parametrize(("step", "is_requeued"), [(20, True), (10, False)])
def test_progress_is_seen_without_links(step: int, is_requeued: bool, tmp_path: Path) -> None:
    """Two lives have ended at step 10; this one ends there too, or later."""
    save_checkpoint(tmp_path / "run", step)
    (tmp_path / "run" / "lives").write_text("job 7 at step-00000010\n" * 2)
    result = end_of_job(tmp_path, "touch run/requeue")
    assert ("requeue 7" in (tmp_path / "asked").read_text().splitlines()) == is_requeued
    assert result.returncode == (0 if is_requeued else 2)
    if not is_requeued:
        assert "the time limit has ended job 7 at step-00000010 three times" in result.stderr
