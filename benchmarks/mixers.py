"""A step of each mixer at several history lengths against plain PyTorch: the same weights, padded and not fused.

Forward and backward of one mixer, 128 channels of sizes 8 … 128, about ``--rows`` events in all. "mixed" are lengths as
those of Beauty, geometric with a mean of 9 and at most 50, where padding to the longest costs plain code the most.

    lru                 plain: one event at a time over the padded batch, complex64
    attention           plain: dense masked softmax(QKᵀ/√d)V over the padded batch
    bidirectional       likewise, with the padding masked
    filter, circular    plain: FFTs of the padded batch, of twice the longest length, or of the window
    bsarec              plain: both

Both sides' outputs are compared first; nothing is reported where they differ. Instead, ``--scans`` times the recurrence
alone, the CPU's two scans, and ``--dropouts`` our dropout against PyTorch's; forward and backward, too.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import describe_setting
from benchmarks.measuring.timing import forget_peak, in_child, interleave, peak_resident_bytes
from fmrl_dist.base.errors import require, run_command
from fmrl_dist.model.dropout import NestedDropout
from fmrl_dist.model.mixers.attention import Attention, rotate
from fmrl_dist.model.mixers.bsarec import BSARec, low_pass_kernel
from fmrl_dist.model.mixers.filter import Filter
from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.mixers.mixing import MIXERS, Mixing, build_mixer
from fmrl_dist.model.nested import nested_mask
from fmrl_dist.model.scan import packed_scan

SIZES = (8, 16, 32, 64, 128)
LENGTHS = ("mixed", "50", "200", "1000", "5000")
TOLERANCE = 1e-4  # of the largest output: float32, sums in another order


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.mixers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--rows", type=int, default=10_000, help="events of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scans", action="store_true")
    parser.add_argument("--dropouts", action="store_true")
    parser.add_argument("--memory-of", nargs=3, metavar=("MIXER", "LENGTH", "SIDE"), help="only print its peak memory")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.memory_of:
        mixer, length, side = arguments.memory_of
        step = make_steps(mixer, lengths_of(length, arguments.rows), compared=False)[side]
        before = peak_resident_bytes()
        forget_peak()
        step(0)
        print(max(peak_resident_bytes() - before, 0))
        return
    for name, value in describe_setting().items():
        print(f"{name:<12} {value}")
    if arguments.scans:
        compare_scans(arguments.lengths, arguments.rows, arguments.rounds)
        return
    if arguments.dropouts:
        compare_dropouts(arguments.rows, arguments.rounds)
        return
    print("\n| mixer | events of a history | ours | plain | plain / ours | memory, ours | plain |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for mixer, length in itertools.product(arguments.mixers, arguments.lengths):
        steps = make_steps(mixer, lengths_of(length, arguments.rows))
        times = interleave(steps, arguments.rounds)
        given = ["--rows", str(arguments.rows), "--threads", str(arguments.threads), "--memory-of", mixer, length]
        ours, plain = (int(in_child("benchmarks.mixers", *given, side)) / 2**20 for side in steps)
        ratio = times["plain"].over(times["ours"])
        print(
            f"| {mixer} | {length} | {times['ours']} | {times['plain']} | {ratio} | {ours:.0f} MiB | {plain:.0f} MiB |"
        )


def lengths_of(name: str, num_rows: int) -> list[int]:
    """Events of each history of a step."""
    if name != "mixed":
        return [int(name)] * max(num_rows // int(name), 1)
    drawn = np.random.default_rng(0).geometric(1 / 9, num_rows).clip(max=50)
    return drawn[: int(np.searchsorted(drawn.cumsum(), num_rows))].tolist()


def compare_scans(names: list[str], num_rows: int, rounds: int) -> None:
    """The recurrence by the doubling and by the stepwise scan."""
    print("\n| channels | events of a history | stepwise | doubling | doubling / stepwise |")
    print("|---:|---:|---:|---:|---:|")
    for width, name in itertools.product((32, 128, 512), names):
        lengths = lengths_of(name, num_rows)
        starts = torch.tensor([0, *itertools.accumulate(lengths)])
        x = torch.randn(int(starts[-1]), 2, width, requires_grad=True)
        modulus, angle = 0.5 + 0.49 * torch.rand(width), 2 * math.pi * torch.rand(width)
        decay = torch.stack((modulus * angle.cos(), modulus * angle.sin())).requires_grad_()

        def run(impl: str, x: Tensor = x, decay: Tensor = decay, starts: Tensor = starts) -> Tensor:
            states = packed_scan(decay, x, starts, impl)
            states.sum().backward()
            return states

        torch.testing.assert_close(run("stepwise"), run("doubling"), rtol=1e-3, atol=1e-3)
        times = interleave({impl: lambda _, i=impl: run(i) for impl in ("stepwise", "doubling")}, rounds)  # type: ignore[misc]
        ratio = times["doubling"].over(times["stepwise"])
        print(f"| {width} | {name} | {times['stepwise']} | {times['doubling']} | {ratio} |")


def compare_dropouts(num_rows: int, rounds: int) -> None:
    """Rates by size, at once, against one rate; both keep what they should, within five deviations."""
    print("\n| channels | rows | ours | PyTorch's | PyTorch's / ours |")
    print("|---:|---:|---:|---:|---:|")
    for width in (32, 128, 512):
        sizes = tuple(size for size in (8, 16, 32, 64, 128, 256, 512) if size <= width)
        modules = {"ours": NestedDropout(sizes, 0.5, 0.4), "torch": nn.Dropout(0.5)}
        x = torch.randn(num_rows, width, requires_grad=True)
        for module in modules.values():
            dropped = float((module(x)[:, sizes[-2] :] == 0).double().mean())
            require(
                abs(dropped - 0.5) < 2.5 / math.sqrt(num_rows * (width - sizes[-2])),
                f"{type(module).__name__} drops {dropped:.4f} of the last channels, not half; nothing is reported",
            )

        def run(name: str, x: Tensor = x, modules: dict[str, nn.Module] = modules) -> None:
            modules[name](x).sum().backward()

        times = interleave({name: lambda _, n=name: run(n) for name in modules}, rounds)  # type: ignore[misc]
        ratio = times["torch"].over(times["ours"])
        print(f"| {width} | {num_rows:,} | {times['ours']} | {times['torch']} | {ratio} |")


def make_steps(
    mixer: str, lengths: list[int], compared: bool = True, device: str | torch.device = "cpu"
) -> dict[str, Callable[[int], object]]:
    """Forward and backward of both sides, which agree."""
    torch.manual_seed(0)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    window = max(lengths)
    module = build_mixer(Mixing(mixer, 0.5, 0.99, 32, "rotary", window), SIZES, None, "auto").to(device)
    x = torch.randn(int(starts[-1]), SIZES[-1], device=device, requires_grad=True)
    sides = {"ours": lambda: module(x, starts), "plain": lambda: plain(module, x, starts)}
    if compared:
        with torch.no_grad():
            found, expected = (side() for side in sides.values())
        difference = float((found - expected).abs().max() / expected.abs().max())
        require(difference < TOLERANCE, f"{mixer}: both sides differ by {difference:.1e}; nothing is reported")

    def step(side: Callable[[], Tensor]) -> Callable[[int], object]:
        def run(_: int) -> None:
            x.grad = None
            module.zero_grad()
            side().sum().backward()

        return run

    return {name: step(side) for name, side in sides.items()}


def plain(module: nn.Module, x: Tensor, starts: Tensor) -> Tensor:
    """The mixer of ``module``'s weights, in plain PyTorch over a padded batch."""
    lengths = starts.diff()
    is_row = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]  # [B, L]
    padded = x.new_zeros(*is_row.shape, x.shape[1]).masked_scatter(is_row[..., None], x)
    if isinstance(module, LRU):
        return _plain_lru(module, padded)[is_row]
    if isinstance(module, Attention):
        return _plain_attention(module, padded, is_row)[is_row]
    if isinstance(module, Filter):
        return _plain_filter(module.kernel(), padded, module.causal)[is_row]
    assert isinstance(module, BSARec)
    kernel = low_pass_kernel(module.attention.window, module.low_pass).to(x)[:, None].expand(-1, x.shape[1])
    low = _plain_filter(kernel, padded, causal=False)
    rescaled = low + module.beta.square() * (padded - low)
    share = module.low_pass_share
    return (share * rescaled + (1 - share) * _plain_attention(module.attention, padded, is_row))[is_row]


def _plain_lru(module: LRU, padded: Tensor) -> Tensor:
    mask = nested_mask(module.sizes).to(padded)
    real, imaginary = (F.linear(padded, module.B[part] * mask, module.b[part]) for part in (0, 1))
    driven = torch.complex(real, imaginary) * torch.exp(module.gamma_log)
    decay = torch.complex(*module.decay())
    state, states = torch.zeros_like(driven[:, 0]), []
    for event in driven.unbind(1):
        state = decay * state + event
        states.append(state)
    read = torch.complex(module.C[0] * mask, module.C[1] * mask)
    return F.linear(torch.stack(states, 1), read).real + module.c


def _plain_attention(module: Attention, padded: Tensor, is_row: Tensor) -> Tensor:
    mask = nested_mask(module.sizes).to(padded)
    qkv = [F.linear(padded, module.qkv[part] * mask, module.qkv_bias[part]) for part in range(3)]
    places = torch.arange(padded.shape[1], device=padded.device)
    turned = [rotate(rows.transpose(0, 1), places, module.heads).transpose(0, 1) for rows in qkv[:2]]
    seen = is_row[:, None, None, :]
    if module.causal:
        seen = torch.ones(len(places), len(places), dtype=torch.bool, device=padded.device).tril()
    mixed = []
    for low, high, width in module.heads:
        q, k, v = (rows[..., low:high].unflatten(2, (-1, width)).transpose(1, 2) for rows in (*turned, qkv[2]))
        scores = (q @ k.transpose(2, 3) / math.sqrt(width)).masked_fill(~seen, -torch.inf)
        mixed.append((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
    return F.linear(torch.cat(mixed, 2), module.out * mask, module.out_bias)


def _plain_filter(kernel: Tensor, padded: Tensor, causal: bool) -> Tensor:
    period = 2 * len(kernel) if causal else len(kernel)
    spectrum = torch.fft.rfft(padded, period, dim=1) * torch.fft.rfft(kernel, period, dim=0)
    return torch.fft.irfft(spectrum, period, dim=1)[:, : padded.shape[1]]


if __name__ == "__main__":
    run_command(main)
