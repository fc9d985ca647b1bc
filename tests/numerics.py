"""How near two tensors must be."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def assert_relatively_close(found: Tensor, expected: Tensor, tolerance: float, floor: float = 1.0) -> None:
    """Same shape and dtype, and every error at most ``tolerance`` times the largest expected value, or ``floor``."""
    scale = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, floor))
