"""How many cases a fuzzer runs, and how a failing one says how to repeat it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

FACTOR = float(os.environ.get("FMRL_FUZZ", "1"))
IS_LARGE = FACTOR >= 2  # commands that start others, which takes seconds, are then in every fuzzer
ONLY = os.environ.get("FMRL_FUZZ_SEED")


def seeds(number: int) -> list[int]:
    """The seeds of ``number`` cases, times ``FMRL_FUZZ``."""
    return [int(ONLY)] if ONLY else list(range(max(1, round(number * FACTOR))))


@contextmanager
def repeatable(seed: int) -> Iterator[np.random.Generator]:
    """A case's random generator; any exception gets a note with the seed."""
    try:
        yield np.random.default_rng(seed)
    except BaseException as error:
        error.add_note(f"repeat this case with FMRL_FUZZ_SEED={seed}")
        raise
