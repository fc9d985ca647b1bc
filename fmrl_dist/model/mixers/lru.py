"""The paper's mixer: a linear recurrent unit, nested (eq. 8-9). P packed rows, D channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmrl_dist.model.nested import MatmulModule, init_nested, nested_linear
from fmrl_dist.model.scan import packed_scan, scan_step

RING_MARGIN = 1e-3  # keeps |Λ| off the ring's edges: at 0 the gradient of ν is NaN


class LRU(MatmulModule):
    """Linear recurrent unit (eq. 8-9): h_k = Λ h_{k-1} + γ⊙(B x_k + b), y_k = Re(C h_k + c).

    ``B``, ``C`` [2, D, D] and ``b`` [2, D] hold real and imaginary parts; Λ = exp(-exp(ν) + i·exp(θ)) on a ring
    r_min ≤ |Λ| ≤ r_max at initialisation; γ starts at sqrt(1 - |Λ|²) and is free from then on. Λ and the states are
    float32 at any dtype of the products. ``scan`` is an implementation of :func:`packed_scan`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        r_min: float,
        r_max: float,
        matmul_dtype: torch.dtype | None = None,
        scan: str = "auto",
    ) -> None:
        super().__init__(matmul_dtype)
        width = sizes[-1]
        self.sizes, self.scan = tuple(sizes), scan
        self.B = nn.Parameter(init_nested(2, width, width, sizes=sizes))
        self.C = nn.Parameter(init_nested(2, width, width, sizes=sizes))
        self.b = nn.Parameter(init_nested(2, width, sizes=sizes))
        self.c = nn.Parameter(init_nested(width, sizes=sizes))
        u = torch.rand(width).clamp(RING_MARGIN, 1 - RING_MARGIN)
        modulus_squared = u * (r_max**2 - r_min**2) + r_min**2
        self.nu = nn.Parameter(torch.log(-0.5 * torch.log(modulus_squared)))
        self.theta = nn.Parameter(torch.log(2 * math.pi * torch.rand(width).clamp(RING_MARGIN, 1)))
        self.gamma_log = nn.Parameter(0.5 * torch.log(1 - modulus_squared))

    def decay(self) -> Tensor:
        """Λ [2, D]."""
        modulus, phase = torch.exp(-torch.exp(self.nu)), torch.exp(self.theta)
        return torch.stack((modulus * torch.cos(phase), modulus * torch.sin(phase)))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x [P, D] packed rows, starts int64 [·+1] → y [P, D]."""
        return self._read(packed_scan(self.decay(), self._drive(x), starts, self.scan))

    def initial_state(self, num_histories: int) -> Tensor:
        """State before the first event, [B, 2, D]."""
        return self.c.new_zeros(num_histories, 2, self.sizes[-1])

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One event: state [B, 2, D], x [B, D] → new state, y [B, D]."""
        state = scan_step(self.decay(), state, self._drive(x))
        return state, self._read(state)

    def _drive(self, x: Tensor) -> Tensor:
        """γ⊙(B x + b), [P, 2, D]."""
        driven = nested_linear(x[:, None], self.B[:, None], self.b, self.sizes, self.product_dtype)
        return driven * torch.exp(self.gamma_log)

    def _read(self, states: Tensor) -> Tensor:
        """Re(C h + c), [P, D]."""
        conjugate = states * states.new_tensor((1.0, -1.0))[:, None]  # Re(C h) = Re C · Re h - Im C · Im h
        return nested_linear(conjugate, self.C[None], self.c[None], self.sizes, self.product_dtype)[:, 0]
