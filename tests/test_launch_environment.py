"""``launch/environment.sh``: what a job's processes get from SLURM's variables and from ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import REPOSITORY

BASE = {
    **{"SLURM_SUBMIT_DIR": "/shared/fmrl-dist", "SLURM_JOB_ID": "7"},
    **{"FMRL_VENV": sys.prefix, "PATH": os.environ["PATH"]},
}


def source(**variables: str) -> dict[str, str]:
    """The environment after ``source launch/environment.sh`` in one of ``variables``."""
    command = ["bash", "-euo", "pipefail", "-c", "source launch/environment.sh; env -0"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=BASE | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if line)


def test_programs_are_those_of_the_virtual_environment() -> None:
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


def test_a_task_gets_the_cores_that_the_job_asked_for() -> None:
    assert source(SLURM_CPUS_PER_TASK="6")["SRUN_CPUS_PER_TASK"] == "6"


def test_network_interface_is_named_for_gloo_and_nccl_or_left_to_them() -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    named, left = source(FMRL_INTERFACE="ib0"), source()
    assert [named[name] for name in names] == ["ib0", "ib0"]
    assert not set(names) & set(left)
