"""The options that all runners share."""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch

MAX_LENGTH = 50  # events that a model reads
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def runner_parser(module: str, description: str | None, factors: int, dropout: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m {module}", description=(description or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sequences.parquet and items.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for MINUTES.npz")
    parser.add_argument("--minutes", type=_minutes, default=[10, 20, 40], help="of training (default: 10,20,40)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--factors", type=int, default=factors, help=f"width of the model (default: {factors})")
    parser.add_argument("--dropout", type=float, default=dropout, help=f"(default: {dropout})")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def prepare_torch(arguments: argparse.Namespace) -> None:
    """Threads and seed, and two settings that speed a rival up on a CPU.

    Denormal numbers are flushed, as in our training. Memory is kept when it is freed (glibc): a full softmax over
    padded histories frees hundreds of MB in each step, and would spend nearly half of its time on getting them back.
    """
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _minutes(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
