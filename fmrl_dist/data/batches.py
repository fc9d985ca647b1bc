"""Packed histories, as the model takes them, and the blocks of users that an evaluation ranks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.data.item_rows import block_rows, pick
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.windows import ragged_rows


@dataclass(frozen=True)
class Packed:
    """Packed histories: N items, B histories or windows.

    Inline features are those of the ``n`` distinct items that the model needs for this batch.
    """

    users: Tensor  # int64 [B], internal ids
    items: Tensor  # int64 [N], oldest first
    starts: Tensor  # int64 [B+1], first row of each history, then N
    from_start: Tensor  # bool [B], whether a start position precedes the first item
    targets: Tensor  # int64: one per position in training [N + from_start.sum()], one per history in evaluation [B]
    feature_ids: Tensor | None = field(default=None, kw_only=True)  # int64 [n], sorted
    feature_values: Tensor | None = field(default=None, kw_only=True)  # float16 [n, F]
    feature_present: Tensor | None = field(default=None, kw_only=True)  # bool [n, M]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are not None, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.tensors.items()})


@dataclass(frozen=True)
class SampledBatch(Packed):
    """Training windows for a sampled softmax, in G groups of positions that share their negatives."""

    position_starts: Tensor  # int64 [G+1], first position of each group, then the number of positions
    negatives: Tensor  # int64 [K'], with repetitions
    log_expected: Tensor  # float32 [K'], log of each one's expected count among its group's negatives
    negative_starts: Tensor  # int64 [G+1], first negative of each group, then K'


@dataclass(frozen=True)
class EvaluationBlock(Packed):
    """Users to rank the catalogue for: the model reads their last events, and masking needs all of them."""

    seen: Tensor  # int64, items of the complete histories, including those before the cut
    seen_starts: Tensor  # int64 [B+1], first row of each history in ``seen``


def evaluation_blocks(
    store: Store,
    split: str,
    max_length: int,
    block_numbers: Sequence[int],
    num_users: int = 0,
    inline_dims: Mapping[str, int] | None = None,
) -> Iterator[EvaluationBlock]:
    """The users of some blocks of ``split``: the last ``max_length`` events of each history, the next item as target.

    A damaged block is skipped if the store is read with ``on_bad_shard: skip``.

    Args:
        store: an open store.
        split: "valid" or "test".
        max_length: events kept.
        block_numbers: blocks to read.
        num_users: size of a fixed, evenly spread subset of the split's users; 0 for all.
        inline_dims: features (and their dims) to read from the blocks of an inline store; None reads none.
    """
    blocks = store.manifest.splits[split]
    total = sum(block.count for block in blocks)
    wanted = num_users or total
    begins = np.cumsum([0, *(block.count for block in blocks)])
    for number in block_numbers:
        arrays = store.read_or_skip(blocks[number])
        if arrays is None:
            continue
        positions = begins[number] + np.arange(blocks[number].count)
        rows = np.flatnonzero((positions + 1) * wanted // total > positions * wanted // total)
        begin, target = arrays["starts"][rows], arrays["starts"][rows + 1] - 1
        whole = target - begin
        lengths = np.minimum(whole, max_length)
        items, targets = arrays["items"][ragged_rows(target - lengths, lengths)], arrays["items"][target]
        features = {}
        if inline_dims is not None:
            taken = pick(
                np.unique(np.concatenate((items, targets))),
                [block_rows(arrays, "block_items", inline_dims)],
                inline_dims,
            )
            features = {f"feature_{name}": torch.from_numpy(value) for name, value in vars(taken).items()}
        yield EvaluationBlock(
            users=torch.from_numpy(arrays["users"][rows]),
            items=torch.from_numpy(items),
            starts=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))),
            from_start=torch.zeros(len(rows), dtype=torch.bool),
            targets=torch.from_numpy(targets),
            seen=torch.from_numpy(arrays["items"][ragged_rows(begin, whole)]),
            seen_starts=torch.from_numpy(np.concatenate(([0], np.cumsum(whole)))),
            **features,
        )
