"""One feature of all items, as every source of features returns it, and the libraries that its rows passed through.

A recipe says how a row is made. Versions of libraries are recorded beside it, for somebody who compares two stores, but
are no part of it: a library's next version may round differently, and seldom more. Kept rows are of one version all the
same (``shards.encodings``), so that a store's record is true of every row.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fmrl_dist.data.store.manifest import Feature
from shards.images.causes import ImageCounts

PACKAGES: dict[str, tuple[str, ...]] = {
    "npy": ("numpy",),
    "tfidf": ("numpy", "scipy", "scikit-learn"),
    "pixels": ("numpy", "pillow"),
    "transformers": ("torch", "transformers", "tokenizers"),
    "open_clip": ("torch", "open_clip_torch", "pillow"),
    "pq": ("numpy", "faiss-cpu"),
}


@dataclass(frozen=True)
class TextCounts:
    """What became of the texts of one feature."""

    num_given: int  # items that have one
    num_cut: int  # items whose text is longer than the encoder reads
    max_tokens: int  # that it reads


@dataclass(frozen=True)
class ItemFeature:
    """A feature of all V items. An item without it is *absent*: its row is zero and its ``present`` is false."""

    name: str
    rows: np.ndarray  # [rows, dim], floating; may be memory-mapped
    present: np.ndarray  # bool [V]
    encoder: str  # what made the rows, as the manifest names it
    revision: str  # of the encoder's weights or code, or the sha256 of a precomputed array
    # with the revision, all that makes a row of an item's text or image, as JSON values; rows of two stores whose
    # recipe and revision are the same differ by rounding at most
    recipe: dict[str, Any]
    device: str = ""  # that computed the rows, such as cpu, of an encoder that can choose
    fit: bytes = b""  # file of what the encoder was fitted to, of one that is
    note: str = ""  # what a summary should say about absent items
    # row of ``rows`` of each item, int64 [V], -1 for an item that has none; None: an item's row is its own
    source_rows: np.ndarray | None = None
    images: ImageCounts | None = None  # what became of the images that it was made of
    texts: TextCounts | None = None  # what became of the texts, where an encoder reads only so much of each

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
            recipe=json.loads(json.dumps(self.recipe)),  # with lists for tuples, as it will be read
        )

    def block_fields(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Block fields of the items ``ids``: float16 [n, dim] and, if any item of the catalogue is absent, bool [n]."""
        sources = ids if self.source_rows is None else self.source_rows[ids]
        values = np.ascontiguousarray(self.rows[sources], np.float16)
        values[sources < 0] = 0
        fields = {self.name: values}
        if self.manifest_entry.masked:
            fields[f"{self.name}.mask"] = self.present[ids]
        return fields


def versions_of(*sources: str) -> dict[str, str]:
    """Python's version, and that of each package that these sources of features use."""
    return {"python": platform.python_version()} | packages_of(*sources)


def packages_of(*sources: str) -> dict[str, str]:
    """The version of each package that these sources of features use."""
    packages = sorted({package for source in sources for package in PACKAGES[source]})
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # installed without its metadata
        return "unknown"
