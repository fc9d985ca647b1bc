"""What each size costs to keep: parameters and bytes, counted in the model itself.

V items, D the width, m a size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fmrl_dist.checkpoint.restore import construct_model
from fmrl_dist.config.model_section import ModelConfig
from fmrl_dist.deploy.session import HEADER_LENGTH, ROW_PARTS
from fmrl_dist.model.nested import nested_mask
from fmrl_dist.model.stored_tensors import DTYPES, is_matrix

ITEMSIZE = dict(zip(DTYPES, (4, 2, 1), strict=True))
FLOAT = 4
SEEN_ITEM_BYTES = FLOAT * ROW_PARTS  # of a user's state, for each item that the user has seen
MOMENTS = 2  # that AdamW keeps of each parameter
START_ROW = "encoder.bias"  # what is needed of the item encoder to serve, not to embed items


@dataclass(frozen=True)
class SizeCost:
    """The model of one size, as ``FMRLRec.truncate`` cuts it out."""

    size: int
    parameters: int  # all that are trained
    masked: int  # of them those that the nesting keeps at 0
    # by dtype, as exports store them: what one event needs beside item vectors (blocks, norms, the start row)
    network_bytes: Mapping[str, int]
    item_bytes: Mapping[str, int]  # by dtype: of all item vectors
    state_bytes: int  # of a user's session at most, float32, without SEEN_ITEM_BYTES for each item seen

    @property
    def device_bytes(self) -> int:
        """Network and item vectors, float32: what a device holds that serves this size."""
        return self.network_bytes["float32"] + self.item_bytes["float32"]

    @property
    def moment_bytes(self) -> int:
        """What AdamW remembers while it trains a model of this size."""
        return MOMENTS * FLOAT * self.parameters


def size_costs(
    config: ModelConfig, feature_dims: Mapping[str, int], num_items: int, max_length: int
) -> dict[int, SizeCost]:
    """Costs of each trained size, counted in a model of that size; of the id table, nothing is allocated.

    Args:
        config: of the run.
        feature_dims: of the features that its model reads.
        num_items: of the catalogue.
        max_length: events of a history that are read.
    """
    return {size: _cost(config, feature_dims, num_items, max_length, size) for size in config.sizes}


def _cost(config: ModelConfig, feature_dims: Mapping[str, int], num_items: int, max_length: int, size: int) -> SizeCost:
    sizes = tuple(s for s in config.sizes if s <= size)
    without_ids = replace(config, sizes=sizes, features=None, id_table=False, id_width=0)  # of a run of ids alone, too
    model = construct_model(without_ids, dict(feature_dims), 0, None)
    named = dict(model.named_parameters())
    id_table = num_items * min(config.id_width or size, size) if config.has_ids else 0
    served = {name for name in named if not name.startswith("encoder.") or name == START_ROW}
    zeros = int((nested_mask(sizes) == 0).sum())
    masked = sum(
        parameter.numel() // size**2 * zeros
        for name, parameter in named.items()
        if name.startswith("blocks.") and parameter.shape[-2:] == (size, size)
    )
    in_memory = 2 * model.depth * size + size if config.mixer == "lru" else ROW_PARTS * max_length
    return SizeCost(
        size=size,
        parameters=sum(parameter.numel() for parameter in named.values()) + id_table,
        masked=masked,
        network_bytes={
            dtype: sum(_stored_bytes(p.shape, is_matrix(name, p), dtype) for name, p in named.items() if name in served)
            for dtype in DTYPES
        },
        item_bytes={dtype: _stored_bytes((num_items, size), True, dtype) for dtype in DTYPES},
        state_bytes=FLOAT * (HEADER_LENGTH + in_memory),
    )


def _stored_bytes(shape: Sequence[int], is_matrix: bool, dtype: str) -> int:
    """Of a tensor in an export; int8 has a float32 scale per row (:mod:`fmrl_dist.model.stored_tensors`)."""
    if not is_matrix:
        return FLOAT * math.prod(shape)
    return ITEMSIZE[dtype] * math.prod(shape) + (FLOAT * math.prod(shape[:-1]) if dtype == "int8" else 0)
