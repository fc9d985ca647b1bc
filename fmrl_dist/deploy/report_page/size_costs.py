"""What each size costs to keep: parameters and bytes, counted in the model itself.

V items, D the width, m a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fmrl_dist.checkpoint.restore import construct_model
from fmrl_dist.config.sections import ModelConfig
from fmrl_dist.model.nested import nested_mask

DTYPE_BYTES = {"float32": 4, "float16": 2, "int8": 1}
FLOAT = 4
MOMENTS = 2  # that AdamW keeps of each parameter
OF_ITEMS = ("encoder.weight", "encoder.stand_ins")  # needed to embed items, not to serve them


@dataclass(frozen=True)
class SizeCost:
    """The model of one size, as ``FMRLRec.truncate`` cuts it out."""

    size: int
    parameters: int  # all that are trained
    masked: int  # of them those that the nesting keeps at 0
    network_parameters: int  # that one event needs, given item vectors: blocks, norms, the start row
    num_items: int
    state_bytes: int  # of one user between events, float32

    def network_bytes(self, dtype: str = "float32") -> int:
        return self.network_parameters * DTYPE_BYTES[dtype]

    def item_bytes(self, dtype: str = "float32") -> int:
        """Of all item vectors."""
        return self.num_items * self.size * DTYPE_BYTES[dtype]

    def device_bytes(self, dtype: str = "float32") -> int:
        """Network and item vectors: what a device holds that serves this size."""
        return self.network_bytes(dtype) + self.item_bytes(dtype)

    @property
    def moment_bytes(self) -> int:
        """What AdamW remembers while it trains a model of this size."""
        return MOMENTS * FLOAT * self.parameters


def size_costs(config: ModelConfig, feature_dims: Mapping[str, int], num_items: int) -> dict[int, SizeCost]:
    """Costs of each trained size, counted in a model of that size; of the id table, nothing is allocated.

    Args:
        config: of the run.
        feature_dims: of the features that its model reads.
        num_items: of the catalogue.
    """
    return {size: _cost(config, feature_dims, num_items, size) for size in config.sizes}


def _cost(config: ModelConfig, feature_dims: Mapping[str, int], num_items: int, size: int) -> SizeCost:
    sizes = tuple(s for s in config.sizes if s <= size)
    without_ids = replace(config, sizes=sizes, id_table=False, id_width=0)
    model = construct_model(without_ids, dict(feature_dims), 0, None)
    named = dict(model.named_parameters())
    id_table = num_items * min(config.id_width or size, size) if config.has_ids else 0
    zeros = int((nested_mask(sizes) == 0).sum())
    masked = sum(
        parameter.numel() // size**2 * zeros
        for name, parameter in named.items()
        if name.startswith("blocks.") and parameter.shape[-2:] == (size, size)
    )
    return SizeCost(
        size=size,
        parameters=sum(parameter.numel() for parameter in named.values()) + id_table,
        masked=masked,
        network_parameters=sum(p.numel() for name, p in named.items() if name not in OF_ITEMS),
        num_items=num_items,
        state_bytes=FLOAT * model.depth * 2 * size,
    )
