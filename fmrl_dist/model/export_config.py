"""``config.json`` of an export (docs/format.md, "The export"): how to read the folder, and all hashes.

Whatever reads an export checks the hash of each file first: a damaged weight is a number like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256, json_sha256
from fmrl_dist.model.stored_tensors import DTYPES

VERSION_WITH_KINDS = 5  # a model of another kind, which readers of 4 could not construct
VERSION_WITH_REMOVALS = 4  # as 3, with items that must not be recommended: readers of 3 would recommend them
FORMAT_VERSION = 3
VERSION_WITHOUT_DTYPE = 2  # float32 throughout
VERSION_WITHOUT_HASHES = 1  # likewise
READ_VERSIONS = (
    VERSION_WITHOUT_HASHES,
    VERSION_WITHOUT_DTYPE,
    FORMAT_VERSION,
    VERSION_WITH_REMOVALS,
    VERSION_WITH_KINDS,
)
KINDS = ("mixer", "item_encoder")  # arguments of a model that only those of another kind have
CONFIG_FILE = "config.json"
# Keys of config.json of an export whose catalogue has changed since: how many items were added, updated and removed,
# and how many must not be recommended.
CHANGES, REMOVED = "catalogue_changes", "num_removed"
FORMATS = ("safetensors", "onnx")  # of a folder of this kind; only the first is read back


def export_config_text(config: Mapping[str, Any], folder: Path, names: Sequence[str]) -> str:
    """The file's text: ``config`` with version, the hashes of the files ``names`` in ``folder``, and its own."""
    config = {
        "format_version": _version_for(config),
        **config,
        "sha256_of": {n: file_sha256(folder / n) for n in names},
    }
    return _with_hash(config)


def _version_for(config: Mapping[str, Any]) -> int:
    """The oldest version whose readers understand the export."""
    if set(KINDS) & config["model"].keys():
        return VERSION_WITH_KINDS
    return VERSION_WITH_REMOVALS if config.get(REMOVED) else FORMAT_VERSION


def config_text_with_file(config: Mapping[str, Any], name: str, content: bytes) -> str:
    """The file's text where one of the export's files is another.

    Args:
        config: what :func:`read_export_config` returns.
        name: of the file.
        content: of the file.
    """
    return _with_hash({**config, "sha256_of": {**config["sha256_of"], name: hashlib.sha256(content).hexdigest()}})


def _with_hash(config: dict[str, Any]) -> str:
    return json.dumps(config | {"sha256": json_sha256(config)}, indent=1) + "\n"


def read_export_config(folder: Path) -> dict[str, Any]:
    """The checked content of an export's ``config.json``; of any version, it has ``format`` and ``dtype``.

    Raises:
        UserError: it is of another version.
        ValueError, OSError: it is damaged or missing.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} holds {type(config).__name__}; expected a mapping")
    version = config.get("format_version")
    if type(version) is not int or version not in READ_VERSIONS:
        raise UserError(_other_version(folder, version))
    if version != VERSION_WITHOUT_HASHES:
        recorded = config.pop("sha256", None)
        if recorded != json_sha256(config) or not isinstance(config.get("sha256_of"), dict):
            raise ValueError(f"{CONFIG_FILE} is not what its sha256 says")
    elif "sha256_of" in config:
        raise ValueError(f"{CONFIG_FILE} of version {version} has hashes")
    if version >= FORMAT_VERSION:
        if version != _version_for(config):
            raise ValueError(
                f"format_version is {version}, {REMOVED} {config.get(REMOVED)!r}, model {config['model']!r}"
            )
        if config.get("format") not in FORMATS or config.get("dtype") not in DTYPES:
            raise ValueError(f"format and dtype are {config.get('format')!r} and {config.get('dtype')!r}")
        return config
    return config | {"format": "safetensors", "dtype": "float32"}


def _other_version(folder: Path, version: object) -> str:
    found = f"{folder / CONFIG_FILE} has format_version {version!r}; this fmrl_dist reads {READ_VERSIONS[0]} to "
    if type(version) is int and version > READ_VERSIONS[-1]:
        return f"{found}{READ_VERSIONS[-1]}: update fmrl_dist, or export the run again with this one"
    return f"{found}{READ_VERSIONS[-1]}; expected an export: make one with fmrl_dist.export"


def check_is_readable(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse an export that is for others to read.

    Raises:
        UserError: it is for onnxruntime.
    """
    if config["format"] != "safetensors":
        raise UserError(
            f"export {folder} is of format {config['format']}, for onnxruntime; this needs one of format safetensors: "
            "make it with fmrl_dist.export --format safetensors"
        )


def check_export_file(folder: Path, config: Mapping[str, Any], name: str) -> None:
    """Check a file of an export against :func:`read_export_config`'s result.

    Raises:
        ValueError, OSError: it is damaged or missing.
    """
    if config["format_version"] == VERSION_WITHOUT_HASHES:
        return
    if file_sha256(folder / name) != config["sha256_of"].get(name):
        raise ValueError(f"{name} is not what its sha256 says")
