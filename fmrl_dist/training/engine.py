"""One interface to data parallelism and DeepSpeed, so that ``train.py`` contains a single loop.

    one process, DDP   DDP averages the gradients, we clip and apply them; each rank has the full optimiser state
    ZeRO 1, 2, 3       DeepSpeed averages, clips and applies; each rank has a share of the moments (2: and of the
                       gradients, 3: and of the weights)

Both use our AdamW with our parameter groups, in float32, and put the full optimiser state into a checkpoint, so that a
run can resume under the other engine or with another number of ranks. DeepSpeed's own checkpoints are pickles that fit
only one number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.checkpoint.folder import optimizer_tensors, restore_optimizer
from fmrl_dist.data.batches import Packed
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.training.module import TrainingModule

LossOf = Callable[[Tensor], Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


class Engine(Protocol):
    """A training module and its AdamW, run by all ranks together."""

    def add_gradients(self, batch: Packed, loss_of: LossOf, last: bool) -> Tensor:
        """Add the gradients of one micro-batch to the step's; average them over the ranks after the ``last``.

        Args:
            batch: this rank's micro-batch.
            loss_of: computes the loss to differentiate, [], from the micro-batch's loss sums.
            last: whether it is the step's last one; every rank has the same number.

        Returns:
            Loss sums [S] of the micro-batch, detached.
        """

    def clip_and_step(self) -> Tensor:
        """Clip all gradients by their joint norm, take the step, clear them; returns the norm before clipping, [].

        If the norm is not finite, weights and moments stay unchanged on all processes.
        """

    def whole_weights(self) -> AbstractContextManager[None]:
        """Gather the model's weights on every rank while active; all ranks must enter together."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter>`` of all parameters, on rank 0; empty on others, but every rank must call it."""

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`optimizer_tensors` returned."""


class DataParallelEngine:
    """One process, or DDP."""

    def __init__(
        self, runtime: Runtime, module: TrainingModule, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._runtime, self._module, self._optimizer, self._clip_norm = runtime, module, optimizer, clip_norm
        self._wrapped = runtime.accelerator.prepare_model(module)

    def add_gradients(self, batch: Packed, loss_of: LossOf, last: bool) -> Tensor:
        accelerator = self._runtime.accelerator
        with nullcontext() if last else accelerator.no_sync(self._wrapped):
            loss_sums: Tensor = self._wrapped(batch)
            accelerator.backward(loss_of(loss_sums))
        return loss_sums.detach()

    def clip_and_step(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        assert all(group["fused"] for group in self._optimizer.param_groups), "no other kernel reads found_inf"
        # If this is 1, AdamW's fused kernel changes nothing; the host need not wait for the value.
        self._optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self._module.model, self._optimizer) if self._runtime.is_main else {}

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        restore_optimizer(self._module.model, self._optimizer, tensors)


class Leaf(nn.Module):
    """A training module with an input that requires a gradient.

    DeepSpeed reduces a leaf's gradients once its input's gradient is ready; without such an input, too early.
    """

    def __init__(self, module: TrainingModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Packed, zero: Tensor) -> Tensor:
        loss_sums: Tensor = self.module(batch) + zero
        return loss_sums


class ZeroEngine:
    """DeepSpeed's ZeRO 1 to 3: AdamW runs on this rank's share of the parameters, laid out flat.

    Under ZeRO 3 the entire training module is one leaf: all its parameters are gathered for a forward or backward pass,
    because the loss uses the projection in a custom backward pass, and released afterwards.
    """

    def __init__(
        self, runtime: Runtime, module: TrainingModule, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._runtime, self._model, self._optimizer = runtime, module.model, optimizer
        plugin = runtime.accelerator.deepspeed_plugin
        self._partitioned = plugin.zero_stage == 3
        plugin.deepspeed_config |= {
            "gradient_clipping": clip_norm,
            # No loader is prepared to derive it from. DeepSpeed only reports its speed with it: batches are ours.
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": runtime.world_size,
            "gradient_accumulation_steps": 1,
            "zero_force_ds_cpu_optimizer": False,  # use our AdamW even with offloading
        }
        whole = Leaf(module)
        if self._partitioned:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(whole, [Leaf])
        self._engine: Any = runtime.accelerator.prepare(whole, optimizer)[0]
        # DeepSpeed would link parameters to moments after the first group's first step and miss the second group's. So
        # all moments are created beforehand, initialised as AdamW would.
        zero = self._engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if self._partitioned else zero.single_partition_of_fp32_groups
        for share in flat:
            zeros = {moment: torch.zeros_like(share, requires_grad=False) for moment in MOMENTS}
            optimizer.state[share] = {"step": torch.zeros((), device=share.device), **zeros}
        if not self._partitioned:
            zero._lazy_init_hp_params_optimizer_state()

    def add_gradients(self, batch: Packed, loss_of: LossOf, last: bool) -> Tensor:
        loss_sums: Tensor = self._engine(batch, torch.zeros((), device=self._runtime.device, requires_grad=True))
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss_of(loss_sums))
        return loss_sums.detach()

    def clip_and_step(self) -> Tensor:
        self._engine.step()  # DeepSpeed skips the step if the norm is not finite; the norm says so
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._runtime.device)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        if not self._partitioned:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self._model.parameters())):
            yield

    def optimizer_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        (step, *_) = (state["step"] for state in self._optimizer.state.values())  # equal for all: see restore_optimizer
        tensors = {}
        for name, parameter in self._model.named_parameters():
            # DeepSpeed ignores a parameter without elements (the projection of no features).
            whole = {
                moment: safe_get_full_optimizer_state(parameter, moment) if _numel(parameter) else parameter.detach()
                for moment in MOMENTS
            }
            if self._runtime.is_main:
                tensors[f"step/{name}"] = step.clone()
                tensors |= {f"{moment}/{name}": tensor.cpu() for moment, tensor in whole.items()}
        return tensors

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        rank, world_size = self._runtime.rank, self._runtime.world_size
        for name, parameter in self._model.named_parameters():
            for moment in MOMENTS if _numel(parameter) else ():
                whole = tensors[f"{moment}/{name}"].to(self._runtime.device)
                if self._partitioned:  # equal shares; the last may extend beyond the end
                    shares = F.pad(whole.flatten(), (0, -whole.numel() % world_size)).view(world_size, -1)
                    safe_set_local_optimizer_state(parameter, shares[rank], moment)
                else:
                    safe_set_full_optimizer_state(parameter, whole, moment)
        # Every parameter takes part in every step: any step count holds for all.
        step = next(tensor for name, tensor in tensors.items() if name.startswith("step/"))
        for state in self._optimizer.state.values():
            state["step"].copy_(step)


def _numel(parameter: Tensor) -> int:
    """Elements of the full parameter; ZeRO 3 leaves an empty one in its place between passes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def prepare_engine(
    runtime: Runtime, module: TrainingModule, optimizer: torch.optim.Optimizer, clip_norm: float
) -> Engine:
    """The engine that the launcher requested.

    Args:
        runtime: this process and its group.
        module: on the runtime's device, with the weights to start from.
        optimizer: over the module's parameters, before any step. Its groups' learning rates are used throughout.
        clip_norm: maximal joint norm of all gradients.
    """
    kind = ZeroEngine if runtime.uses_deepspeed else DataParallelEngine
    return kind(runtime, module, optimizer, clip_norm)
