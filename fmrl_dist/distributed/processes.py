"""The processes of a run: what the launcher requested, what was actually started, and the threads of each process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: see Runtime.leave
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.launch_variables import is_alone, refuse_one_process_trap
from fmrl_dist.config.train_section import TrainPrecision
from fmrl_dist.distributed.deepspeed import asks_for_deepspeed, checked_plugin, leave_out_unused_build

# MPI's, which Accelerate reads too, and srun's: processes that such a program starts do not meet.
STARTERS_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
PATIENCE_S = 4 * 3600.0  # ranks that evaluate different users wait this long for each other


@dataclass(frozen=True)
class Runtime:
    """One process of the run."""

    accelerator: Accelerator
    threads: int
    precision: TrainPrecision
    joined_group: bool  # this runtime set up the process group, and so ends it

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def uses_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    @property
    def matmul_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    def my_share(self, count: int) -> range:
        """This rank's share of ``count`` lanes or blocks: rank, rank + world, …"""
        return range(self.rank, count, self.world_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of ``tensor`` over all ranks, returned on each."""
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def agree(self, *counts: int | torch.Tensor) -> list[int]:
        """Sums of counts over all processes, returned on each; a count may be a tensor [] on the device."""
        own = torch.stack([torch.as_tensor(count, dtype=torch.int64, device=self.device) for count in counts])
        totals: list[int] = self.sum(own).tolist()
        return totals

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """The ``row`` [n] of every rank, returned on each, [world size, n]."""
        rows: torch.Tensor = self.accelerator.gather(row[None])
        return rows

    def have_same(self, sha256: str) -> bool:
        """Whether all ranks have the same hash, comparing the first 60 bits; the same answer on each."""
        return len(set(self._of_all(sha256))) == 1

    def _of_all(self, sha256: str) -> list[int]:
        numbers: list[int] = self.accelerator.gather(torch.tensor([int(sha256[:15], 16)], device=self.device)).tolist()
        return numbers

    def require_same(self, what: str, sha256: str) -> None:
        """Refuse to continue if the ranks have read different content: then they do not see the same files."""
        values = self._of_all(sha256)
        require(
            len(set(values)) == 1,
            f"the ranks see different versions of the {what} ({', '.join(f'{value:015x}' for value in values)}); "
            "give all of them the same store and run folder on a shared file system",
        )

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def leave(self) -> None:
        """End the process group once every rank is here: a group whose threads still run at exit can crash its process.

        DDP imports ``torch.distributed.nn.functional``. If a group exists by then, the defaults of its functions keep
        the group, and so its threads, to the very end; this module therefore imports it first.
        """
        self.accelerator.wait_for_everyone()
        if self.joined_group:
            self.accelerator.end_training()

    def describe(self) -> str:
        engine = str(self.accelerator.distributed_type).split(".")[-1].lower()
        if self.uses_deepspeed:
            engine += f" ZeRO {self.accelerator.deepspeed_plugin.zero_stage}"
        return (
            f"{self.world_size} process(es), engine {engine}, device {self.device}, "
            f"{self.threads} thread(s) each, precision {self.precision}"
        )


def start_runtime(
    threads: int | str, lanes: int | None, precision: TrainPrecision = "fp32", patience_s: float = PATIENCE_S
) -> Runtime:
    """Join the other processes and set this process' threads.

    Args:
        threads: of this process; "auto" shares the cores among the processes of the machine.
        lanes: of the global batch, at least one per process; None if there is no batch.
        precision: fp32 or bf16, unless the launcher sets it.
        patience_s: longest time that one process may wait for another before the run ends.

    Raises:
        UserError: several processes were requested but one was started, or only some of the variables are set by which
            they meet; the launcher requests a precision, accumulation
            or DeepSpeed configuration that is not supported; or there are more processes than lanes.
    """
    refuse_one_process_trap(os.environ)
    alone = is_alone(os.environ)
    refuse_accumulation(os.environ)
    precision = launched_precision(os.environ, precision)
    in_group = dist.is_initialized()
    with without_starters_sizes(os.environ, alone):
        accelerator = start_accelerator(os.environ, patience_s)
    requested = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != requested:
        raise UserError(
            f"{requested} processes were requested but {accelerator.num_processes} joined; "
            "start them with accelerate launch --multi_gpu --num_processes N …"
        )
    if lanes is not None and accelerator.num_processes > lanes:
        raise UserError(
            f"{accelerator.num_processes} processes share {lanes} lanes; "
            "raise train.lanes (a divisor of train.batch_size) or start fewer processes"
        )
    cores = len(os.sched_getaffinity(0))
    local_ranks = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_threads = max(cores // local_ranks, 1) if threads == "auto" else int(threads)
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)  # decayed states underflow; denormals would only slow it down
    return Runtime(accelerator, num_threads, precision, joined_group=dist.is_initialized() and not in_group)


def start_accelerator(environment: os._Environ[str] | dict[str, str], patience_s: float) -> Accelerator:
    """Join the other processes under the engine that the launcher requested; precision stays ours."""
    on_cpu = not torch.cuda.is_available()
    # NCCL's default limit is ten minutes; one rank may need longer to unpack a table or to save.
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timedelta(seconds=patience_s))
    if not asks_for_deepspeed(environment):
        # Set explicitly: on a machine without a GPU, --multi_gpu would otherwise start processes that never join.
        alone = int(environment.get("WORLD_SIZE", "1")) == 1  # then there is no group
        return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[] if alone else [group])
    plugin = checked_plugin(environment)
    leave_out_unused_build()
    # With cpu=True, Accelerate would silently use DDP.
    return Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=[group])


@contextmanager
def without_starters_sizes(environment: os._Environ[str] | dict[str, str], alone: bool) -> Iterator[None]:
    """Hide variables by which Accelerate would take one process for one of several that never meet.

    An ``mpirun`` or ``srun`` further out may have set them for another program. If it is the one that started this
    process, several train or evaluate the same by themselves, so each says that it is alone.
    """
    hidden = {name: environment.pop(name) for name in STARTERS_SIZES if name in environment}
    for name, value in hidden.items():
        if alone and value != "1":
            print(
                f"{name} is {value}, but this is one process by itself; several start with accelerate launch "
                "--multi_gpu --num_processes N",
                flush=True,
            )
    try:
        yield
    finally:
        environment.update(hidden)


def launched_precision(environment: os._Environ[str] | dict[str, str], configured: TrainPrecision) -> TrainPrecision:
    """The effective precision: the launcher's bf16 wins, ``no`` keeps the configured one, fp16 and fp8 are refused."""
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", "bf16"):
        raise UserError(f"the launcher requests mixed precision {launched!r}; expected no or bf16")
    return "bf16" if launched == "bf16" else configured


def refuse_accumulation(environment: os._Environ[str] | dict[str, str]) -> None:
    """Refuse the launcher's accumulation, which would only divide the loss; ``train.micro_batches`` replaces it."""
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    require(
        steps in ("1", "auto"),
        f"the launcher requests {steps} gradient accumulation steps; expected 1: train.micro_batches splits a rank's "
        "share of the batch",
    )
