"""``python -m benchmarks.gpu``: tests and measurements on one NVIDIA GPU, in nine minutes at most.

Each stage is a process with its own time limit. A stage that reaches it is terminated, and the next one starts. Results
are appended to ``gpu.jsonl`` as they come; ``gpu.md`` shows them as tables and is rewritten after each stage;
``gpu.log`` holds what the stages print. The most valuable stages come first.

``--dry-run`` runs every stage at toy size on the CPU, with Triton's interpreter in place of its compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from benchmarks import REPOSITORY, describe_setting
from benchmarks.gpu.report import describe_gpu, read_records, render, write_record
from fmrl_dist.base.errors import run_command

GRACE_S = 5.0  # between TERM and KILL
DRY_RUN_PATIENCE = 4.0  # on a busy CPU, times each stage's limit
POLL_S = 0.05


@dataclass(frozen=True)
class GpuStage:
    """A module of this folder."""

    name: str
    limit_s: float
    title: str


STAGES = (
    GpuStage("machine", 12, "Rates of the machine"),
    GpuStage("tests", 60, "Tests marked `gpu`"),
    GpuStage("equality", 60, "One training step: CPU against GPU"),
    GpuStage("loss", 70, "The loss: forward and backward"),
    GpuStage("scan", 40, "The scan: forward and backward"),
    GpuStage("mixers", 38, "Mixers: forward and backward, against plain PyTorch"),
    GpuStage("step", 58, "A training step, and the price of nesting"),
    GpuStage("catalogue", 62, "A training step by the size of the catalogue"),
    GpuStage("training", 100, "A short training, killed and resumed"),
)
assert sum(stage.limit_s for stage in STAGES) <= 500, "with what starting and ending takes, nine minutes"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "gpu", help="folder")
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--commit", help="of this code, where it is not a git checkout")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    records = out / "gpu.jsonl"
    records.unlink(missing_ok=True)
    setting = describe_setting() | describe_gpu(on_gpu=not arguments.dry_run)
    setting |= {"commit": arguments.commit} if arguments.commit else {}
    for name, value in setting.items():
        print(f"{name:<10} {value}", flush=True)
        write_record(records, "setting", {"name": name, "value": value})

    titles = {stage.name: stage.title for stage in STAGES}
    failed = []
    with (out / "gpu.log").open("wb") as log:
        for stage in STAGES:
            if stage.name not in arguments.stages:
                continue
            began = time.monotonic()
            limit_s = stage.limit_s * (DRY_RUN_PATIENCE if arguments.dry_run else 1)
            outcome = run_stage(stage.name, limit_s, records, arguments.dry_run, log)
            fields = {"name": stage.name, "outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
            write_record(records, "stage", fields)
            print(f"{stage.name:<10} {outcome}, {fields['seconds']} s of {limit_s:g}", flush=True)
            (out / "gpu.md").write_text(render(read_records(records), titles))
            if outcome != "done":
                failed.append(stage.name)
    print(f"written: {out / 'gpu.md'}")
    if failed:
        print(f"NOT DONE: {', '.join(failed)}; see {out / 'gpu.log'}", file=sys.stderr)
        sys.exit(1)


def run_stage(name: str, limit_s: float, records: Path, dry_run: bool, log: BinaryIO) -> str:
    """Run one stage in its own process group; returns "done" or what went wrong."""
    command = stage_command(name, records, dry_run)
    log.write(f"\n===== {name}: {' '.join(command)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=_environment(dry_run), stdout=log, stderr=log, start_new_session=True
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"ended after {limit_s:g} s"
    finally:
        end_group(process)
    return "done" if code == 0 else f"failed with exit code {code}"


def stage_command(name: str, records: Path, dry_run: bool) -> list[str]:
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--records", str(records.resolve())]
    return [*command, "--dry-run"] if dry_run else command


def end_group(process: subprocess.Popen[bytes]) -> None:
    """TERM, then KILL, to the process and all of its descendants in the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)  # raises when nobody is left
            time.sleep(POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(dry_run: bool) -> Mapping[str, str]:
    if not dry_run:
        return os.environ
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    run_command(main)
