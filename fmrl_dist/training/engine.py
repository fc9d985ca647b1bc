"""One interface to data parallelism and DeepSpeed, so that there is a single training loop.

    one process, DDP   DDP averages the gradients, we clip and apply them; each rank has the full optimiser state
    ZeRO 1, 2, 3       DeepSpeed averages, clips and applies; each rank has a share of the moments (2: and of the
                       gradients, 3: and of the weights)

Both use our AdamW with our parameter groups, in float32, and put the full optimiser state into a checkpoint, so that a
run can resume under the other engine or with another number of ranks. DeepSpeed's own checkpoints are pickles that fit
only one number of ranks.

A separate id table (:mod:`fmrl_dist.training.id_table`) is no parameter of the module: it averages its own gradient and
makes its own update, which the engine clips by the norm of all gradients together.
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
from fmrl_dist.training.id_table.rows import SeparateIdTable
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import ID_TABLE, set_learning_rate

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

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next step; a group's own is a multiple of it."""

    def clip_and_step(self) -> Tensor:
        """Clip all gradients by their joint norm, take the step, clear them; returns the norm before clipping, [].

        If the norm is not finite, weights and moments stay unchanged on all processes.
        """

    def whole_weights(self) -> AbstractContextManager[None]:
        """Gather the module's weights on every rank while active; all ranks must enter together."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter>`` of all parameters, on rank 0; empty on others, but every rank must call it."""

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`optimizer_tensors` returned."""


class DataParallelEngine:
    """One process, or DDP."""

    def __init__(
        self,
        runtime: Runtime,
        module: TrainingModule,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        id_table: SeparateIdTable | None = None,
    ) -> None:
        self._runtime, self._module, self._optimizer, self._clip_norm = runtime, module, optimizer, clip_norm
        self._id_table = id_table
        self._wrapped = runtime.accelerator.prepare_model(module)

    def add_gradients(self, batch: Packed, loss_of: LossOf, last: bool) -> Tensor:
        accelerator = self._runtime.accelerator
        with nullcontext() if last else accelerator.no_sync(self._wrapped):
            loss_sums: Tensor = self._wrapped(batch)
            accelerator.backward(loss_of(loss_sums))
        return loss_sums.detach()

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rates(self._optimizer, self._id_table, lr)

    def clip_and_step(self) -> Tensor:
        parameters = [p for p in self._module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._id_table is not None:
            norm = torch.hypot(norm, self._id_table.gradient_norm())
        torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        assert all(group["fused"] for group in self._optimizer.param_groups), "no other kernel reads found_inf"
        # If this is 1, AdamW's fused kernel changes nothing; the host need not wait for the value.
        self._optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._id_table is not None:
            self._id_table.step(clip_factor(norm, self._clip_norm), norm.isfinite())
        return norm

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        own = optimizer_tensors(self._module.model, self._optimizer) if self._runtime.is_main else {}
        return own | id_table_moments(self._id_table)

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        restore_optimizer(self._module.model, self._optimizer, tensors)
        restore_id_table(self._id_table, tensors)


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
        self,
        runtime: Runtime,
        module: TrainingModule,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        id_table: SeparateIdTable | None = None,
    ) -> None:
        self._runtime, self._model, self._optimizer = runtime, module.model, optimizer
        self._id_table, self._clip_norm = id_table, clip_norm
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
        if id_table is not None:
            self._count_in_norm(zero)

    def _count_in_norm(self, zero: Any) -> None:
        """Let DeepSpeed clip by the joint norm, and skip the step where the id table's is not finite."""
        self._id_norm = torch.zeros((), device=self._runtime.device)
        if self._partitioned:
            norms_of_groups = zero._get_norm_groups

            def with_ids() -> list[Tensor]:
                norms = norms_of_groups()
                return [*norms, self._id_norm.to(norms[0])]

            zero._get_norm_groups = with_ids
        else:
            norm_of_groups = zero.scaled_global_norm

            def joint_norm() -> Tensor:
                norm = norm_of_groups()
                return torch.hypot(norm, self._id_norm.to(norm))

            zero.scaled_global_norm = joint_norm

    def add_gradients(self, batch: Packed, loss_of: LossOf, last: bool) -> Tensor:
        loss_sums: Tensor = self._engine(batch, torch.zeros((), device=self._runtime.device, requires_grad=True))
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss_of(loss_sums))
        return loss_sums.detach()

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rates(self._optimizer, self._id_table, lr)

    def clip_and_step(self) -> Tensor:
        if self._id_table is not None:
            self._id_norm = self._id_table.gradient_norm()
        self._engine.step()  # DeepSpeed skips the step if the norm is not finite; the norm says so
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._runtime.device)
        if self._id_table is not None:
            self._id_table.step(clip_factor(norm, self._clip_norm), norm.isfinite())
        return norm

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
                moment: safe_get_full_optimizer_state(parameter, moment)
                if num_elements(parameter)
                else parameter.detach()
                for moment in MOMENTS
            }
            if self._runtime.is_main:
                tensors[f"step/{name}"] = step.clone()
                tensors |= {f"{moment}/{name}": tensor.cpu() for moment, tensor in whole.items()}
        return tensors | id_table_moments(self._id_table)

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        rank, world_size = self._runtime.rank, self._runtime.world_size
        for name, parameter in self._model.named_parameters():
            for moment in MOMENTS if num_elements(parameter) else ():
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
        restore_id_table(self._id_table, tensors)


def set_learning_rates(optimizer: torch.optim.Optimizer, id_table: SeparateIdTable | None, lr: float) -> None:
    set_learning_rate(optimizer, lr)
    if id_table is not None:
        id_table.set_learning_rate(lr)


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What all gradients are multiplied by, [], as :func:`torch.nn.utils.clip_grads_with_norm_` does."""
    return torch.clamp(clip_norm / (norm + 1e-6), max=1.0)


def id_table_moments(table: SeparateIdTable | None) -> dict[str, Tensor]:
    """Its part of :meth:`Engine.optimizer_tensors`."""
    moments = {} if table is None else table.moments()
    return {f"{moment}/{ID_TABLE}": tensor for moment, tensor in moments.items()}


def restore_id_table(table: SeparateIdTable | None, tensors: dict[str, Tensor]) -> None:
    """Restore what :func:`id_table_moments` returned."""
    if table is not None:
        table.restore({moment: tensors[f"{moment}/{ID_TABLE}"] for moment in ("step", *MOMENTS)})


def num_elements(parameter: Tensor) -> int:
    """Elements of the full parameter; ZeRO 3 leaves an empty one in its place between passes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def prepare_engine(
    runtime: Runtime,
    module: TrainingModule,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    id_table: SeparateIdTable | None = None,
) -> Engine:
    """The engine that the launcher requested.

    Args:
        runtime: this process and its group.
        module: on the runtime's device, with the weights to start from.
        optimizer: over the module's parameters, before any step. Its groups' learning rates are used throughout.
        clip_norm: maximal joint norm of all gradients.
        id_table: the module's, if it is separate; None if it is a parameter, or there is none.
    """
    kind = ZeroEngine if runtime.uses_deepspeed else DataParallelEngine
    return kind(runtime, module, optimizer, clip_norm, id_table)
