"""``python -m benchmarks.crash``: a run killed (SIGKILL) again and again and resumed, against an undisturbed one.

The run saves every few steps, so that kills also fall during saving. Launcher, ranks and reading processes are all
killed at once, at a random instant after the run's first new step; then ``--resume auto`` resumes. In the end every
loss in ``metrics.jsonl`` and the final evaluation must be those of the undisturbed run, to the last bit. Reported:
kills, how many fell during a save, and the steps that had to be repeated after each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import REPOSITORY, describe_setting

CLOCK_FIGURES = ("tokens_per_s", "data_wait_share")
START_S = 180.0  # longest wait for a run's first new step


@dataclass
class CrashReport:
    """The outcome of one run with its kills."""

    kills: int = 0
    during_save: int = 0  # something half-written lay in the run's folder
    steps_lost: list[int] = field(default_factory=list)
    same: bool = False  # figures and evaluation of the undisturbed run, bit by bit


def crash(config: Path, folder: Path, ranks: int, kills: int, seed: int, words: Sequence[str] = ()) -> CrashReport:
    """Train ``config`` undisturbed and with kills, in ``folder``.

    Args:
        config: YAML; its store is there.
        folder: for the two runs.
        ranks: processes of the run.
        kills: how many to attempt; a run that is finished takes no more.
        seed: of the instants.
        words: more of the command line.
    """
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    process = start(config, undisturbed, ranks, words)
    if process.wait() != 0:
        raise RuntimeError((undisturbed.parent / "undisturbed.log").read_text()[-2000:])
    instants, report = random.Random(seed), CrashReport()
    while True:
        before = last_step(disturbed)
        process = start(config, disturbed, ranks, words)
        if report.kills == kills:
            if process.wait() != 0:
                raise RuntimeError((disturbed.parent / "disturbed.log").read_text()[-2000:])
            break
        deadline = time.monotonic() + START_S
        while process.poll() is None and last_step(disturbed) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(instants.uniform(0, 0.4))
        if process.poll() is not None:
            break
        kill_tree(process)
        report.kills += 1
        checkpoints = disturbed / "checkpoints"
        report.during_save += any(checkpoints.glob(".*"))
        latest = checkpoints / "latest" / "state.json"
        saved = json.loads(latest.read_text())["state"]["step"] if latest.exists() else 0
        report.steps_lost.append(max(last_step(disturbed) - saved, 0))
    report.same = figures(disturbed) == figures(undisturbed) and evaluation(disturbed) == evaluation(undisturbed)
    return report


def start(config: Path, run: Path, ranks: int, words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the training command through the launcher."""
    launcher = [str(Path(sys.executable).with_name("accelerate-launch")), "--main_process_port", "0"]
    launcher += ["--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", *(["--multi_gpu"] if ranks > 1 else [])]
    command = [*launcher, "-m", "fmrl_dist.train", "--config", str(config), "--run.dir", str(run), "--resume", "auto"]
    environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen([*command, *words], env=environment, stdout=log, stderr=log)


def kill_tree(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher, its ranks and their readers, which do not share a process group."""
    root = psutil.Process(launcher.pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()
    psutil.wait_procs(processes, timeout=30)


def last_step(run: Path) -> int:
    """The last step that the run wrote down, 0 before the first."""
    steps = [json.loads(line)["step"] for line in whole_lines(run)]
    return max(steps, default=0)


def figures(run: Path) -> list[dict[str, Any]]:
    """All records of a run without the timings."""
    records = [json.loads(line) for line in whole_lines(run)]
    return [{name: value for name, value in record.items() if name not in CLOCK_FIGURES} for record in records]


def whole_lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def evaluation(run: Path) -> Any:
    """Users and figures of the final evaluation; not what names the run's checkpoint, whose record holds its folder."""
    result = json.loads((run / "evaluation.json").read_text())
    return {name: result[name] for name in ("users", "sizes")}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print("\n".join(f"{name}: {value}" for name, value in describe_setting().items()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = ["--data.demo", "{users: 400, items: 300}", "--data.root", str(folder / "data")]
        demo += ["--store.path", str(folder / "store"), "--data.features", "{text: {source: tfidf, dim: 16}}"]
        config = REPOSITORY / "configs" / "demo.yaml"
        subprocess.run([sys.executable, "-m", "shards.build", "--config", str(config), *demo], check=True)
        words = [
            *demo,
            "--model.sizes",
            "[8, 16]",
            "--model.width",
            "16",
            "--model.depth",
            "1",
            "--model.dropout",
            "0.3",
            "--eval.size",
            "16",
        ]
        words += ["--train.epochs", "120", "--train.patience", "0", "--train.log_every_steps", "1"]
        words += ["--train.checkpoint_every_steps", "3", "--eval.every_steps", "100", "--run.tensorboard", "false"]
        for ranks in arguments.ranks:
            report = crash(config, folder / f"ranks-{ranks}", ranks, arguments.kills, arguments.seed, words)
            lost = report.steps_lost
            print(
                f"{ranks} rank(s): {report.kills} kills, {report.during_save} during a save; steps repeated "
                f"{min(lost)} … {max(lost)}, {sum(lost)} in all; "
                f"losses and evaluation {'bit-equal' if report.same else 'DIFFERENT'}",
                flush=True,
            )
            if not report.same:
                raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
