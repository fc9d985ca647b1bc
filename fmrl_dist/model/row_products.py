"""Products of rows with a matrix in which equal rows stay equal, to the last bit, wherever and however many they are.

A matrix library rounds by a product's shape and, at its edges, by the place within it. Items with the same features
would then differ in their last digit, and not tie. Products whose lengths are all multiples of 16 have no such edges,
and those of at least 16 rows are cut alike, as measured (docs/decisions.md, 94); so zeros fill what is missing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16


def linear_of_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ for x [n, k] and weight [m, k]: [n, m]; each row depends on the row of x alone."""
    depth, width = -x.shape[1] % MULTIPLE, -len(weight) % MULTIPLE
    return F.linear(padded(x, max(MULTIPLE - len(x), 0), depth), padded(weight, width, depth))[: len(x), : len(weight)]


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with zeros below and to its right; itself where there is nothing to add."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix
