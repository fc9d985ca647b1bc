"""``launch/environment.sh``: the variables that a job's processes get from SLURM's and from ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.processes import REPOSITORY

BASE = {
    **{"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "7"},
    **{"FMRL_VENV": sys.prefix, "PATH": os.environ["PATH"]},
}


def source(script: str | Path = "launch/environment.sh", **variables: str) -> dict[str, str]:
    """The environment after ``source launch/environment.sh`` in one of ``variables``."""
    command = ["bash", "-euo", "pipefail", "-c", f"source {script}; env -0"]
    result = subprocess.run(command, cwd=REPOSITORY, env=BASE | variables, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if line)


def test_programs_come_from_the_virtual_environment() -> None:
    assert source()["PATH"] == f"{sys.prefix}/bin:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, "1"),
        ({"SLURM_GPUS_ON_NODE": "0"}, "1"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "4"),
        ({"SLURM_GPUS_ON_NODE": "4", "FMRL_PROCESSES_PER_NODE": "2"}, "2"),
    ],
)
def test_processes_per_node(variables: dict[str, str], processes: str) -> None:
    assert source(**variables)["FMRL_PROCESSES_PER_NODE"] == processes


def test_a_number_of_processes_that_follows_the_gpus_differs_from_a_given_one() -> None:
    assert source(SLURM_GPUS_ON_NODE="4")["FMRL_GPUS_PER_NODE"] == "4"
    assert "FMRL_GPUS_PER_NODE" not in source(SLURM_GPUS_ON_NODE="4", FMRL_PROCESSES_PER_NODE="4")


def test_a_step_gets_all_variables_whatever_sbatch_passed_on() -> None:
    assert source(SLURM_EXPORT_ENV="NONE")["SLURM_EXPORT_ENV"] == "ALL"


def test_a_missing_deepspeed_file() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        source(FMRL_DEEPSPEED="zero.json")
    assert refused.value.returncode == 2
    assert refused.value.stderr == (
        f"error: FMRL_DEEPSPEED is zero.json, which is not a file in {REPOSITORY}; "
        "expected one such as launch/deepspeed/zero2.json\n"
    )


def test_a_job_that_runs_elsewhere_than_it_was_submitted_says_so(tmp_path: Path) -> None:
    command = ["bash", "-euc", "source launch/environment.sh"]
    environment = BASE | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert result.stderr == f"submitted in {tmp_path}; this job runs in {REPOSITORY}, and relative paths start there\n"


def test_a_module_can_change_what_is_found_first(tmp_path: Path) -> None:
    """In the marked place, a module may use unset variables, and comes after the virtual environment in PATH."""
    text = (REPOSITORY / "launch" / "environment.sh").read_text()
    loaded = "# module load python/3.12 cuda/12.8\n"
    assert loaded in text
    script = tmp_path / "environment.sh"
    script.write_text(text.replace(loaded, "export PATH=/module$NOT_SET/bin:$PATH\n"))
    assert source(script)["PATH"] == f"{sys.prefix}/bin:/module/bin:{os.environ['PATH']}"


def test_a_task_gets_the_cores_that_the_job_requested() -> None:
    assert source(SLURM_CPUS_PER_TASK="6")["SRUN_CPUS_PER_TASK"] == "6"


def test_the_network_interface_is_set_for_gloo_and_nccl_or_left_to_them() -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    named, left = source(FMRL_INTERFACE="ib0"), source()
    assert [named[name] for name in names] == ["ib0", "ib0"]
    assert not set(names) & set(left)
