"""From ``data.features.<name>`` to the rows of all items: each source has a module here.

Precomputed arrays and the rows of the pretrained encoders stay on disk, memory-mapped. The two light encoders
(``tfidf``, ``pixels``) hold float16 [V, dim] in memory.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

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
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import ItemTexts, item_texts, parts_for
from shards.encoders.precomputed import open_precomputed, read_precomputed
from shards.tables.item_ids import ItemIds


def make_feature(name: str, data: DataConfig, items: pa.Table, ids: ItemIds, encoding: Path) -> ItemFeature:
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
    feature: ItemFeature
    match config:
        case NpyFeature():
            feature = read_precomputed(name, config, root, len(ids.external))
        case TfidfFeature():
            encoder = _import_encoder("shards.encoders.tfidf", name, "shards")
            texts = _texts(config, data, items)
            feature = _with_template(encoder.encode_texts(name, config.dim, texts), config, data, items)
        case PixelsFeature():
            encoder = _import_encoder("shards.encoders.pixels", name, "shards")
            feature = encoder.encode_images(name, config, root, ids)
        case TransformersFeature():
            encoder = _import_encoder("shards.encoders.text_encoder", name, "text")
            texts = _texts(config, data, items)
            feature = _with_template(encoder.encode_texts(name, config, texts, encoding), config, data, items)
        case OpenClipFeature():
            encoder = _import_encoder("shards.encoders.image_encoder", name, "images")
            feature = encoder.encode_images(name, config, root, ids, encoding)
    if not feature.present.any():
        raise UserError(
            f"feature {name!r}: no item has it; check its columns, and that its item ids are those of the item table"
        )
    return feature


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
            _import_encoder("shards.encoders.item_images", name, "shards").check_image_table(config, root)


def _texts(config: TextFeature, data: DataConfig, items: pa.Table) -> ItemTexts:
    return item_texts(items, parts_for(config.text or data.text, items.column_names), data.text_separator)


def _with_template(feature: ItemFeature, config: TextFeature, data: DataConfig, items: pa.Table) -> ItemFeature:
    """The feature, its encoder named with the template of the texts: with another one, it would be another encoder."""
    template = data.text_separator.join(parts_for(config.text or data.text, items.column_names))
    return replace(feature, encoder=f"{feature.encoder} of {json.dumps(template, ensure_ascii=False)}")


def _import_encoder(module: str, feature: str, extra: str) -> ModuleType:
    """An encoder whose packages come with an extra, which other features do without."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"feature {feature!r} needs {error.name}; install it with pip install -e '.[{extra}]'"
        ) from None
