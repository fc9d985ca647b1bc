"""From ``data.features.<name>`` to the rows of all items: each source has a module here.

Precomputed arrays and the rows of the pretrained encoders stay on disk, memory-mapped. The two light encoders
(``tfidf``, ``pixels``) hold float16 [V, dim] in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import (
    FeatureConfig,
    NpyFeature,
    OpenClipFeature,
    PixelsFeature,
    TextFeature,
    TfidfFeature,
    TransformersFeature,
)
from fmrl_dist.config.sections import DataConfig
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import ItemTexts, item_texts
from shards.encoders.precomputed import read_precomputed
from shards.tables.item_ids import ItemIds


def make_feature(
    name: str, data: DataConfig, items: pa.Table, ids: ItemIds, encoding: Path, files: Mapping[str, str]
) -> ItemFeature:
    """Feature ``name`` of all items, from the source that the config names.

    Args:
        name: of the feature.
        data: the config's section.
        items: the item table, with the columns of the texts.
        ids: the items' ids, in the same order.
        encoding: folder in which an encoder keeps finished blocks.
        files: hashes of the input files, by config key (``shards.store.inputs``).

    Raises:
        UserError: the source cannot be read, does not fit the items, or no item has the feature.
    """
    config, root = data.features[name], Path(data.root)
    input_sha256 = files.get(f"data.features.{name}.path", "")
    match config:
        case NpyFeature():
            feature = read_precomputed(name, config, root, len(ids.external), input_sha256)
        case TfidfFeature():
            encoder = import_encoder("shards.encoders.tfidf", name, "shards")
            feature = encoder.encode_texts(name, config, _texts(config, data, items), template_of(config, data))
        case PixelsFeature():
            encoder = import_encoder("shards.encoders.pixels", name, "shards")
            feature = encoder.encode_images(name, config, root, ids)
        case TransformersFeature():
            encoder = import_encoder("shards.encoders.text_encoder", name, "text")
            feature = encoder.encode_texts(name, config, _texts(config, data, items), encoding)
        case OpenClipFeature():
            encoder = import_encoder("shards.encoders.image_encoder", name, "images")
            feature = encoder.encode_images(name, config, root, ids, encoding, input_sha256)
    if not feature.present.any() and not isinstance(config, NpyFeature):
        raise UserError(
            f"feature {name!r}: no item has it; check its columns, and that its item ids are those of the item table"
        )
    template = template_of(config, data) if isinstance(config, TextFeature) else {}
    return replace(feature, recipe={"source": config.source} | code_revision(name, config) | template | feature.recipe)


def code_revision(name: str, config: FeatureConfig) -> dict[str, Any]:
    """The part of a feature's recipe that is in our code: it is raised when the same settings give other rows."""
    match config:
        case TfidfFeature():
            return {"tfidf": import_encoder("shards.encoders.tfidf", name, "shards").FIT_VERSION}
        case PixelsFeature():
            images = import_encoder("shards.encoders.item_images", name, "shards")
            pixels = import_encoder("shards.encoders.pixels", name, "shards")
            return {"pixels": pixels.REVISION, "decoding": images.DECODING}
        case OpenClipFeature():
            return {"decoding": import_encoder("shards.encoders.item_images", name, "images").DECODING}
    return {}


def template_of(config: TextFeature, data: DataConfig) -> dict[str, Any]:
    """How an item's text is made for a feature."""
    return {"text": list(config.text or data.text), "text_separator": data.text_separator}


def _texts(config: TextFeature, data: DataConfig, items: pa.Table) -> ItemTexts:
    return item_texts(items, config.text or data.text, data.text_separator)


def import_encoder(module: str, feature: str, extra: str) -> ModuleType:
    """An encoder whose packages come with an extra, which other features do without."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"feature {feature!r} needs {error.name}; install it with pip install -e '.[{extra}]'"
        ) from None
