"""Items that come after a model was trained, encoded as its own items were: by what an export records of each feature.

Nothing is fitted and nothing chosen: encoder, settings, template and precision are the recorded ones. What cannot be
recorded is where models, arrays and images are now. n items.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256
from fmrl_dist.base.id_columns import IdKind
from fmrl_dist.base.json_text import read_object
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.features import (
    FeatureConfig,
    ImageFeature,
    NpyFeature,
    OpenClipFeature,
    PixelsFeature,
    PqFeature,
    TextFeature,
    TfidfFeature,
    TransformersFeature,
)
from fmrl_dist.config.tables import ItemTableConfig
from fmrl_dist.data.store.block_arrays import row_problem
from fmrl_dist.data.store.manifest import CODES
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import item_texts
from shards.encoders.model_folder import local_model_sha256
from shards.encoders.sources import code_revision, import_encoder, in_order, make_feature
from shards.store.raw_items import RawItems, check_raw_items, read_raw_items

COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)  # revision of a hub's model; that of a folder is a sha256


@dataclass(frozen=True)
class NewItems:
    """The tables and files of new items."""

    table: DataConfig = field(default_factory=DataConfig)
    files: Mapping[str, Path] = field(default_factory=dict)  # of features: an array, or a table of images
    lacking: frozenset[str] = frozenset()  # features that none of the items has
    models: Mapping[str, str] = field(default_factory=dict)  # of features, where they are not where they were
    image_columns: tuple[str, str] = ("item_id", "image")  # of tables of images: item ids, images

    @classmethod
    def of(cls, path: Path, id_column: str, title: str, ids: IdKind = "text", **settings: Any) -> NewItems:
        """The table at ``path``, whose ids are ``ids``, with further fields of this class."""
        items = ItemTableConfig(path=str(path.absolute()), id=id_column, title=title)
        return cls(table=DataConfig(root="", ids=ids, items=items), **settings)


@dataclass(frozen=True)
class EncodedFeatures:
    """What :func:`encode_new_items` returns."""

    items: RawItems
    features: list[ItemFeature]  # in the order of the export's columns


def encode_new_items(export: Path, new: NewItems, encoding: Path) -> EncodedFeatures:
    """Rows of all features that an export's model reads.

    Args:
        export: folder of the export.
        new: the items.
        encoding: folder in which the pretrained encoders keep rows (``shards.encodings``).

    Raises:
        UserError: the export does not record how; a table, file or model is missing, or is not the recorded one.
    """
    dims, recorded = _record(export)
    origins = {name: by["recipe"]["of"] for name, by in recorded.items() if by["recipe"].get("source") == CODES}
    for name in (*new.files, *new.lacking, *new.models):
        require(
            name in recorded,
            f"the model of {export} reads no feature {name!r}; it reads: {', '.join(recorded) or 'none'}",
        )
    lacking = new.lacking | {name for name, of in origins.items() if of in new.lacking}
    read = [name for name in dims if name not in lacking]
    needed = dict.fromkeys([*read, *(origins[name] for name in read if name in origins)])
    all_dims = {of: recorded[name]["recipe"]["dim"] for name, of in origins.items()} | dims
    sources = {name: _source(name, recorded[name], all_dims[name], export, new) for name in needed}
    data = replace(new.table, features=sources)
    check_raw_items(data)
    items = read_raw_items(data, mend="or check --id")
    made: dict[str, ItemFeature] = {}
    for name in [*in_order(data), *(name for name in dims if name in lacking)]:
        made_by, dim = recorded[name], all_dims[name]
        lacks_origin = name in origins and name in needed and not made[origins[name]].present.any()
        if name in lacking or lacks_origin or _has_no_text(sources[name], made_by["recipe"], items):
            made[name] = _absent(name, dim, made_by, len(items.ids.external))
        else:
            made[name] = _encode(name, data, made_by["recipe"], items, encoding, made)
        found = made[name].rows.shape[1]
        require(
            found == dim,
            f"feature {name!r} of the new items has {found} channels, the model reads {dim}; encode them as those of "
            "the training store were",
        )
    return EncodedFeatures(items, [made[name] for name in dims])


def _record(export: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Dims of the features that an export's model reads, and what made each of them, and what they are codes of."""
    mend = "export the run again"
    require((export / "config.json").is_file(), f"{export} is not an export: it has no config.json")
    config = read_object(export / "config.json", "the export's", mend)
    try:
        dims = {str(name): int(dim) for name, dim in config["model"]["feature_dims"].items()}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{export / 'config.json'} is not that of an export; {mend}") from None
    encoders = config.get("feature_encoders")
    found = {}
    names = list(dims)
    for name in names:
        made_by = encoders.get(name) if isinstance(encoders, dict) else None
        if isinstance(made_by, dict) and made_by.get("encoder") == "npy":
            made_by = made_by | {"recipe": {"source": "npy"}}  # older ones have no recipe, and need none
        is_whole = isinstance(made_by, dict) and isinstance(made_by.get("recipe"), dict)
        require(
            is_whole,
            f"export {export} does not record how its feature {name!r} was made: its store is of an older version; "
            "build the store again and export the run on it with --store",
        )
        assert isinstance(made_by, dict)
        found[name], recipe = made_by, made_by["recipe"]
        if recipe.get("source") == CODES:
            of, dim = recipe.get("of"), recipe.get("dim")
            is_sound = isinstance(of, str) and type(dim) is int and dim > 0
            require(is_sound, f"the recipe of feature {name!r} in {export} is damaged; {mend}")
            if of not in names:
                names.append(of)
    return dims, found


def _source(name: str, made_by: Mapping[str, Any], dim: int, export: Path, new: NewItems) -> FeatureConfig:
    """The source of a feature with the recorded settings."""
    recipe, encoder = made_by["recipe"], str(made_by["encoder"])
    id_column, image_column = new.image_columns
    try:
        source: FeatureConfig
        match recipe.get("source"):
            case "npy":
                source = NpyFeature(path=_file_of(name, "an array, a row for each new item: FILE.npy", new))
            case "tfidf":
                source = TfidfFeature(dim=dim, text=tuple(recipe["text"]), fit=str(export))
            case "pixels":
                source = PixelsFeature(path=_file_of(name, IMAGES, new), id=id_column, image=image_column)
            case "transformers":
                source = _text_model(name, encoder, made_by, new)
            case "open_clip":
                model, pretrained = _image_model(name, encoder, new)
                path = _file_of(name, IMAGES, new)
                source = OpenClipFeature(
                    path=path,
                    id=id_column,
                    image=image_column,
                    model=model,
                    pretrained=pretrained,
                    precision=recipe["precision"],
                )
            case "pq":
                source = PqFeature(of=recipe["of"], parts=dim, codes=recipe["codes"], fit=str(export))
            case other:
                raise UserError(f"feature {name!r} of {export} is from a source {other!r}, which this version has not")
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the recipe of feature {name!r} in {export} is damaged ({error}); export again") from None
    for key, now in code_revision(name, source).items():
        require(
            recipe.get(key) == now,
            f"feature {name!r} of {export} was made by revision {recipe.get(key)!r} of {key}, this version has "
            f"{now!r}: new items would get other rows; use the version that built the store, or train again",
        )
    return source


IMAGES = "a table of item ids and images: FILE.parquet"


def _file_of(name: str, what: str, new: NewItems) -> str:
    require(
        name in new.files,
        f"feature {name!r} needs {what}; give it with --feature {name}=FILE, or say with --without {name} that no new "
        "item has it",
    )
    return str(new.files[name].absolute())


def _text_model(name: str, encoder: str, made_by: Mapping[str, Any], new: NewItems) -> TransformersFeature:
    """``encoder`` is as the manifest names it: ``transformers:MODEL POOLING MAX_TOKENS``."""
    recipe, recorded = made_by["recipe"], encoder.removeprefix("transformers:").rsplit(" ", 2)[0]
    model, revision = new.models.get(name, recorded), str(made_by["revision"])
    is_local = local_model_sha256(model) is not None
    require(
        is_local or COMMIT.fullmatch(revision) is not None,
        f"feature {name!r} was encoded by model {recorded}, a folder that is not here; say where it is with "
        f"--encoder {name}=FOLDER",
    )
    max_tokens = int(recipe["max_tokens"])
    return TransformersFeature(
        model=model,
        revision="" if is_local else revision,
        pooling=recipe["pooling"],
        max_tokens=max_tokens,
        batch_tokens=max(TransformersFeature.batch_tokens, max_tokens),
        precision=recipe["precision"],
        text=tuple(recipe["text"]),
    )


def _image_model(name: str, encoder: str, new: NewItems) -> tuple[str, str]:
    """``encoder`` is as the manifest names it: ``open_clip:MODEL WEIGHTS``, files by their names alone."""
    if name in new.models:
        model, comma, pretrained = new.models[name].rpartition(",")
        require(
            bool(comma and model and pretrained),
            f"--encoder {name}={new.models[name]} names no image model; expected {name}=MODEL,WEIGHTS, each a name "
            "that open_clip knows or a file",
        )
        return model, pretrained
    model, _, pretrained = encoder.removeprefix("open_clip:").partition(" ")
    if pretrained.endswith(".safetensors") and not Path(pretrained).is_file():
        raise UserError(
            f"feature {name!r} was encoded by image model {model} with the weights {pretrained}, a file that is not "
            f"here; say where it is with --encoder {name}=MODEL,WEIGHTS"
        )
    return model, pretrained


def _has_no_text(source: FeatureConfig, recipe: Mapping[str, Any], items: RawItems) -> bool:
    if not isinstance(source, TextFeature):
        return False
    return not item_texts(items.table, source.text, recipe["text_separator"]).present.any()


def _encode(
    name: str,
    data: DataConfig,
    recipe: Mapping[str, Any],
    items: RawItems,
    encoding: Path,
    made: Mapping[str, ItemFeature],
) -> ItemFeature:
    source = data.features[name]
    files = {}
    if isinstance(source, NpyFeature):
        require(Path(source.path).is_file(), f"feature {name!r}: {source.path} does not exist; check --feature")
        files[f"data.features.{name}.path"] = file_sha256(Path(source.path))
    if isinstance(source, ImageFeature):
        images = import_encoder("shards.encoders.item_images", name, "shards")
        files[f"data.features.{name}.path"] = images.images_sha256(source, Path())
    data = replace(data, text_separator=recipe.get("text_separator", data.text_separator))
    feature = make_feature(name, data, items.table, items.ids, encoding, files, may_lack=True, made=made)
    rows = np.ascontiguousarray(feature.rows, np.float16)
    problem = row_problem(rows, feature.present)
    if problem is not None:
        item = items.ids.external[problem[1]].as_py()
        raise UserError(f"feature {name!r} ({feature.encoder}): the row of item {item!r} {problem[0]}")
    return replace(feature, rows=rows)


def _absent(name: str, dim: int, made_by: Mapping[str, Any], num_items: int) -> ItemFeature:
    return ItemFeature(
        name,
        np.zeros((num_items, dim), np.float16),
        np.zeros(num_items, np.bool_),
        encoder=str(made_by["encoder"]),
        revision=str(made_by["revision"]),
        recipe=dict(made_by["recipe"]),
    )
