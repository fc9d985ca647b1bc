"""The packed scan against one event at a time and against a padded parallel scan as in the paper.

Histories of one length, width 1024, forward and backward. The padded scan gives every history 50 positions (more where
it is longer), as the authors' code does, and doubles its reach each round over all of them. Results and gradients
are compared first, and nothing is reported if they differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import describe_setting
from benchmarks.measuring.timing import interleave
from fmrl_dist.base.errors import run_command
from fmrl_dist.model.scan import complex_mul, packed_scan

WIDTH = 1024
LENGTHS = (5, 10, 50, 200, 2000)
PADDED_LENGTH = 50
BOUND = 1e-4
Scan = Callable[[Tensor, Tensor], Tensor]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=2000, help="in all, cut into histories of each length")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    for name, value in describe_setting().items():
        print(f"{name:<10} {value}")
    print(f"\n{arguments.events:,} events, width {WIDTH}, forward and backward\n")
    print("| history | packed, s | one by one, s | times packed | padded parallel, s | times packed |")
    print("|---|---|---|---|---|---|", flush=True)
    for length in LENGTHS:
        print(compare(length, max(arguments.events // length, 1), arguments.rounds), flush=True)


def compare(length: int, num_histories: int, rounds: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    phase = torch.rand(WIDTH) * 6
    decay = (0.1 * torch.stack((phase.cos(), phase.sin()))).requires_grad_()  # |Λ| at the ring's usual radius
    x = torch.randn(num_histories * length, 2, WIDTH, requires_grad=True)
    starts = torch.arange(num_histories + 1) * length
    upstream = torch.randn_like(x)
    scans: dict[str, Scan] = {
        "packed": lambda decay, x: packed_scan(decay, x, starts),
        "one by one": lambda decay, x: packed_scan(decay, x, starts, impl="plain"),
        "padded": lambda decay, x: padded_scan(decay, x, num_histories, length),
    }
    results = {name: torch.autograd.grad(scan(decay, x), (decay, x), upstream) for name, scan in scans.items()}
    for name, gradients in results.items():
        for found, expected in zip(gradients, results["one by one"], strict=True):
            if (found - expected).norm() > BOUND * expected.norm():
                print(f"NOT EQUAL: gradients of {name} differ; nothing is reported", file=sys.stderr)
                sys.exit(1)

    def timed(scan: Scan) -> Callable[[int], object]:
        return lambda _: torch.autograd.grad(scan(decay, x), (decay, x), upstream)

    times = interleave({name: timed(scan) for name, scan in scans.items()}, rounds)
    ours = times["packed"]
    others = [f"{times[name]} | {times[name].over(ours)}" for name in ("one by one", "padded")]
    return f"| {length:,} | {ours} | {' | '.join(others)} |"


def padded_scan(decay: Tensor, x: Tensor, num_histories: int, length: int) -> Tensor:
    """Doubling over a rectangle of left-padded histories, through autograd."""
    padded = max(length, PADDED_LENGTH)
    h = F.pad(x.view(num_histories, length, 2, WIDTH), (0, 0, 0, 0, padded - length, 0))
    power, distance = decay, 1
    while distance < padded:
        moved = complex_mul(power, h[:, :-distance])
        h = torch.cat((h[:, :distance], h[:, distance:] + moved), 1)
        power, distance = complex_mul(power, power), 2 * distance
    return h[:, padded - length :].reshape(x.shape)


if __name__ == "__main__":
    run_command(main)
