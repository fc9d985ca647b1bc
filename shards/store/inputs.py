"""What a config builds a store from: the hashes of all files that it names, and the record for the manifest.

Hashing reads every input once, at the speed of the disk or about 1 GB/s. A build then parses, decodes and encodes the
same bytes, which takes many times as long.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist import __version__
from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256
from fmrl_dist.base.urls import is_url
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import (
    ImageFeature,
    NpyFeature,
    OpenClipFeature,
    PqFeature,
    TextFeature,
    TfidfFeature,
    TransformersFeature,
)
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.built_from import OPEN_CHOICES, BuiltFrom, list_differences, recorded_keys
from fmrl_dist.data.store.manifest import USERS_FILE, VOCAB_FILE, Manifest
from fmrl_dist.data.store.reader import Store
from shards.encoders.fitted.stored_fit import fit_sha256
from shards.encoders.item_feature import ItemFeature, versions_of
from shards.encoders.item_text import parts_for
from shards.encoders.model_folder import local_model_sha256
from shards.encoders.sources import code_revision, import_encoder
from shards.store.raw_items import item_table
from shards.tables.file_states import FileState, file_states
from shards.tables.formats.choice import event_source, published_items
from shards.tables.raw_tables import RawTable, table_columns

IDS_KEY = "data.ids"


def input_files(config: Config) -> dict[str, str]:
    """Config key → sha256 of what the file or folder that it names holds.

    A model that is named by a hub's id or a tag is not looked up: its name is compared.

    Raises:
        UserError: a file does not exist or cannot be read.
    """
    data, root = config.data, Path(config.data.root)
    files = {key: _table_sha256(table) for key, table in _tables(config).items()}
    for name, feature in data.features.items():
        key = f"data.features.{name}"
        if isinstance(feature, NpyFeature):
            files[f"{key}.path"] = _sha256(root / feature.path, f"{key}.path")
        if isinstance(feature, ImageFeature):
            images = import_encoder("shards.encoders.item_images", name, "shards")
            files[f"{key}.path"] = images.images_sha256(feature, root)
        if isinstance(feature, TfidfFeature | PqFeature) and feature.fit:
            files[f"{key}.fit"] = fit_sha256(name, feature.fit)
        if isinstance(feature, TransformersFeature) and (sha256 := local_model_sha256(feature.model)):
            files[f"{key}.model"] = sha256
        if isinstance(feature, OpenClipFeature):
            for part, path in (("model", Path(feature.model)), ("pretrained", Path(feature.pretrained))):
                if path.is_file():
                    files[f"{key}.{part}"] = file_sha256(path)
    return files


def input_states(config: Config) -> dict[Path, FileState]:
    """The states of the raw tables' files, and of those of arrays and of tables of images.

    Images that are files of their own are known by their content when they are encoded.

    Raises:
        UserError: a table does not exist.
    """
    tables = [file for table in _tables(config).values() for file in table.files]
    features = [one for one in config.data.features.values() if isinstance(one, NpyFeature | ImageFeature)]
    return file_states([*tables, *(Path(config.data.root) / feature.path for feature in features)])


def _tables(config: Config) -> dict[str, RawTable]:
    """Config key → the table that it names, as it was published."""
    data, downloads = config.data, downloads_folder(config)
    tables = {"data.items.path": published_items(data, downloads)} if data.items.path else {}
    tables["data.sequences.path"] = event_source(data, data.sequences.path, downloads)[0]
    if data.split.by == "given" and data.split.valid:
        for key, place in (("valid", data.split.valid), ("test", data.split.test)):
            tables[f"data.split.{key}"] = event_source(data, place, downloads)[0]
    return tables


def downloads_folder(config: Config) -> Path | None:
    """Where copies of tables from URLs, and what is made of a data set's items, are kept; None for a store at a URL."""
    return None if not config.store.build_dir and is_url(config.store.path) else config.store.build_folder / "tables"


def _table_sha256(table: RawTable) -> str:
    """Of a table's only file, or of the hashes of its parts in order; their names may change."""
    hashes = [_sha256(file, "the path in the config") for file in table.files]
    is_folder = len(hashes) > 1 or Path(table.places[0]).is_dir()
    return hashes[0] if not is_folder else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sha256(path: Path, key: str) -> str:
    require(path.is_file(), f"{path} does not exist; check data.root and {key}")
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check {key}") from None


def record(config: Config, files: dict[str, str], features: Sequence[ItemFeature]) -> BuiltFrom:
    """The record of a build.

    Args:
        config: it was built by.
        files: :func:`input_files` of it.
        features: as built: they know what was chosen where the config leaves a choice.
    """
    keys = {key: value for key, value in _keys_of(config).items() if key not in files}
    for feature in features:
        chosen = {"dim": feature.manifest_entry.dim, "precision": feature.recipe.get("precision")}
        for key in OPEN_CHOICES:
            if f"data.features.{feature.name}.{key}" in keys:
                keys[f"data.features.{feature.name}.{key}"] = chosen[key]
    sources = {feature.source for feature in config.data.features.values()}
    made_with = {"fmrl-dist": __version__, "pyarrow": pa.__version__} | versions_of(*sorted(sources))
    made_with |= {f"device of {feature.name}": feature.device for feature in features if feature.device}
    return BuiltFrom(keys, files, made_with)


def _keys_of(config: Config) -> dict[str, Any]:
    """The keys to record, with default templates written out for the columns of the item table."""
    keys = recorded_keys(config)
    for name, feature in config.data.features.items():
        if isinstance(feature, TextFeature):
            columns = table_columns(item_table(config.data, downloads_folder(config)))
            with contextlib.suppress(UserError):  # another table: then its contents differ as well
                keys[f"data.features.{name}.text"] = list(parts_for(feature.text or config.data.text, columns))
    return keys


def check_built_from(store: Store, config: Config, mend: str) -> bool:
    """Refuse a store that was built from something else than what ``config`` names.

    Args:
        store: that is there.
        config: that it is compared with.
        mend: ends the message.

    Returns:
        False if an older version built the store, without a record: then only its features' names, and the arrays that
        they were taken from, were compared.

    Raises:
        UserError: it differs, or a file that the config names does not exist.
    """
    files, built_from = input_files(config), store.manifest.built_from
    if built_from is None:
        differences = _older_differences(store.manifest, config, files)
    else:
        differences = built_from.differences(_keys_of(config), files) + _code_differences(store.manifest, config)
        differences += [] if IDS_KEY in built_from.keys else _id_differences(store, config)
    require(
        not differences,
        f"store {store.location} was built from something else: {list_differences(differences)}; {mend}",
    )
    return built_from is not None


def _id_differences(store: Store, config: Config) -> list[str]:
    """Whether the ids of a store that does not record it are of another kind."""
    kinds = []
    for file in (VOCAB_FILE, USERS_FILE):
        column = pq.read_schema(pa.BufferReader(store.read_table(file))).field("external_id")
        kinds.append("integer" if pa.types.is_integer(column.type) else "text")
    items, users = kinds
    here, there = config.data.recorded_ids, items if items == users else {"items": items, "users": users}
    return [] if here == there else [f"{IDS_KEY} is {shown(there)}, the config's {shown(here)}"]


def _code_differences(manifest: Manifest, config: Config) -> list[str]:
    """Where this version would encode the same input into other rows than the version that built the store."""
    found = []
    for feature in manifest.features:
        recipe, source = feature.recipe or {}, config.data.features.get(feature.name)
        if source is None or recipe.get("source") != source.source:
            continue  # named as a difference of the config
        for key, now in code_revision(feature.name, source).items():
            if recipe.get(key) != now:
                found.append(
                    f"feature {feature.name!r} has revision {recipe.get(key)!r} of {key}, this version {now!r}"
                )
    return found


def _older_differences(manifest: Manifest, config: Config, files: dict[str, str]) -> list[str]:
    there, here = [feature.name for feature in manifest.features], list(config.data.features)
    if there != here:
        return [f"data.features is {there}, the config's {here}"]
    found = []
    mode = "inline" if manifest.inline else "table"
    if mode != config.store.feature_mode:
        found.append(f"store.feature_mode is {mode}, the config's {config.store.feature_mode}")
    for feature in manifest.features:
        is_npy = isinstance(config.data.features[feature.name], NpyFeature)
        if is_npy and feature.revision != files[f"data.features.{feature.name}.path"]:
            found.append(
                f"feature {feature.name!r} is {feature.encoder} {feature.revision[:12]}, the config's array not"
            )
    return found
