"""The device and the precision that the pretrained encoders run at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fmrl_dist.config.features import Precision

CPU_BF16_FEATURES = ("amx_bf16", "avx512_bf16")  # without one of them a CPU multiplies bfloat16 ten times slower


@dataclass(frozen=True)
class Compute:
    """Device of an encoder and dtype of its matrix products; weights stay float32."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}"

    @property
    def precision(self) -> str:
        """fp32 or bf16, as the recipe of an encoding names it."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context of a forward pass: casts the inputs of matrix products if ``dtype`` is bfloat16.

        float32 is float32 on a GPU too: by default, cuDNN rounds a convolution's inputs to TF32, ten bits of mantissa.
        """
        exact = torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=False,
        )
        with exact, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield


def choose_compute(precision: Precision) -> Compute:
    """This process' GPU if there is one, otherwise the CPU; ``auto`` is bf16 if the hardware multiplies it."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(device) else "fp32"
    return Compute(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(feature, False) for feature in CPU_BF16_FEATURES)
