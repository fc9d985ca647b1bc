"""Item features for the store: a precomputed array, or a light encoder that needs no weights.

An item that a source says nothing about is *absent*: its row is zero and its mask false. ``V`` items, width ``dim``.
A precomputed array stays on disk, memory-mapped; the encoders hold float16 [V, dim].
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa

from fmrl_dist.config import DataConfig, FeatureConfig
from fmrl_dist.data.store import Feature
from fmrl_dist.errors import UserError
from shards.tables import ItemIds
from shards.text import item_texts

FLOAT16_MAX = 65_504.0
CHECK_VALUES = 1 << 22  # values looked at together when an array is checked


@dataclass(frozen=True)
class FeatureRows:
    """One feature of every item, ready to be cut into blocks."""

    info: Feature
    rows: np.ndarray  # [V, dim], floating
    mask: np.ndarray  # bool [V], true = present
    note: str = ""  # what the summary should say about absent items

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Block fields of the items ``ids``: float16 [n, dim] and, if some item lacks the feature, bool [n]."""
        fields = {self.info.name: np.ascontiguousarray(self.rows[ids], np.float16)}
        if self.info.masked:
            fields[f"{self.info.name}.mask"] = self.mask[ids]
        return fields


def make_feature(name: str, config: FeatureConfig, data: DataConfig, items: pa.Table, ids: ItemIds) -> FeatureRows:
    """Feature ``name`` of all items, from the source that the config names.

    Raises:
        UserError: the source cannot be read, does not fit the items, or no item has the feature.
    """
    path = Path(data.root) / config.path
    if config.source == "npy":
        return _from_npy(name, path, config.dim, len(ids.external))
    if config.source == "tfidf":
        texts, has_text = item_texts(items, config.text or data.text, data.text_separator)
        encoder = _import_encoder("shards.tfidf", name)
        rows, present = encoder.encode_texts(name, texts, has_text, config.dim)
        note = ""
    else:
        encoder = _import_encoder("shards.pixels", name)
        if config.dim not in (0, encoder.DIM):
            raise UserError(f"data.features.{name}.dim is {config.dim}; the pixel descriptor has {encoder.DIM} (or 0)")
        rows, present, note = encoder.encode_images(path, config.id, config.image, ids)
    if not present.any():
        raise UserError(
            f"feature {name!r}: no item has it; check its columns and that its item ids are the item table's"
        )
    masked = not bool(present.all())
    num_present = int(present.sum())
    info = Feature(name, rows.shape[1], "float16", encoder.ENCODER, encoder.REVISION, num_present, masked)
    return FeatureRows(info, rows, present, note)


def _import_encoder(module: str, feature: str) -> ModuleType:
    """An encoder whose packages come with the extra ``[shards]``, which an ``npy`` feature does without."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"feature {feature!r} needs {error.name}; install it with pip install -e '.[shards]'") from None


def _from_npy(name: str, path: Path, dim: int, num_items: int) -> FeatureRows:
    """A precomputed array [V, dim], row = internal id, taken as it is."""
    if not path.is_file():
        raise UserError(f"feature {name!r}: {path} does not exist; check data.root and data.features.{name}.path")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"feature {name!r}: {path} is not a plain .npy array ({error}); save it with numpy.save"
        ) from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f" or rows.shape[1] == 0:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "an archive"
        raise UserError(f"feature {name!r}: {path} holds {found}; expected floats [items, dim]")
    if len(rows) != num_items:
        raise UserError(
            f"feature {name!r}: {path} has {len(rows)} rows but there are {num_items} items; expected one each"
        )
    if dim not in (0, rows.shape[1]):
        raise UserError(
            f"feature {name!r}: {path} has {rows.shape[1]} columns but its dim is {dim}; make them equal, or 0"
        )
    _check_values(name, path, rows)
    with path.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()
    info = Feature(name, rows.shape[1], "float16", "npy", revision, num_items, False)
    return FeatureRows(info, rows, np.ones(num_items, bool))


def _check_values(name: str, path: Path, rows: np.ndarray) -> None:
    step = max(1, CHECK_VALUES // rows.shape[1])
    for low in range(0, len(rows), step):
        part = rows[low : low + step]
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            row = low + int(np.argmin(finite))
            raise UserError(f"feature {name!r}: {path} row {row} holds NaN or infinity; expected finite numbers")
        largest = np.abs(part).max(axis=1)
        if (largest > FLOAT16_MAX).any():
            row = int(np.argmax(largest))
            raise UserError(
                f"feature {name!r}: {path} row {low + row} holds {largest[row]:g}, which overflows float16 "
                f"(at most {FLOAT16_MAX:g}); scale the array down"
            )
