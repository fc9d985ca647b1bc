"""The chain of jobs for one config: shards → train → evaluate → export, each stage one job or one array.

Evaluation in parts is two stages: the array that ranks, and the job that joins its parts. A store in parts is two, too:
the array that encodes texts and images, and the job that builds the store.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fmrl_dist.base.errors import require
from fmrl_dist.config.sections import Config
from launch.slurm.jobs import BatchJob, BatchScript, batch_script

STAGES = ("shards", "train", "evaluate", "export")
ENCODE = "encode"  # precedes the shards of a store in parts
JOIN = "join"  # follows an evaluation in parts
MAX_PARTS = 10_000  # more units than that are those of ten million texts
JOB_STAGES = (ENCODE, "shards", "train", "evaluate", JOIN, "export")


@dataclass(frozen=True)
class ChainStage:
    """What a stage runs: on SLURM a job with a task for each script, on this machine one command after another."""

    name: str  # of JOB_STAGES
    scripts: tuple[BatchScript, ...]
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class JobChain:
    """What to run for one config.

    Args:
        config: of all stages.
        config_arguments: what gives that config on a command line, [CONFIG] [--section.key VALUE …].
        stages: some of :data:`STAGES`, in their order.
        sizes: to export.
        encode_parts: tasks of the array that encodes texts and images.
        parts: tasks of the array that evaluates.
        processes: of a training on this machine.
    """

    config: Config
    config_arguments: tuple[str, ...]
    stages: tuple[str, ...]
    sizes: tuple[int, ...]
    encode_parts: int
    parts: int
    processes: int

    def __post_init__(self) -> None:
        run = self.config.run.dir
        require(
            1 <= self.encode_parts <= MAX_PARTS,
            f"--encode-parts is {self.encode_parts}; expected a number from 1 to {MAX_PARTS}",
        )
        require(self.parts >= 1, f"--parts is {self.parts}; expected at least 1")
        require(self.processes >= 1, f"--processes is {self.processes}; expected at least 1")
        untrained = [size for size in self.sizes if size not in self.config.model.sizes]
        require(not untrained, f"--sizes {untrained} are not trained; choose from {list(self.config.model.sizes)}")
        require(
            self.stages[0] in ("shards", "train") or (Path(run) / "checkpoints").is_dir(),
            f"--stages starts with {self.stages[0]}, but run {run} has no checkpoints; start with train",
        )

    @property
    def folder(self) -> Path:
        """For the record, the logs and submitit's files: beside the run's folder, which training creates itself."""
        run = Path(self.config.run.dir)
        return run.with_name(f"{run.name}.jobs").absolute()

    def job_name(self, stage: str) -> str:
        """The name of a stage's job."""
        return f"{Path(self.config.run.dir).name}-{stage}"

    def jobs(self, options: Mapping[str, Mapping[str, str]]) -> list[BatchJob]:
        """The jobs that SLURM runs, one after another.

        Args:
            options: of sbatch, for each of :data:`JOB_STAGES`.
        """
        found = []
        for stage in self.local_stages():
            if stage.name == "shards" and self.encode_parts > 1:
                found += [(ENCODE, stage.scripts * self.encode_parts), (stage.name, stage.scripts)]
            elif stage.name == "evaluate" and self.parts > 1:
                (evaluation,) = stage.scripts
                join = batch_script(evaluation.path, "--join", *evaluation.arguments)
                found += [(stage.name, stage.scripts * self.parts), (JOIN, (join,))]
            else:
                found.append((stage.name, stage.scripts))
        return [
            BatchJob(stage=name, name=self.job_name(name), scripts=scripts, folder=self.folder, options=options[name])
            for name, scripts in found
        ]

    def local_stages(self) -> list[ChainStage]:
        """The stages, with the evaluation in one piece."""
        of_stage = {"shards": self._shards, "train": self._train, "evaluate": self._evaluate, "export": self._export}
        return [of_stage[name]() for name in self.stages]

    def _shards(self) -> ChainStage:
        script = batch_script("launch/shards.slurm", *self.config_arguments)
        command = (sys.executable, "-m", "shards.build", *self._config_options(), "--keep")
        return ChainStage("shards", (script,), (command,))

    def _train(self) -> ChainStage:
        script = batch_script("launch/train.slurm", *self.config_arguments)
        command = (*self._launcher(), "-m", "fmrl_dist.train", *self._config_options(), "--resume", "auto")
        return ChainStage("train", (script,), (command,))

    def _evaluate(self) -> ChainStage:
        threads = self.config.train.threads  # as many as in training's own evaluation, for the same figures
        arguments = (self.config.run.dir, *(() if threads == "auto" else ("--threads", str(threads))))
        script = batch_script("launch/eval.slurm", *arguments)
        command = (sys.executable, "-m", "fmrl_dist.evaluate", "--checkpoint", *arguments)
        return ChainStage("evaluate", (script,), (command,))

    def _export(self) -> ChainStage:
        exports = [(self.config.run.dir, "--size", str(size), "--overwrite") for size in self.sizes]
        scripts = tuple(batch_script("launch/export.slurm", *arguments) for arguments in exports)
        export = (sys.executable, "-m", "fmrl_dist.export", "--checkpoint")
        return ChainStage("export", scripts, tuple((*export, *arguments) for arguments in exports))

    def _config_options(self) -> tuple[str, ...]:
        """The config's arguments, with the option that the modules take it by."""
        has_file = bool(self.config_arguments) and not self.config_arguments[0].startswith("--")
        return ("--config", *self.config_arguments) if has_file else self.config_arguments

    def _launcher(self) -> tuple[str, ...]:
        """As start_node.sh starts it on a single node: one process has no launcher, which would keep signals."""
        if self.processes == 1:
            return (sys.executable,)
        launcher = Path(sys.executable).with_name("accelerate-launch")
        options = f"--num_machines 1 --num_processes {self.processes} --mixed_precision no --dynamo_backend no"
        return (str(launcher), *options.split(), "--multi_gpu", "--main_process_port", "0")


def parse_stages(text: str) -> tuple[str, ...]:
    """``train,evaluate``: any of the stages, in their order."""
    stages = tuple(text.split(","))
    in_order = tuple(stage for stage in STAGES if stage in stages)
    require(stages == in_order, f"--stages is {text!r}; expected some of {','.join(STAGES)}, in this order")
    return stages


def parse_sizes(text: str | None, config: Config) -> tuple[int, ...]:
    """``8,64``; None gives all trained sizes."""
    if text is None:
        return config.model.sizes
    sizes = text.split(",")
    require(all(size.isdecimal() for size in sizes), f"--sizes is {text!r}; expected numbers such as 8,64")
    return tuple(int(size) for size in sizes)
