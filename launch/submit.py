"""``python -m launch.submit --config C``: shards → train → evaluate → export, as dependent SLURM jobs or right here.

Each job is one of launch/*.slurm with its own words; SLURM starts a stage when the one before has completed, and
cancels it where that has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.config.command_line import command_parser, parse_command
from launch.slurm.chain import JOIN, STAGES, Chain, Stage, parse_sizes, parse_stages
from launch.slurm.follow import (
    Submitted,
    all_jobs,
    cancel_recorded,
    fail,
    follow,
    read_record,
    require_ended,
    summary,
    write_record,
)
from launch.slurm.jobs import cancel, import_submitit, require_slurm, sbatch_text, states, submit

SBATCH_WORD = re.compile(r"(?:([a-z]+):)?([a-z][a-z0-9-]*)(?:=(.+))?")
OURS = ("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "output", "parsable", "wrap")
LOCAL_POLL_S = 0.2


def main(argv: list[str]) -> None:
    parser = command_parser("launch.submit", "Submit shards, train, evaluate, export as a chain of jobs.")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, in this order (default: %(default)s)")
    parser.add_argument("--sizes", help="to export, such as 8,64 (default: all trained sizes)")
    parser.add_argument("--parts", type=int, default=1, help="tasks of an array that share the evaluation (default: 1)")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: here, one by one")
    parser.add_argument("--processes", type=int, default=1, help="of a local training (default: 1)")
    parser.add_argument(
        "--sbatch",
        metavar="[STAGE:]OPTION[=VALUE]",
        action="append",
        default=[],
        help="of sbatch, by long name, for all stages or for one (shards, train, evaluate, join, export); repeatable",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--dry-run", action="store_true", help="print what would be submitted, and do nothing")
    actions.add_argument(
        "--status", action="store_true", help="say what has become of the chain; with --wait, follow it"
    )
    actions.add_argument("--cancel", action="store_true", help="cancel what waits or runs of the chain")
    parser.add_argument("--wait", action="store_true", help="follow until the chain ends; exit code 1 if a stage fails")
    arguments, config = parse_command(parser, argv)
    overrides = parser.parse_known_args(argv)[1]
    words = ([str(arguments.config)] if arguments.config else []) + overrides
    stages = parse_stages(arguments.stages)
    chain = Chain(
        config, tuple(words), stages, parse_sizes(arguments.sizes, config), arguments.parts, arguments.processes
    )
    options = parse_sbatch(arguments.sbatch)
    require(Path("launch/train.slurm").is_file(), f"{Path.cwd()} is not the repository's root; submit from there")

    if arguments.cluster == "local":
        check_local(arguments)
        if arguments.dry_run:
            print_commands(chain.on_this_machine())
        else:
            run_here(chain)
    elif arguments.dry_run:
        print_texts(chain, options)
    elif arguments.status and not arguments.wait:
        print_status(read_record(chain.folder))
    elif arguments.cancel:
        cancel_recorded(chain.folder)
    else:
        submitted = read_record(chain.folder) if arguments.status else submit_chain(chain, options)
        if arguments.wait:
            follow_until_interrupted(submitted)


def parse_sbatch(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """sbatch's options for each stage; ``train:nodes=4`` is for one, and wins over ``nodes=2`` for all."""
    of_all: dict[str, str] = {}
    of_one: dict[str, dict[str, str]] = {stage: {} for stage in (*STAGES, JOIN)}
    for word in words:
        match = SBATCH_WORD.fullmatch(word)
        require(
            match is not None and match[1] in (None, *of_one),
            f"--sbatch {word}: expected [STAGE:]OPTION[=VALUE] with a long option of sbatch, such as time=120 or "
            "train:nodes=4",
        )
        assert match is not None
        stage, name, value = match.groups(default="")
        require(name not in OURS, f"--sbatch {word}: the chain sets {name} itself; leave it out")
        (of_one[stage] if stage else of_all)[name] = value
    return {stage: of_all | own for stage, own in of_one.items()}


def check_local(arguments: argparse.Namespace) -> None:
    """Refuse what only SLURM can do."""
    asked = {"--sbatch": bool(arguments.sbatch), "--parts": arguments.parts > 1}
    asked |= {"--status": arguments.status, "--cancel": arguments.cancel}
    for word, given in asked.items():
        require(not given, f"{word} is for SLURM; a local chain runs here, stage after stage, until it ends")


def print_texts(chain: Chain, options: Mapping[str, dict[str, str]]) -> None:
    """The batch script of each stage, and what its jobs run; ``TRAIN_JOB`` is the id of the job that it waits for."""
    before: list[str] = []
    for stage in chain.on_slurm():
        print(f"### {stage.name}, {len(stage.scripts)} job{'s' * (len(stage.scripts) > 1)}")
        for line in dict.fromkeys(shlex.join(("bash", script.path, *script.words)) for script in stage.scripts):
            print(f"### {line}")
        name = chain.job_name(stage)
        print(sbatch_text(stage.scripts, chain.folder, name, options[stage.name], before), flush=True)
        before = [f"{stage.name.upper()}_JOB"]


def print_commands(stages: Sequence[Stage]) -> None:
    for stage in stages:
        for script in stage.scripts:
            print(shlex.join(script.local))


def submit_chain(chain: Chain, options: Mapping[str, dict[str, str]]) -> list[Submitted]:
    """Submit all stages and record their jobs; where sbatch refuses one, none stays.

    Raises:
        UserError: the chain is under way already, or sbatch refuses a stage.
    """
    import_submitit()
    require_slurm()
    require_ended(chain.folder, f"the chain of {chain.config.run.dir}")
    submitted: list[Submitted] = []
    before: list[str] = []
    try:
        for stage in chain.on_slurm():
            own = options[stage.name]
            jobs = submit(stage.scripts, "slurm", chain.folder, chain.job_name(stage), own, before)
            ids, logs = tuple(job.job_id for job in jobs), tuple(str(job.paths.stdout) for job in jobs)
            submitted.append(Submitted(stage.name, ids, logs))
            write_record(chain.folder, submitted)
            before = [ids[0].split("_")[0]]  # all tasks of an array
    except UserError:
        if submitted:
            cancel(all_jobs(submitted))
        else:
            with contextlib.suppress(OSError):  # there is an older record in it
                chain.folder.rmdir()
        raise
    for entry in submitted:
        tasks = f", {len(entry.jobs)} tasks" if len(entry.jobs) > 1 else ""
        print(f"{entry.stage:<9} job {entry.jobs[0].split('_')[0]}{tasks}")
    print(f"record and logs: {chain.folder}", flush=True)
    return submitted


def print_status(stages: Sequence[Submitted]) -> None:
    now = states(all_jobs(stages))
    for stage in stages:
        print(summary(stage, now))
        for job, log in zip(stage.jobs, stage.logs, strict=True):
            if Path(log).exists():
                print(f"          {job:<8} {log}")


def follow_until_interrupted(stages: Sequence[Submitted]) -> None:
    """The jobs do not depend on whoever follows them."""
    try:
        follow(stages)
    except KeyboardInterrupt:
        print("\nno longer followed; the jobs go on: see --status and --cancel")
        raise SystemExit(128 + signal.SIGINT) from None


def run_here(chain: Chain) -> None:
    """One job after the other, each in processes of this machine; the first that fails ends the chain."""
    chain.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an interrupt: the job ends with us
    for stage in chain.on_this_machine():
        for script in stage.scripts:
            start = time.monotonic()
            (job,) = submit([script], "local", chain.folder, chain.job_name(stage), {})
            print(f"{stage.name:<9} {job.paths.stdout}", flush=True)
            try:
                while not job.done():
                    time.sleep(LOCAL_POLL_S)
            except KeyboardInterrupt:
                print(f"{stage.name:<9} interrupted", flush=True)
                raise SystemExit(128 + signal.SIGINT) from None
            finally:
                job.cancel()
            if job.exception() is not None:
                fail(stage.name, shlex.join(script.local), job.paths.stdout)
            print(f"{stage.name:<9} done in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
