"""What a launcher's environment variables say: whether this process is one of several, and whether they can meet."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fmrl_dist.base.errors import UserError, require

# By which ranks meet, and find their device.
MEETING = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def refuse_one_process_trap(environment: os._Environ[str] | dict[str, str]) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process: it sets MASTER_ADDR and no WORLD_SIZE."""
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "several processes were requested but one was started (accelerate launch --cpu does that silently); "
            "start them with accelerate launch --multi_gpu --num_processes N …"
        )


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is by itself, whoever started this one."""
    return {name: value for name, value in environment.items() if name not in MEETING}


def is_alone(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Whether this process trains or evaluates by itself: no launcher has given it a rank.

    Raises:
        UserError: it has a rank, but not all of the variables by which ranks meet.
    """
    world_size, rank = environment.get("WORLD_SIZE"), environment.get("RANK")
    if world_size is None and rank is None and "LOCAL_RANK" not in environment:
        return True
    if world_size == "1" and "LOCAL_RANK" not in environment:
        return True
    found = {name: environment[name] for name in MEETING if name in environment}
    shown = ", ".join(f"{name} {value!r}" for name, value in found.items())
    missing = ", ".join(name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR") if name not in found)
    mend = "start the processes with accelerate launch, or unset these variables to run a single one"
    require(not missing, f"the environment has {shown} but not {missing}; {mend}")
    require(
        str(world_size).isdecimal() and str(rank).isdecimal() and int(str(rank)) < int(str(world_size)),
        f"the environment has {shown}; expected RANK to be a number below WORLD_SIZE: {mend}",
    )
    return False
