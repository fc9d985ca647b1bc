"""What all forms of the nested loss have in common: how scores are computed, and by which implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOSS_IMPLS = ("tiled", "triton", "plain")


@dataclass(frozen=True)
class LossSettings:
    """How the scores of all sizes are computed and normalised.

    Args:
        sizes: trained sizes m_1 < … < m_S; the last one is the width D.
        temperatures: τ_m by which the scores of each size are divided; None for 1.
        impl: "tiled", a tile of positions × items at a time; "triton", the same with a GPU's kernels for a tile, which
            sum in float32; or "plain", all scores at once, the specification.
        dtype: of the products' inputs; None leaves the tensors' own. Exponentials and sums stay in the outputs' dtype.
        distillation: α_m, the share of what each size learns from the largest size instead of from the right item
            (:mod:`fmrl_dist.losses.distillation`); None for none.
        teacher_temperature: κ by which the largest size's scores are divided, besides its τ, to teach.
    """

    sizes: tuple[int, ...]
    temperatures: tuple[float, ...] | None = None
    impl: str = "tiled"
    dtype: torch.dtype | None = None
    distillation: tuple[float, ...] | None = None
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        assert self.impl in LOSS_IMPLS, self.impl
        assert self.temperatures is None or len(self.temperatures) == len(self.sizes)
        assert self.distillation is None or len(self.distillation) == len(self.sizes)

    @property
    def inverse_temperatures(self) -> tuple[float, ...]:
        """1 / τ of each size."""
        return tuple(1 / t for t in self.temperatures) if self.temperatures else (1.0,) * len(self.sizes)

    def product_dtype(self, z: Tensor) -> torch.dtype:
        return self.dtype or z.dtype

    def of_each_size(self) -> list[LossSettings]:
        """The settings of each size alone, where none learns from another."""
        assert self.distillation is None, "a size alone has no teacher"
        temperatures = self.temperatures or (1.0,) * len(self.sizes)
        return [
            replace(self, sizes=(size,), temperatures=(temperature,))
            for size, temperature in zip(self.sizes, temperatures, strict=True)
        ]


@dataclass(frozen=True)
class Correction:
    """What is added to the scores of sampled items, and which of them a position does not see."""

    offsets: Tensor  # [V], added to every size's score; no gradient
    item_ids: Tensor  # int64 [V]
    target_ids: Tensor  # int64 [N]; an item with a position's target's id is left out for that position

    def of_tile(self, rows: slice, columns: slice) -> Correction:
        """The correction of some positions and items."""
        return Correction(self.offsets[columns], self.item_ids[columns], self.target_ids[rows])
