"""The catalogue as the loss reads it: all columns (:meth:`ItemEncoder.columns`), resident or computed on demand.

V items, C columns. A table that fits the device is normalised once and stays there, in the dtype of the products. A
larger one stays where it is, in float16 and possibly memory-mapped, and only requested rows are normalised: the loss
requests a tile, the batch its own items. So the memory in use does not grow with V.

Where the ranks share the catalogue (:mod:`fmrl_dist.losses.split_catalogue`), the same holds for each rank's slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.losses.item_tiles import RowMatrix
from fmrl_dist.losses.split_catalogue import CatalogueSlice
from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder
from fmrl_dist.training.id_table.item_draws import LeftOut

STREAM = 0x66656174  # "feat": a separate random stream
RESIDENT_BYTES = 2 * 2**30  # on the CPU, for each process
RESIDENT_SHARE = 0.25  # of a GPU's memory
MADE_AT_ONCE = 4096  # items


def columns_dtype(encoder: ItemEncoder, matmul_dtype: torch.dtype | None) -> torch.dtype:
    """Of an encoder's columns: that of the products' inputs, or float32 where these are None or would round codes."""
    return torch.float32 if encoder.has_whole_numbers or matmul_dtype is None else matmul_dtype


class TableColumns:
    """Columns computed from the table's rows when they are requested.

    Args:
        encoder: on the device of the products; normalises the columns.
        table: float16 values and masks, on the CPU.
        dtype: of the columns.
    """

    def __init__(self, encoder: ItemEncoder, table: ItemTable, dtype: torch.dtype) -> None:
        self._encoder, self._table, self._dtype = encoder, table, dtype

    @property
    def shape(self) -> Sequence[int]:
        return len(self._table.values), self._encoder.num_columns

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        device = self._encoder.bias.device
        rows = rows if isinstance(rows, slice) else rows.to(self._table.values.device)
        values, present = self._table.values[rows].to(device), self._table.present[rows].to(device)
        return self._encoder.columns(self._encoder.normalize(values, present), present).to(self._dtype)


class FeatureDropout:
    """Leaves features of a random share of the items out of a step, each feature by itself; stand-ins take their place.

    So a model learns to bear items that lack one. It is left out wherever an item occurs: as input, target, candidate.

    Args:
        encoder: of the columns.
        rate: share of the items, for each feature.
        seed: of the run.
    """

    def __init__(self, encoder: ItemEncoder, rate: float, seed: int) -> None:
        self._encoder = encoder
        self._of_features = [LeftOut(rate, STREAM, seed, feature) for feature in range(len(encoder.feature_dims))]

    def begin_step(self, step: int) -> None:
        """Choose what ``step`` leaves out; the same on all ranks, for all micro-batches."""
        for left_out in self._of_features:
            left_out.begin_step(step)

    def __call__(self, columns: Tensor, ids: Tensor) -> Tensor:
        """Columns [n, C] of items, int64 [n], without what is left out."""
        return self._encoder.leave_out(columns, torch.stack([left_out(ids) for left_out in self._of_features], 1))


class DroppedColumns:
    """A matrix of columns, read through :class:`FeatureDropout`; its first row is of item ``first_item``."""

    def __init__(self, matrix: RowMatrix, dropout: FeatureDropout, first_item: int = 0) -> None:
        self._matrix, self._dropout, self._first_item = matrix, dropout, first_item

    @property
    def shape(self) -> Sequence[int]:
        return self._matrix.shape

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        columns = self._matrix[rows]
        ids = torch.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows
        return self._dropout(columns, ids.to(columns.device) + self._first_item)


class SomeRows:
    """Some rows of a matrix, in order, as a matrix of their own."""

    def __init__(self, matrix: RowMatrix, rows: Tensor) -> None:
        self._matrix, self._rows = matrix, rows

    @property
    def shape(self) -> Sequence[int]:
        return len(self._rows), self._matrix.shape[1]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._matrix[self._rows[rows]]


def catalogue_columns(encoder: ItemEncoder, table: ItemTable, dtype: torch.dtype) -> RowMatrix:
    """All items' columns [V, C] on the encoder's device, resident if the device has room for them."""
    made = TableColumns(encoder, table, dtype)
    device = encoder.bias.device
    num_items, num_columns = made.shape
    num_bytes = num_items * num_columns * dtype.itemsize
    on_gpu = device.type == "cuda"
    room = RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory if on_gpu else RESIDENT_BYTES
    if num_bytes > room:
        return made
    resident = torch.empty(num_items, num_columns, dtype=dtype, device=device)
    for begin in range(0, num_items, MADE_AT_ONCE):
        resident[begin : begin + MADE_AT_ONCE] = made[begin : begin + MADE_AT_ONCE]
    return resident


def slice_bounds(num_items: int, num_ranks: int) -> list[int]:
    """First item that each rank scores, then V: V / W items each, or one more."""
    return [num_items * rank // num_ranks for rank in range(num_ranks + 1)]


def catalogue_slice(
    encoder: ItemEncoder, table: ItemTable, dtype: torch.dtype, rank: int, num_ranks: int
) -> CatalogueSlice:
    """The items that ``rank`` scores (:func:`slice_bounds`); of their columns, as :func:`catalogue_columns`."""
    begin, end = slice_bounds(len(table.values), num_ranks)[rank : rank + 2]
    rows = ItemTable(table.dims, table.values[begin:end], table.present[begin:end])
    return CatalogueSlice(catalogue_columns(encoder, rows, dtype), begin)
