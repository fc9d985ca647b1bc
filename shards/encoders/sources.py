"""From ``data.features.<name>`` to the rows of all items: each source has a module here.

Precomputed arrays and the rows that are kept (``shards.encodings``) stay on disk, memory-mapped. ``tfidf`` and
``pq``, which are fitted to the whole catalogue, hold float16 [V, dim] in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parts import Part
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.features import (
    FeatureConfig,
    NpyFeature,
    OpenClipFeature,
    PixelsFeature,
    PqFeature,
    TextFeature,
    TfidfFeature,
    TransformersFeature,
)
from shards.encoders.fitted import product_codes
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import ItemTexts, item_texts, parts_for
from shards.encoders.precomputed import open_precomputed, read_precomputed
from shards.tables.item_ids import ItemIds


def make_feature(
    name: str,
    data: DataConfig,
    items: pa.Table,
    ids: ItemIds,
    encodings: Path,
    files: Mapping[str, str],
    may_lack: bool = False,
    source_rows: np.ndarray | None = None,
    num_source_rows: int = 0,
    fitted: np.ndarray | None = None,
    made: Mapping[str, ItemFeature] | None = None,
) -> ItemFeature:
    """Feature ``name`` of all items, from the source that the config names.

    Args:
        name: of the feature.
        data: the config's section.
        items: the item table, with the columns of the texts.
        ids: the items' ids, in the same order.
        encodings: folder in which encoders keep rows (``shards.encodings``).
        files: hashes of the input files, by config key (``shards.store.inputs``).
        may_lack: whether all items may lack the feature; a catalogue's may not.
        source_rows: row of the whole item table of each item, see ``RawItems``; None: ``items`` is the whole table.
        num_source_rows: of that table.
        fitted: which items a feature may be fitted to, bool [V]; None: all.
        made: the features of these items that exist already, among them the one that a feature of codes quantises.

    Raises:
        UserError: the source cannot be read, does not fit the items, or no item has the feature.
    """
    config, root = data.features[name], Path(data.root)
    feature: ItemFeature
    template = template_of(config, data, items.column_names) if isinstance(config, TextFeature) else {}
    match config:
        case NpyFeature():
            sha256 = files.get(f"data.features.{name}.path", "")
            num_rows = len(ids.external) if source_rows is None else num_source_rows
            feature = read_precomputed(name, config, root, num_rows, sha256, source_rows)
        case TfidfFeature():
            encoder = import_encoder("shards.encoders.fitted.tfidf", name, "shards")
            feature = encoder.encode_texts(name, config, _texts(template, items), template, fitted)
        case PixelsFeature():
            encoder = import_encoder("shards.encoders.pixels", name, "shards")
            feature = encoder.encode_images(name, config, root, ids, encodings)
        case TransformersFeature():
            encoder = import_encoder("shards.encoders.text_feature", name, "text")
            feature = encoder.encode_texts(name, config, _texts(template, items), encodings)
        case OpenClipFeature():
            encoder = import_encoder("shards.encoders.image_encoder", name, "images")
            feature = encoder.encode_images(name, config, root, ids, encodings)
        case PqFeature():
            feature = product_codes.encode_rows(name, config, (made or {})[config.of], fitted)
    if feature.images is not None and not may_lack:
        feature.images.check(name, data.dirt.max_bad_images)
    if not feature.present.any() and not may_lack:
        mend = (
            "all rows of its array are zeros; compute it again"
            if isinstance(config, NpyFeature)
            else "check its columns, and that its item ids are those of the item table"
        )
        raise UserError(f"feature {name!r}: no item has it; {mend}")
    return replace(feature, recipe={"source": config.source} | code_revision(name, config) | template | feature.recipe)


def in_order(data: DataConfig) -> list[str]:
    """Names of the features, each after the one that it is made of."""
    return sorted(data.features, key=lambda name: isinstance(data.features[name], PqFeature))


def can_share(config: FeatureConfig) -> bool:
    """Whether parts of a build share out the encoding: where a row depends on its own text or image alone."""
    return isinstance(config, TransformersFeature | OpenClipFeature | PixelsFeature)


def encode_part_of_feature(
    name: str, data: DataConfig, items: pa.Table, ids: ItemIds, encodings: Path, part: Part
) -> None:
    """Encode a part's share of feature ``name``, whose source can be shared out, into the folder ``encodings``.

    Args:
        name: of the feature.
        data: the config's section.
        items: the item table, with the columns of the texts.
        ids: the items' ids, in the same order.
        encodings: folder in which rows are kept.
        part: of the build.

    Raises:
        UserError: as :func:`make_feature`.
    """
    match data.features[name]:
        case TransformersFeature() as config:
            texts = _texts(template_of(config, data, items.column_names), items)
            import_encoder("shards.encoders.text_feature", name, "text").encode_part(
                name, config, texts, encodings, part
            )
        case OpenClipFeature() as config:
            import_encoder("shards.encoders.image_encoder", name, "images").encode_part(
                name, config, Path(data.root), ids, encodings, part
            )
        case PixelsFeature() as config:
            import_encoder("shards.encoders.pixels", name, "shards").encode_part(
                name, config, Path(data.root), ids, encodings, part
            )


def code_revision(name: str, config: FeatureConfig) -> dict[str, Any]:
    """The part of a feature's recipe that is in our code: it is raised when the same settings give other rows."""
    match config:
        case TfidfFeature():
            return {"tfidf": import_encoder("shards.encoders.fitted.tfidf", name, "shards").FIT_VERSION}
        case PixelsFeature():
            images = import_encoder("shards.images.decoding", name, "shards")
            pixels = import_encoder("shards.encoders.pixels", name, "shards")
            return {"pixels": pixels.REVISION, "decoding": images.DECODING}
        case OpenClipFeature():
            return {"decoding": import_encoder("shards.images.decoding", name, "images").DECODING}
        case PqFeature():
            return {"pq": product_codes.FIT_VERSION}
    return {}


def template_of(config: TextFeature, data: DataConfig, columns: Sequence[str]) -> dict[str, Any]:
    """How an item's text is made for a feature, from a table with these columns."""
    return {"text": list(parts_for(config.text or data.text, columns)), "text_separator": data.text_separator}


def check_source(name: str, data: DataConfig, num_items: int) -> None:
    """Refuse what can be seen to be wrong with feature ``name`` without encoding or reading all of it.

    Raises:
        UserError: a file is missing or of another kind, or does not fit the items.
    """
    config, root = data.features[name], Path(data.root)
    match config:
        case NpyFeature():
            open_precomputed(name, config, root, num_items)
        case PixelsFeature() | OpenClipFeature():
            import_encoder("shards.encoders.item_images", name, "shards").check_image_table(config, root)


def _texts(template: Mapping[str, Any], items: pa.Table) -> ItemTexts:
    return item_texts(items, template["text"], template["text_separator"])


def import_encoder(module: str, feature: str, extra: str) -> ModuleType:
    """An encoder whose packages come with an extra, which other features do without."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"feature {feature!r} needs {error.name}; install it with pip install -e '.[{extra}]'"
        ) from None
