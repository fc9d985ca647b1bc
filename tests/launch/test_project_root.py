"""Where the batch scripts find their project: SLURM runs a copy of them, in the folder where the job was submitted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.processes import REPOSITORY

SCRIPTS = ("train", "eval", "export", "recommend", "shards", "sweep")
ARGUMENTS = ["configs/demo.yaml", "--a", "b  c"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose jobs do nothing but say where they run."""
    return make_project(tmp_path / "my project")


def make_project(folder: Path) -> Path:
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "environment.sh").write_text('echo "runs in $PWD"\nexit 0\n')
    for name in SCRIPTS:
        shutil.copy(REPOSITORY / "launch" / f"{name}.slurm", folder / "launch")
    return folder


def run_job(
    script: Path, command: str, submitted_in: Path, root: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script as SLURM does; ``command`` is the one that SLURM says was submitted."""
    spool, programs = submitted_in / "spool" / "job00007", submitted_in / "programs"
    for folder in (spool, programs):
        folder.mkdir(parents=True)
    shutil.copy(script, spool / "slurm_script")
    (programs / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\nJobId=7\n   Command={command}\n   WorkDir=/\nEND\n")
    (programs / "scontrol").chmod(0o755)
    variables = {"SLURM_SUBMIT_DIR": str(submitted_in), "SLURM_JOB_ID": "7"} | ({"FMRL_ROOT": root} if root else {})
    return subprocess.run(
        ["bash", spool / "slurm_script", *ARGUMENTS],
        cwd=submitted_in,
        env=variables | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_from_any_folder(name: str, project: Path, tmp_path: Path) -> None:
    script = project / "launch" / f"{name}.slurm"
    for number, command in enumerate((script, os.path.relpath(script, tmp_path / "0"))):
        elsewhere = tmp_path / str(number)
        elsewhere.mkdir()
        result = run_job(script, f"{command} {' '.join(ARGUMENTS)}", elsewhere)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"runs in {project}\n", "")


@pytest.mark.parametrize("command", ["SOMEWHERE/own.slurm configs/demo.yaml --a b  c", "(null)", ""])
def test_a_copy_of_a_script_runs_where_it_is_submitted(command: str, project: Path, tmp_path: Path) -> None:
    """Also one that sbatch has read from a pipe."""
    result = run_job(project / "launch" / "train.slurm", command.replace("SOMEWHERE", str(tmp_path)), project)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"runs in {project}\n", "")


def test_the_scripts_own_project_comes_before_another(project: Path, tmp_path: Path) -> None:
    other = make_project(tmp_path / "other")
    script = project / "launch" / "train.slurm"
    result = run_job(script, f"{script} {' '.join(ARGUMENTS)}", other)
    assert result.stdout == f"runs in {project}\n"


def test_a_given_root_comes_first(project: Path, tmp_path: Path) -> None:
    other = make_project(tmp_path / "other")
    script = project / "launch" / "train.slurm"
    result = run_job(script, f"{script} {' '.join(ARGUMENTS)}", project, root=str(other))
    assert result.stdout == f"runs in {other}\n"


@pytest.mark.parametrize("root", [None, "/nonexistent"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_project(name: str, root: str | None, project: Path, tmp_path: Path) -> None:
    """A root that is given is not replaced by another."""
    script = project / "launch" / f"{name}.slurm"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = f"{script if root else elsewhere / 'own.slurm'} {' '.join(ARGUMENTS)}"
    result = run_job(script, command, elsewhere, root)
    assert (result.returncode, result.stdout) == (2, "")
    mend = "submit from the project's root, or set FMRL_ROOT to it"
    assert result.stderr == f"error: no launch/environment.sh in {root or elsewhere}; {mend}\n"


def test_a_job_of_a_chain_runs_its_script_itself(project: Path) -> None:
    """The batch script is submitit's; ours is started by its path."""
    command = ["bash", "launch/train.slurm", *ARGUMENTS]
    environment = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"], "FMRL_ROOT": ""}
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert result.stdout == f"runs in {project}\n"
