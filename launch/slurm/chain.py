"""What the chain is: shards → train → evaluate → export, each stage one job or an array, each after the one before.

Evaluation in parts is two stages, the array that ranks and the job that joins its parts.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fmrl_dist.base.errors import require
from fmrl_dist.config.sections import Config
from launch.slurm.jobs import Script

STAGES = ("shards", "train", "evaluate", "export")
JOIN = "join"  # what follows an evaluation in parts


@dataclass(frozen=True)
class Stage:
    """One job, or an array of several."""

    name: str  # of STAGES, or JOIN
    scripts: tuple[Script, ...]


@dataclass(frozen=True)
class Chain:
    """What is to be done for one config."""

    config: Config
    config_words: tuple[str, ...]  # [CONFIG] [--section.key VALUE …]
    stages: tuple[str, ...]  # of STAGES, in their order
    sizes: tuple[int, ...]  # to export
    parts: int  # of the evaluation, each a task of an array
    processes: int  # of a local training

    def __post_init__(self) -> None:
        run = Path(self.config.run.dir)
        require(self.parts >= 1, f"--parts is {self.parts}; expected at least 1")
        require(self.processes >= 1, f"--processes is {self.processes}; expected at least 1")
        untrained = [size for size in self.sizes if size not in self.config.model.sizes]
        require(not untrained, f"--sizes {untrained} are not trained; choose of {list(self.config.model.sizes)}")
        require(
            self.stages[0] in ("shards", "train") or (run / "checkpoints").is_dir(),
            f"--stages begin with {self.stages[0]} and run {run} has no checkpoints; begin with train",
        )

    @property
    def folder(self) -> Path:
        """Of the record, the logs and submitit's files: beside the run, which training makes itself."""
        run = Path(self.config.run.dir)
        return run.with_name(f"{run.name}.jobs").absolute()

    def job_name(self, stage: Stage) -> str:
        return f"{Path(self.config.run.dir).name}-{stage.name}"

    def on_slurm(self) -> list[Stage]:
        """The stages as SLURM runs them."""
        found = []
        for stage in self.on_this_machine():
            if stage.name == "evaluate" and self.parts > 1:
                script = stage.scripts[0]
                join = self._script(script.path, ("--join", *script.words), (*script.local, "--join"))
                found += [Stage(stage.name, stage.scripts * self.parts), Stage(JOIN, (join,))]
            else:
                found.append(stage)
        return found

    def on_this_machine(self) -> list[Stage]:
        """The stages as processes of this machine: the evaluation in one piece."""
        return [Stage(name, self._scripts(name)) for name in self.stages]

    def _scripts(self, stage: str) -> tuple[Script, ...]:
        run, words, python = self.config.run.dir, self.config_words, (sys.executable, "-m")
        config = ("--config", *words) if words and not words[0].startswith("--") else words
        if stage == "shards":
            local = (*python, "shards.build", *config, "--keep")
            return (self._script("launch/shards.slurm", words, local),)
        if stage == "train":
            local = (*self._launcher(), "-m", "fmrl_dist.train", *config, "--resume", "auto")
            return (self._script("launch/train.slurm", words, local),)
        if stage == "evaluate":
            threads = self.config.train.threads  # as many as training's own evaluation has: the same figures
            of_run = (run, *(() if threads == "auto" else ("--threads", str(threads))))
            local = (*python, "fmrl_dist.evaluate", "--checkpoint", *of_run)
            return (self._script("launch/eval.slurm", of_run, local),)
        exports = [(run, "--size", str(size), "--overwrite") for size in self.sizes]
        return tuple(
            self._script("launch/export.slurm", of_size, (*python, "fmrl_dist.export", "--checkpoint", *of_size))
            for of_size in exports
        )

    def _launcher(self) -> tuple[str, ...]:
        """As start_node.sh does it, for one node."""
        several = ("--multi_gpu", "--main_process_port", "0") if self.processes > 1 else ()
        return (
            *(str(Path(sys.executable).with_name("accelerate-launch")), "--num_machines", "1"),
            *("--num_processes", str(self.processes), "--mixed_precision", "no", "--dynamo_backend", "no", *several),
        )

    def _script(self, path: str, words: tuple[str, ...], local: tuple[str, ...]) -> Script:
        """With the variables that launch/environment.sh reads; ``FMRL_CHAIN``: the evaluation's join is ours."""
        ours = {name: value for name, value in os.environ.items() if name.startswith("FMRL_")}
        return Script(path, words, local, {"FMRL_VENV": sys.prefix, **ours, "FMRL_CHAIN": "1"})


def parse_stages(text: str) -> tuple[str, ...]:
    """``train,evaluate``: any of the stages, in their order."""
    stages = tuple(text.split(","))
    in_order = tuple(stage for stage in STAGES if stage in stages)
    require(stages == in_order, f"--stages is {text!r}; expected some of {','.join(STAGES)}, in this order")
    return stages


def parse_sizes(text: str | None, config: Config) -> tuple[int, ...]:
    """``8,64``; without a text, all trained sizes."""
    if text is None:
        return config.model.sizes
    sizes = text.split(",")
    require(all(size.isdecimal() for size in sizes), f"--sizes is {text!r}; expected numbers such as 8,64")
    return tuple(int(size) for size in sizes)
