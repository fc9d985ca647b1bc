"""``python -m launch.submit --config C``: shards → train → evaluate → export, as dependent SLURM jobs or right here.

Each job is one of launch/*.slurm with its own arguments. SLURM starts a stage when the previous one has completed, and
cancels it if that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.locks import only_writer
from fmrl_dist.config.command_line import command_parser, parse_command
from fmrl_dist.config.credentials import refuse_credentials_in_config, refuse_credentials_in_words
from fmrl_dist.config.sections import Config
from launch.local.processes import LocalJob, end_jobs
from launch.local.signals import ENDING, EndedBySignal, SignalListener, ending_signals_raise, listening
from launch.slurm.chain import JOB_STAGES, STAGES, JobChain, parse_sizes, parse_stages
from launch.slurm.follow import fail, follow, summary
from launch.slurm.job_states import cancel, import_submitit, require_slurm, states
from launch.slurm.jobs import sbatch_text, submit
from launch.slurm.options import add_sbatch_option, parse_sbatch
from launch.slurm.record import (
    SubmittedStage,
    all_jobs,
    cancel_recorded,
    read_record,
    require_ended,
    write_record,
)

LOCAL_POLL_S = 0.2


def main(argv: list[str]) -> None:
    parser = submit_parser()
    refuse_credentials_in_words(argv)
    arguments, config = parse_command(parser, argv)
    refuse_credentials_in_config(config)
    chain = make_chain(arguments, config, overrides=parser.parse_known_args(argv)[1])
    options = parse_sbatch(arguments.sbatch, JOB_STAGES)
    require(Path("launch/train.slurm").is_file(), f"{Path.cwd()} is not the repository's root; submit from there")

    if arguments.cluster == "local":
        check_local(arguments)
        if arguments.dry_run:
            print_commands(chain)
        else:
            run_here(chain)
    elif arguments.dry_run:
        print_batch_scripts(chain, options)
    elif arguments.status and not arguments.wait:
        print_status(read_record(chain.folder))
    elif arguments.cancel:
        cancel_recorded(chain.folder)
    else:
        submitted = read_record(chain.folder) if arguments.status else submit_chain(chain, options)
        if arguments.wait:
            follow_until_interrupted(submitted)


def submit_parser() -> argparse.ArgumentParser:
    parser = command_parser("launch.submit", "Submit shards, train, evaluate, export as a chain of jobs.")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, in this order (default: %(default)s)")
    parser.add_argument("--sizes", help="to export, such as 8,64 (default: all trained sizes)")
    parser.add_argument(
        "--encode-parts", type=int, default=1, help="tasks of an array that share the encoding of a store (default: 1)"
    )
    parser.add_argument("--parts", type=int, default=1, help="tasks of an array that share the evaluation (default: 1)")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: here, one by one")
    parser.add_argument("--processes", type=int, default=1, help="of a local training (default: 1)")
    add_sbatch_option(parser, JOB_STAGES)
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--dry-run", action="store_true", help="print what would be submitted, and do nothing")
    actions.add_argument("--status", action="store_true", help="print the jobs' states; with --wait, follow them")
    actions.add_argument("--cancel", action="store_true", help="cancel the chain's jobs that wait or run")
    parser.add_argument("--wait", action="store_true", help="follow until the chain ends; exit code 1 if a stage fails")
    return parser


def make_chain(arguments: argparse.Namespace, config: Config, overrides: Sequence[str]) -> JobChain:
    """The chain that a command line asks for; ``overrides`` are its ``--section.key VALUE`` arguments."""
    return JobChain(
        config=config,
        config_arguments=(*([str(arguments.config)] if arguments.config else []), *overrides),
        stages=parse_stages(arguments.stages),
        sizes=parse_sizes(arguments.sizes, config),
        encode_parts=arguments.encode_parts,
        parts=arguments.parts,
        processes=arguments.processes,
    )


def check_local(arguments: argparse.Namespace) -> None:
    """Refuse what only SLURM can do."""
    given = {"--sbatch": bool(arguments.sbatch), "--parts": arguments.parts > 1}
    given |= {"--encode-parts": arguments.encode_parts > 1}
    given |= {"--status": arguments.status, "--cancel": arguments.cancel}
    for option, is_given in given.items():
        require(not is_given, f"{option} needs SLURM; a local chain runs here, stage after stage, until it ends")


def print_batch_scripts(chain: JobChain, options: Mapping[str, Mapping[str, str]]) -> None:
    """The batch script of each stage and what its jobs run; ``TRAIN_JOB`` is the id of the job that it waits for."""
    after = ""
    for job in chain.jobs(options):
        print(f"### {job.stage}, {len(job.scripts)} job{'s' * (len(job.scripts) > 1)}")
        for line in dict.fromkeys(shlex.join(("bash", script.path, *script.arguments)) for script in job.scripts):
            print("\n### ".join(f"### {line}".split("\n")))  # an argument may have several lines
        print(sbatch_text(job, after), flush=True)
        after = f"{job.stage.upper()}_JOB"


def print_commands(chain: JobChain) -> None:
    """What a local chain runs, one command a line."""
    for stage in chain.local_stages():
        for command in stage.commands:
            print(shlex.join(command))


def submit_chain(chain: JobChain, options: Mapping[str, Mapping[str, str]]) -> list[SubmittedStage]:
    """Submit all stages and record their jobs; if that ends early, those already submitted are cancelled.

    Raises:
        UserError: the chain is in progress, another process submits it, or sbatch rejects a stage.
    """
    import_submitit()
    require_slurm()
    submitted: list[SubmittedStage] = []
    with only_writer(chain.folder):
        require_ended(chain.folder, f"the chain of {chain.config.run.dir}")
        try:
            for job in chain.jobs(options):
                submitted.append(submit(job, after=submitted[-1].number if submitted else ""))
                write_record(chain.folder, submitted)
        except BaseException:
            if submitted:
                cancel(all_jobs(submitted))
            else:
                with contextlib.suppress(OSError):  # it is not empty: it holds an older record
                    chain.folder.rmdir()
            raise
    for stage in submitted:
        tasks = f", {len(stage.jobs)} tasks" if len(stage.jobs) > 1 else ""
        print(f"{stage.stage:<9} job {stage.number}{tasks}")
    print(f"record and logs: {chain.folder}", flush=True)
    return submitted


def print_status(stages: Sequence[SubmittedStage]) -> None:
    """The state of each stage, and the logs of its jobs."""
    now = states(all_jobs(stages))
    for stage in stages:
        print(summary(stage, now))
        for job, log in zip(stage.jobs, stage.logs, strict=True):
            if Path(log).exists():
                print(f"          {job:<8} {log}")


def follow_until_interrupted(stages: Sequence[SubmittedStage]) -> None:
    """The jobs do not depend on this process: they continue when it is interrupted."""
    try:
        with ending_signals_raise():
            follow(stages)
    except EndedBySignal:
        print("\nno longer following; the jobs continue: see --status and --cancel")
        raise


def run_here(chain: JobChain) -> None:
    """Run one command after another on this machine, until one fails; INT and TERM end it with all its processes.

    Raises:
        UserError: another process runs or submits a chain of this run.
        SystemExit: a command failed, the training was stopped, or a signal arrived.
    """
    with only_writer(chain.folder), listening(ENDING) as signals:
        for stage in chain.local_stages():
            for number, command in enumerate(stage.commands):
                log = chain.folder / f"{chain.job_name(stage.name)}_{number}_log.out"
                print(f"{stage.name:<9} {log}", flush=True)
                run_local_job(stage.name, command, log, signals)
                if stage.name == "train" and not is_finished(chain.config.run.dir):
                    fail(
                        stage.name,
                        f"it was stopped before {chain.config.run.dir} was finished; run this again",
                        log,
                    )


def run_local_job(stage: str, command: Sequence[str], log: Path, signals: SignalListener) -> None:
    """Run a stage's command to its end.

    Raises:
        SystemExit: it failed, or a signal arrived.
    """
    start = time.monotonic()
    job = LocalJob(command, log)
    while job.status is None and signals.received is None:
        time.sleep(LOCAL_POLL_S)
    if signals.received is not None:
        with ending_signals_raise():  # a second signal ends the grace period
            end_jobs([job])
        print(f"{stage:<9} interrupted", flush=True)  # at the end: a terminal that is gone refuses it
        raise EndedBySignal(signals.received)
    if job.status != 0:
        fail(stage, f"exit code {job.status}: {shlex.join(command)}", log)
    print(f"{stage:<9} done in {time.monotonic() - start:.0f} s", flush=True)


def is_finished(run: str) -> bool:
    """Whether a run says that it is: a training that was stopped has saved, and exits with 0 too."""
    command = [sys.executable, "-m", "fmrl_dist.checkpoint.progress", run]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.startswith("finished ")


if __name__ == "__main__":
    run_command(main)
