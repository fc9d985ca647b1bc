"""Which variables make a process one of several: a launcher's, all of them, and never MPI's alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.launch_variables import is_alone
from fmrl_dist.distributed.processes import without_starters_sizes
from tests.fixtures.processes import REPOSITORY, clean_environment

PROGRAM = """
import os
from fmrl_dist.distributed.processes import start_runtime
runtime = start_runtime(1, lanes=None)
print(runtime.world_size, runtime.rank, os.environ["PMI_SIZE"])
"""
LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_mpis_variables_do_not_make_one_process_one_of_several() -> None:
    """They stay as they are for what this process starts."""
    variables = {"PMI_SIZE": "4", "PMI_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    variables |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    alone = "is 4, but this is one process by itself; several start with accelerate launch --multi_gpu"
    assert result.stdout.splitlines() == [
        f"PMI_SIZE {alone} --num_processes N",
        f"OMPI_COMM_WORLD_SIZE {alone} --num_processes N",
        f"SLURM_STEP_NUM_TASKS {alone} --num_processes N",
        "1 0 4",
    ]


def test_a_launchers_process_says_nothing_of_mpi(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**LAUNCHED, "PMI_SIZE": "4", "MV2_COMM_WORLD_SIZE": "1"}
    before = dict(environment)
    assert not is_alone(environment)
    with without_starters_sizes(environment, alone=False):
        assert environment == LAUNCHED
    assert environment == before
    with without_starters_sizes(environment | {"PMI_SIZE": "1"}, alone=True):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"PMI_SIZE": "9"}])
def test_alone(environment: dict[str, str]) -> None:
    assert is_alone(environment)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"WORLD_SIZE": None}, "but not WORLD_SIZE; start the processes with accelerate launch, or unset these"),
        ({"RANK": None}, "but not RANK"),
        (
            {"MASTER_ADDR": None},
            "WORLD_SIZE '2', RANK '1', LOCAL_RANK '1', MASTER_PORT '29500' but not MASTER_ADDR",
        ),
        (
            dict.fromkeys(("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")),
            "'1' but not WORLD_SIZE, RANK, MASTER_A",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two'.*expected RANK to be a number below WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "expected RANK to be a number below WORLD_SIZE"),
        ({"RANK": "2"}, "expected RANK to be a number below WORLD_SIZE"),
        ({"RANK": "-1"}, "expected RANK to be a number below WORLD_SIZE"),
    ],
)
def test_half_a_launchers_variables(changes: dict[str, str | None], complaint: str) -> None:
    environment = {name: value for name, value in (LAUNCHED | changes).items() if value is not None}
    with pytest.raises(UserError, match=complaint):
        is_alone(environment)
