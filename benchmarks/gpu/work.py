"""Random work of the size that fills a GPU: a catalogue's columns, packed histories, a training module over them."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrl_dist.data.batches import Packed, SampledBatch
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.module import TrainingModule

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
TOY_SIZES = (4, 8, 20)
FEATURE_DIM = 2048
TOY_FEATURE_DIM = 12
LONGEST = 17  # events of a history; nine on average
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
NUM_NEGATIVES = 1024


def make_columns(num_items: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random columns [V, C] of unit norm, made on the device some rows at a time."""
    generator = torch.Generator(device).manual_seed(0)
    columns = torch.empty(num_items, num_columns, dtype=dtype, device=device)
    for rows in columns.split(100_000):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device) / num_columns**0.5)
    return columns


def make_batch(num_positions: int, num_items: int, device: torch.device, seed: int = 0) -> Packed:
    """Histories of 1 … 17 events with a start position each, ``num_positions`` positions in all."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []  # positions of each history: its start and its inputs
    while sum(lengths) < num_positions:
        length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
        lengths.append(min(length, num_positions - sum(lengths)))
    counts = torch.tensor(lengths)
    events = torch.randint(num_items, (num_positions,), generator=generator)
    is_last = torch.zeros(num_positions, dtype=torch.bool)
    is_last[counts.cumsum(0) - 1] = True
    batch = Packed(
        users=torch.arange(len(lengths)),
        items=events[~is_last],
        starts=torch.tensor([0, *(counts - 1)]).cumsum(0),
        from_start=torch.ones(len(lengths), dtype=torch.bool),
        targets=events,
    )
    return batch.to(device)


def with_negatives(batch: Packed, num_items: int, num_negatives: int = NUM_NEGATIVES) -> SampledBatch:
    """The batch with uniform negatives, the same for all positions."""
    device = batch.targets.device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(num_items, (num_negatives,), generator=generator)
    return SampledBatch(
        **vars(batch),
        position_starts=torch.tensor([0, len(batch.targets)], device=device),
        negatives=ids.to(device),
        log_expected=torch.full((num_negatives,), num_negatives / num_items, device=device).log(),
        negative_starts=torch.tensor([0, num_negatives], device=device),
    )


def make_module(
    columns: Tensor, feature_dim: int, sizes: tuple[int, ...], impl: str, precision: str, mixer: str = "lru"
) -> TrainingModule:
    """A training module with seeded weights on the columns' device; ``columns`` [V, C] as its encoder takes them."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    model = FMRLRec(sizes, 2, {"text": feature_dim}, matmul_dtype=dtype, mixer=mixer).to(columns.device)
    return TrainingModule(model, columns, LossSettings(sizes, impl=impl, dtype=dtype))


def num_columns_of(feature_dim: int) -> int:
    return FMRLRec((8,), 1, {"text": feature_dim}).encoder.num_columns
