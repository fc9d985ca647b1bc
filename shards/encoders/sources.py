"""Item features for the store: a precomputed array, or what an encoder makes of the items' texts or images.

An item that a source says nothing about is *absent*: its row is zero and its mask false. ``V`` items, width ``dim``.
A precomputed array stays on disk, memory-mapped, as does what the pretrained encoders make; the two light encoders
(``tfidf``, ``pixels``) hold float16 [V, dim].
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import (
    NpyFeature,
    OpenClipFeature,
    PixelsFeature,
    TextFeature,
    TfidfFeature,
    TransformersFeature,
)
from fmrl_dist.config.sections import DataConfig
from fmrl_dist.data.store.manifest import Feature
from shards.encoders.encoding import Encoded
from shards.encoders.item_text import item_texts
from shards.tables.tables import ItemIds

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


def make_feature(name: str, data: DataConfig, items: pa.Table, ids: ItemIds, encoding: Path) -> FeatureRows:
    """Feature ``name`` of all items, from the source that the config names.

    Args:
        name: of the feature.
        data: the config's section.
        items: the item table, with the columns of the texts.
        ids: the items' ids, in the same order.
        encoding: folder in which an encoder keeps finished blocks.

    Raises:
        UserError: the source cannot be read, does not fit the items, or no item has the feature.
    """
    config, root = data.features[name], Path(data.root)
    match config:
        case NpyFeature():
            return _from_npy(name, root / config.path, config.dim, len(ids.external))
        case TfidfFeature():
            encoder = _import_encoder("shards.encoders.tfidf", name, "shards")
            encoded: Encoded = encoder.encode_texts(name, config.dim, *_texts(config, data, items))
        case PixelsFeature():
            encoder = _import_encoder("shards.encoders.pixels", name, "shards")
            encoded = encoder.encode_images(config, root, ids)
        case TransformersFeature():
            encoder = _import_encoder("shards.encoders.text_encoder", name, "text")
            encoded = encoder.encode_texts(name, config, *_texts(config, data, items), encoding)
        case OpenClipFeature():
            encoder = _import_encoder("shards.encoders.image_encoder", name, "images")
            encoded = encoder.encode_images(name, config, root, ids, encoding)
    present = encoded.present
    if not present.any():
        raise UserError(
            f"feature {name!r}: no item has it; check its columns and that its item ids are the item table's"
        )
    dim, num_present = encoded.rows.shape[1], int(present.sum())
    info = Feature(name, dim, "float16", encoded.encoder, encoded.revision, num_present, not bool(present.all()))
    return FeatureRows(info, encoded.rows, present, encoded.note)


def _texts(config: TextFeature, data: DataConfig, items: pa.Table) -> tuple[list[str], np.ndarray]:
    return item_texts(items, config.text or data.text, data.text_separator)


def _import_encoder(module: str, feature: str, extra: str) -> ModuleType:
    """An encoder whose packages come with an extra, which other features do without."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"feature {feature!r} needs {error.name}; install it with pip install -e '.[{extra}]'"
        ) from None


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
