"""What differs between data parallelism and DeepSpeed, behind one face, so that ``train.py`` shows one loop.

    one process, DDP   DDP averages the gradients, we clip and apply them; each rank has the whole optimiser
    ZeRO 1, 2          DeepSpeed averages, clips and applies; each rank has a share of the moments (2: and gradients)

Both use our AdamW with our parameter groups, in float32, and give the whole optimiser's state to a checkpoint, so that
a run goes on under the other engine or with another number of ranks. DeepSpeed's own checkpoints are pickles that fit
one number of ranks only.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fmrl_dist.checkpoint import optimizer_tensors, restore_optimizer
from fmrl_dist.data.histories import Packed
from fmrl_dist.runtime import Runtime
from fmrl_dist.training_module import TrainingModule

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


class Engine(Protocol):
    """A training module and its AdamW, as all ranks run them together."""

    def __call__(self, batch: Packed) -> Tensor:
        """Loss sums [S] of this rank's batch."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's loss, averaged over the ranks."""

    def clip_and_step(self) -> Tensor:
        """Clip the gradients of all parameters together, take the step, forget them; their norm before clipping, []."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """``<moment>/<parameter>`` of all parameters, on rank 0; others get nothing, but every rank has to ask."""

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`optimizer_tensors` gave."""


class DataParallelEngine:
    """One process, or DDP."""

    def __init__(
        self, runtime: Runtime, module: TrainingModule, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._runtime, self._module, self._optimizer, self._clip_norm = runtime, module, optimizer, clip_norm
        self._wrapped = runtime.accelerator.prepare_model(module)

    def __call__(self, batch: Packed) -> Tensor:
        loss_sums: Tensor = self._wrapped(batch)
        return loss_sums

    def backward(self, loss: Tensor) -> None:
        self._runtime.accelerator.backward(loss)

    def clip_and_step(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self._module.model, self._optimizer) if self._runtime.is_main else {}

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        restore_optimizer(self._module.model, self._optimizer, tensors)


class ZeroEngine:
    """DeepSpeed's ZeRO 1 or 2: AdamW runs on this rank's share of each parameter group, laid out flat."""

    def __init__(
        self, runtime: Runtime, module: TrainingModule, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._runtime, self._model, self._optimizer = runtime, module.model, optimizer
        plugin = runtime.accelerator.deepspeed_plugin
        plugin.deepspeed_config |= {
            "gradient_clipping": clip_norm,
            # No loader is prepared that could tell it. DeepSpeed only reports its speed with it: batches are ours.
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": runtime.world_size,
            "gradient_accumulation_steps": 1,
            "zero_force_ds_cpu_optimizer": False,  # offloaded, too, the optimiser is our AdamW
        }
        self._engine: Any = runtime.accelerator.prepare(module, optimizer)[0]
        # DeepSpeed would link parameters to moments after the first group's first step, and so miss the second group's:
        # as AdamW would begin them, they are all there before.
        for group in optimizer.param_groups:
            (share,) = group["params"]
            zeros = {moment: torch.zeros_like(share, requires_grad=False) for moment in MOMENTS}
            optimizer.state[share] = {"step": torch.tensor(0.0), **zeros}
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def __call__(self, batch: Packed) -> Tensor:
        loss_sums: Tensor = self._engine(batch)
        return loss_sums

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def clip_and_step(self) -> Tensor:
        self._engine.step()  # skipped by DeepSpeed where the norm is not finite; the norm says so
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._runtime.device)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        (step, *_) = (state["step"] for state in self._optimizer.state.values())  # the same for all: see restore
        tensors = {}
        for name, parameter in self._model.named_parameters():
            # DeepSpeed knows nothing of a parameter without elements (the projection of no features).
            whole = {
                moment: safe_get_full_optimizer_state(parameter, moment) if parameter.numel() else parameter.detach()
                for moment in MOMENTS
            }
            if self._runtime.is_main:
                tensors[f"step/{name}"] = step.clone()
                tensors |= {f"{moment}/{name}": tensor.cpu() for moment, tensor in whole.items()}
        return tensors

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self._model.named_parameters():
            for moment in MOMENTS:
                whole = tensors[f"{moment}/{name}"].to(self._runtime.device)
                safe_set_full_optimizer_state(parameter, whole, moment)
        # Every parameter takes part in every step: any one's count stands for all.
        step = next(tensor for name, tensor in tensors.items() if name.startswith("step/"))
        for state in self._optimizer.state.values():
            state["step"].copy_(step)


def prepare_engine(
    runtime: Runtime, module: TrainingModule, optimizer: torch.optim.Optimizer, clip_norm: float
) -> Engine:
    """The engine that the launcher asked for.

    Args:
        runtime: this process among the others.
        module: on the runtime's device, with the weights to start from.
        optimizer: over the module's parameters, before any step. Its groups' learning rates stay in force throughout.
        clip_norm: of all gradients together.
    """
    kind = ZeroEngine if runtime.uses_deepspeed else DataParallelEngine
    return kind(runtime, module, optimizer, clip_norm)
