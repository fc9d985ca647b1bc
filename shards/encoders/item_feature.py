"""One feature of all items, as every source of features returns it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fmrl_dist.data.store.manifest import Feature


@dataclass(frozen=True)
class ItemFeature:
    """A feature of all V items. An item without it is *absent*: its row is zero and its ``present`` is false."""

    name: str
    rows: np.ndarray  # [V, dim], floating; may be memory-mapped
    present: np.ndarray  # bool [V]
    encoder: str  # what made the rows, as the manifest names it
    revision: str  # of the encoder's weights or code, or the sha256 of a precomputed array
    note: str = ""  # what a summary should say about absent items

    @cached_property
    def manifest_entry(self) -> Feature:
        num_present = int(self.present.sum())
        return Feature(
            name=self.name,
            dim=self.rows.shape[1],
            dtype="float16",
            encoder=self.encoder,
            revision=self.revision,
            present=num_present,
            masked=num_present < len(self.present),
        )

    def block_fields(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Block fields of the items ``ids``: float16 [n, dim] and, if any item of the catalogue is absent, bool [n]."""
        fields = {self.name: np.ascontiguousarray(self.rows[ids], np.float16)}
        if self.manifest_entry.masked:
            fields[f"{self.name}.mask"] = self.present[ids]
        return fields
