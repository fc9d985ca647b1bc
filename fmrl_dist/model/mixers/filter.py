"""FMLP-Rec's learned filter (arXiv 2202.13556, eq. 4-6) as a mixer: each channel by itself, so it is nested as it is.

P packed rows, D channels, L the window: the most events of a history that the filter knows.

A complex weight per frequency and channel, W [L//2 + 1, D], multiplies the spectrum of the window. That is a circular
convolution with the kernel w = irfft(W), real, [L, D], which can be read in two ways:

    circular   as published: y_k = Σ_i w_{(k-i) mod L} x_i over all events i of the window, later ones too
    causal     y_k = Σ_{i≤k} w_{k-i} x_i: no event sees a later one

At the last event of a window no event is later, so there both are the same. Training by the published one needs a
sequence of its own for every target, its prefix; the causal one learns from all positions of a window at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmrl_dist.model.packing import padded_groups

FILTER_IMPLS = ("spectrum", "plain")
INIT_DEVIATION = 0.02  # of the published code's complex weights


def packed_filter(x: Tensor, kernel: Tensor, starts: Tensor, causal: bool, impl: str = "spectrum") -> Tensor:
    """The convolution within each sequence.

    Args:
        x: [P, D].
        kernel: w [L, D].
        starts: int64 [·+1], first row of each sequence and, last, P; circular: none is longer than L.
        causal: whether a row sees those up to itself only.
        impl: one of ``FILTER_IMPLS``: by FFTs of padded groups, or the sums word by word, the specification.

    Returns:
        y [P, D].
    """
    assert impl in FILTER_IMPLS, impl
    return (_plain if impl == "plain" else _by_spectrum)(x, kernel, starts, causal)


def _plain(x: Tensor, kernel: Tensor, starts: Tensor, causal: bool) -> Tensor:
    rows = []
    bounds, length = starts.tolist(), len(kernel)
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        for k in range(first, last):
            seen = range(max(first, k - length + 1), k + 1) if causal else range(first, last)
            rows.append(sum((kernel[(k - i) % length] * x[i] for i in seen), torch.zeros_like(x[k])))
    return torch.stack(rows) if rows else x * kernel[:1]  # a gradient of both, also where there is no row


def _by_spectrum(x: Tensor, kernel: Tensor, starts: Tensor, causal: bool) -> Tensor:
    found, places = [x[:0] * kernel[:1]], [starts[:0]]  # a gradient of both, also where there is no row
    for group in padded_groups(starts):
        longest = group.rows.shape[1]
        padded = torch.where(group.is_row[..., None], x[group.rows], 0.0)  # [b, L, D]
        if causal:
            taps = kernel[:longest]
            period = fast_period(longest + len(taps) - 1)  # what wraps around meets zeros
        else:
            assert longest <= len(kernel), "a circular filter knows its window only"
            taps, period = kernel, len(kernel)
        spectrum = torch.fft.rfft(padded, period, dim=1) * torch.fft.rfft(taps, period, dim=0)
        mixed = torch.fft.irfft(spectrum, period, dim=1)[:, :longest]
        found.append(mixed[group.is_row])
        places.append(group.rows[group.is_row])
    order = torch.cat(places).argsort()
    return torch.cat(found)[order]


def fast_period(at_least: int) -> int:
    """The smallest length of a fast FFT that is no less: a product of 2, 3 and 5."""
    period = at_least
    while True:
        rest = period
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return period
        period += 1


class Filter(nn.Module):
    """The learned filter; ``spectrum`` [L//2 + 1, 2, D] holds W's real and imaginary parts.

    Args:
        width: D.
        window: L.
        causal: how the kernel is read.
        impl: of :func:`packed_filter`.
    """

    def __init__(self, width: int, window: int, causal: bool, impl: str = "spectrum") -> None:
        super().__init__()
        self.window, self.causal, self.impl = window, causal, impl
        self.spectrum = nn.Parameter(torch.randn(window // 2 + 1, 2, width) * INIT_DEVIATION)

    def kernel(self) -> Tensor:
        """w [L, D]."""
        return torch.fft.irfft(torch.complex(self.spectrum[:, 0], self.spectrum[:, 1]), self.window, dim=0)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x [P, D] packed rows, starts int64 [·+1] → y [P, D]."""
        return packed_filter(x, self.kernel(), starts, self.causal, self.impl)

    def initial_state(self, num_histories: int) -> Tensor:
        """No event, [B, 0, D]."""
        return self.spectrum.new_zeros(num_histories, 0, self.spectrum.shape[2])

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One event: state [B, n, D], the last n events, at most L, and x [B, D] → new state, y [B, D]."""
        assert self.causal, "an event that sees later ones has no step"
        state = torch.cat((state, x[:, None]), 1)[:, -self.window :]
        taps = self.kernel()[: state.shape[1]].flip(0)
        return state, (state * taps).sum(1)
