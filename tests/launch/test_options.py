"""The grammar of ``--sbatch``, which launch.submit and launch.sweep share."""

from __future__ import annotations

import argparse

import pytest

from fmrl_dist.base.errors import UserError
from launch.slurm.chain import JOB_STAGES
from launch.slurm.options import add_sbatch_option, parse_sbatch


def test_options_for_all_stages_and_for_one() -> None:
    arguments = ["time=60", "requeue", "train:time=1-00:00:00", "join:mem=1G", "comment=a=b"]
    options = parse_sbatch(arguments, JOB_STAGES)
    for_all = {"time": "60", "requeue": "", "comment": "a=b"}
    assert options["train"] == for_all | {"time": "1-00:00:00"}
    assert options["join"] == for_all | {"mem": "1G"}
    assert options["shards"] == options["evaluate"] == options["export"] == for_all


def test_several_values_and_repeated_options_are_the_same() -> None:
    parser = argparse.ArgumentParser()
    add_sbatch_option(parser, JOB_STAGES)
    joint = parser.parse_args(["--sbatch", "time=60", "train:nodes=4"])
    repeated = parser.parse_args(["--sbatch", "time=60", "--sbatch", "train:nodes=4"])
    assert joint.sbatch == repeated.sbatch == ["time=60", "train:nodes=4"]
    assert parser.parse_args([]).sbatch == []


EXPECTED = "expected [STAGE:]OPTION[=VALUE] with a long option of sbatch, such as time=120 or encode:mem=8G; stages: "


@pytest.mark.parametrize("argument", ["--time=3", "-p", "7", "time=", "tarin:time=3", ":time=3", "Time=3", ""])
def test_malformed_arguments(argument: str) -> None:
    with pytest.raises(UserError) as error:
        parse_sbatch(["exclusive", argument], JOB_STAGES)
    assert str(error.value) == f"--sbatch {argument}: {EXPECTED}encode, shards, train, evaluate, join, export"


@pytest.mark.parametrize("argument", ["array=0-3", "train:array=0-3", "wrap=true", "nodes=2"])
def test_what_the_command_sets_itself(argument: str) -> None:
    name = argument.partition("=")[0].rpartition(":")[2]
    with pytest.raises(UserError) as error:
        parse_sbatch([argument], JOB_STAGES, also_reserved=("nodes",))
    assert str(error.value) == f"--sbatch {argument}: the command sets {name} itself; leave it out"
    assert parse_sbatch(["nodes=2"], JOB_STAGES)["train"] == {"nodes": "2"}
