"""BSARec's layer (arXiv 2312.10325, section 4): causal attention beside a rescaling of high frequencies.

P packed rows, D channels, L the window, c the number of low frequencies, both sides of the spectrum together.

    low = the c lowest frequencies of the window, by FFT;  high = x - low
    y = α·(low + β²⊙high) + (1 - α)·Attention(x)

β [D] is learned, channel by channel, so it is nested as it is. The low pass is a circular convolution with a fixed
kernel: it has seen the later events of its window, as the published filter of :mod:`~fmrl_dist.model.mixers.filter`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmrl_dist.model.mixers.attention import Attention
from fmrl_dist.model.mixers.filter import packed_filter


def low_pass_kernel(window: int, num_frequencies: int) -> Tensor:
    """The kernel [L] whose circular convolution keeps the lowest frequencies, float64.

    As the authors count them: of the L components of the spectrum, the mean and c // 2 on each of its two sides.
    """
    spectrum = (torch.arange(window // 2 + 1) <= num_frequencies // 2).to(torch.complex128)
    return torch.fft.irfft(spectrum, window)


class BSARec(nn.Module):
    """Attention and low pass; ``beta`` [D].

    Args:
        attention: causal, of D channels.
        low_pass_share: α.
        low_pass: c.
        impl: of :func:`~fmrl_dist.model.mixers.filter.packed_filter`.
    """

    def __init__(self, attention: Attention, low_pass_share: float, low_pass: int, impl: str = "spectrum") -> None:
        super().__init__()
        self.attention = attention
        self.beta = nn.Parameter(torch.randn(attention.sizes[-1]))
        self.low_pass_share, self.low_pass, self.impl = low_pass_share, low_pass, impl

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x [P, D] packed rows, starts int64 [·+1] → y [P, D]."""
        kernel = low_pass_kernel(self.attention.window, self.low_pass).to(x)[:, None].expand(-1, x.shape[1])
        low = packed_filter(x, kernel, starts, causal=False, impl=self.impl)
        rescaled = low + self.beta.square() * (x - low)
        return self.low_pass_share * rescaled + (1 - self.low_pass_share) * self.attention(x, starts)

    def initial_state(self, num_histories: int) -> Tensor:
        """There is none."""
        raise AssertionError("an event that has seen later ones has no step")

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """There is none."""
        raise AssertionError("an event that has seen later ones has no step")
