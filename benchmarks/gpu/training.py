"""A short training at 1,024 channels on the demo's data: killed midway (SIGKILL), resumed, and evaluated.

The resumed run's losses must be those of an undisturbed run, and the evaluation on the GPU that of the CPU, within the
tolerances below. Sums on a GPU run in no fixed order, so two runs differ by rounding, and the difference grows from
step to step.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import REPOSITORY
from benchmarks.gpu.stage import StageRun
from benchmarks.gpu.work import SIZES
from fmrl_dist.base.errors import run_command

LOSS_TOLERANCE = 1e-3  # relative, of a step's loss: resumed against undisturbed
METRIC_TOLERANCE = 2e-3  # absolute, of a metric: GPU against CPU
KILLED_RUN_S = 60.0  # longest wait for the step at which to kill


def main(argv: list[str]) -> None:
    run = StageRun.start("training", argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = options(folder, run.is_dry_run)
        undisturbed, resumed = folder / "undisturbed", folder / "resumed"
        began = time.monotonic()
        command("fmrl_dist.train", *words, "--run.dir", str(undisturbed))
        seconds = time.monotonic() - began
        records = train_records(undisturbed)
        run.record(
            run="undisturbed, with building the store",
            steps=records[-1]["step"],
            seconds=seconds,
            tokens_per_s=statistics.median(record["tokens_per_s"] for record in records),
        )
        killed_at = kill_midway(words, resumed, records[-1]["step"] // 2)
        command("fmrl_dist.train", *words, "--run.dir", str(resumed), "--resume", "auto")
        compare_losses(run, records, train_records(resumed), killed_at)
        compare_evaluations(run, undisturbed)
    run.finish()


def options(folder: Path, is_dry_run: bool) -> list[str]:
    """The configuration's keys on the command line."""
    sizes = (4, 8, 16) if is_dry_run else SIZES
    demo = "{users: 150, items: 100}" if is_dry_run else "{users: 2000, items: 1500}"
    features = f"{{text: {{source: tfidf, dim: {16 if is_dry_run else 96}}}}}"
    steps = 12 if is_dry_run else 60
    values: dict[str, Any] = {
        "data.demo": demo,
        "data.root": folder / "data",
        "store.path": folder / "store",
        "model.sizes": list(sizes),
        "model.width": sizes[-1],
        "eval.size": sizes[-1],
        "eval.every_steps": steps // 2,
        "train.max_steps": steps,
        "train.checkpoint_every_steps": steps // 6,
        "train.log_every_steps": 1,
    }
    values |= {"data.features": features, "run.tensorboard": "false"}
    values |= {"train.workers": 0} if is_dry_run else {}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return ["--config", str(REPOSITORY / "configs" / "demo.yaml"), *words]


def command(module: str, *words: str, on_gpu: bool = True) -> None:
    """Run a command of ours to its end.

    Raises:
        CalledProcessError: it failed; what it printed is in the log.
    """
    environment = dict(os.environ) | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    subprocess.run([sys.executable, "-m", module, *words], cwd=REPOSITORY, env=environment, check=True)


def kill_midway(words: list[str], folder: Path, step: int) -> int:
    """Train until ``step`` is done, then kill the run and all of its processes; returns the last step it wrote down."""
    run = subprocess.Popen(
        [sys.executable, "-m", "fmrl_dist.train", *words, "--run.dir", str(folder)],
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + KILLED_RUN_S
        while last_step(folder) < step and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    if run.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended by itself with exit code {run.returncode} before it was killed")
    return last_step(folder)


def train_records(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` about training; one that is being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["split"] == "train"]


def last_step(folder: Path) -> int:
    return max((record["step"] for record in train_records(folder)), default=0)


def compare_losses(run: StageRun, expected: list[dict[str, Any]], found: list[dict[str, Any]], killed_at: int) -> None:
    """Record the largest difference over all steps, and refuse the run if it exceeds the tolerance."""
    steps = [record["step"] for record in expected]
    if steps != [record["step"] for record in found]:
        run.refuse(f"the resumed run has records of {len(found)} steps, the undisturbed one of {len(steps)}")
        return
    errors = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(expected, found, strict=True)]
    equal = max(errors) <= LOSS_TOLERANCE
    run.record(
        killed_at_step=killed_at,
        steps=steps[-1],
        largest_loss_error=max(errors),
        tolerance=LOSS_TOLERANCE,
        before_the_kill=max(errors[:killed_at]),
        equal=equal,
    )
    if not equal:
        run.refuse(f"losses of the resumed run differ by {max(errors):.1e}")


def compare_evaluations(run: StageRun, folder: Path) -> None:
    """Evaluate on the CPU what the run evaluated on the GPU; record the largest difference of any metric and size."""
    path = folder / "evaluation.json"
    on_gpu = json.loads(path.read_text())
    path.unlink()
    command("fmrl_dist.evaluate", "--checkpoint", str(folder), on_gpu=False)
    differences = [abs(a - b) for a, b in zip(numbers(on_gpu), numbers(json.loads(path.read_text())), strict=True)]
    equal = max(differences) <= METRIC_TOLERANCE
    run.record(metrics=len(differences), largest_difference=max(differences), tolerance=METRIC_TOLERANCE, equal=equal)
    if not equal:
        run.refuse(f"metrics on GPU and CPU differ by {max(differences):.1e}")


def numbers(report: Any) -> list[float]:
    """All fractional numbers of a report, in its order."""
    if isinstance(report, dict):
        return [number for value in report.values() for number in numbers(value)]
    if isinstance(report, list):
        return [number for value in report for number in numbers(value)]
    return [report] if isinstance(report, float) else []


if __name__ == "__main__":
    run_command(main)
