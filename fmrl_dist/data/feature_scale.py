"""How features enter the model: (x - shift)·scale, from statistics over the items that have them.

F features' total dim, M features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fmrl_dist.data.item_rows import block_rows
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.data.store.manifest import Block
from fmrl_dist.data.store.reader import Store

SUMMED_AT_ONCE = 65536  # rows
MIN_VARIANCE = 1e-12
MEAN_SQUARED_LENGTH = 9.0
FITTED = ("standardize", "length")  # scales that need statistics

FeatureParts = tuple[Tensor, Tensor]  # values float16 [n, F], present bool [n, M]


def feature_sums(dims: Mapping[str, int], parts: Iterable[FeatureParts]) -> Tensor:
    """Number, sum and sum of squares of the present rows in each dimension, float64 [3, F]."""
    widths = torch.tensor(list(dims.values()), dtype=torch.int64)
    sums = torch.zeros(3, sum(dims.values()), dtype=torch.float64)
    for values, present in parts:
        rows = values.double()  # absent rows are zero
        sums += torch.stack((present.sum(0).repeat_interleave(widths), rows.sum(0), rows.square().sum(0)))
    return sums


def feature_affine(dims: Mapping[str, int], sums: Tensor | None, scale: str | float) -> tuple[Tensor, Tensor]:
    """Shift [F] and scale [F], float32.

    Args:
        dims: feature → dim, in the order of the columns.
        sums: from :func:`feature_sums`; needed for those of ``FITTED``.
        scale: "none"; a number, by which every feature is multiplied; or one of ``FITTED``: each dimension's mean is
            subtracted and each feature divided by one number, so that its mean variance is 1 ("standardize"), or the
            mean squared length of its rows is ``MEAN_SQUARED_LENGTH`` ("length").
    """
    total = sum(dims.values())
    shift, factor = torch.zeros(total), torch.ones(total)
    if scale not in FITTED:
        return shift, factor * scale if isinstance(scale, float) else factor
    assert sums is not None
    begin = 0
    for dim in dims.values():
        columns = slice(begin, begin + dim)
        counts, first, second = sums[:, columns]
        if dim and counts[0] > 1:
            mean = first / counts
            variances = (second - counts * mean.square()) / (counts - 1)
            shift[columns] = mean.float()
            wanted = 1.0 if scale == "standardize" else MEAN_SQUARED_LENGTH / dim
            factor[columns] = (wanted / variances.mean().clamp_min(MIN_VARIANCE)).sqrt().float()
        begin += dim
    return shift, factor


def table_parts(table: ItemTable, fitted: Tensor | None = None) -> Iterator[FeatureParts]:
    """The rows of a table, in chunks; without those of items that are not ``fitted``, bool [V]."""
    for low in range(0, len(table.values), SUMMED_AT_ONCE):
        rows = slice(low, low + SUMMED_AT_ONCE)
        yield _only(table.values[rows], table.present[rows], None if fitted is None else fitted[rows])


def block_parts(
    store: Store, blocks: Iterable[Block], dims: Mapping[str, int], fitted: Tensor | None = None
) -> Iterator[FeatureParts]:
    """The rows of some item blocks, block by block; without those of items that are not ``fitted``, bool [V]."""
    for block in blocks:
        arrays = store.read_block(block)
        rows = block_rows(arrays, "ids", dims)
        of_block = None if fitted is None else fitted[torch.tensor(arrays["ids"])]
        yield _only(torch.from_numpy(rows.values), torch.from_numpy(rows.present), of_block)


def _only(values: Tensor, present: Tensor, fitted: Tensor | None) -> FeatureParts:
    """``values`` and ``present`` of the ``fitted`` rows."""
    return (values, present) if fitted is None else (values[fitted], present[fitted])
