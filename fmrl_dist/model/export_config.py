"""``config.json`` of an export (docs/format.md, "The export"): how to read the folder, and all hashes.

Whatever reads an export checks the hash of each file first: a damaged weight is a number like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256, json_sha256

FORMAT_VERSION = 2
VERSION_WITHOUT_HASHES = 1  # which is read, too
CONFIG_FILE = "config.json"


def export_config_text(config: dict[str, Any], folder: Path, names: Sequence[str]) -> str:
    """The file's text: ``config`` with version, the hashes of the files ``names`` in ``folder``, and its own."""
    config = {"format_version": FORMAT_VERSION, **config, "sha256_of": {n: file_sha256(folder / n) for n in names}}
    return json.dumps(config | {"sha256": json_sha256(config)}, indent=1) + "\n"


def read_export_config(folder: Path) -> dict[str, Any]:
    """The checked content of an export's ``config.json``.

    Raises:
        UserError: it is of another version.
        ValueError, OSError: it is damaged or missing.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} holds {type(config).__name__}; expected a mapping")
    version = config.get("format_version")
    if version not in (FORMAT_VERSION, VERSION_WITHOUT_HASHES):
        raise UserError(f"{folder / CONFIG_FILE} has format_version {version!r}; expected {FORMAT_VERSION}")
    if version == FORMAT_VERSION:
        recorded = config.pop("sha256", None)
        if recorded != json_sha256(config) or not isinstance(config.get("sha256_of"), dict):
            raise ValueError(f"{CONFIG_FILE} is not what its sha256 says")
    elif "sha256_of" in config:
        raise ValueError(f"{CONFIG_FILE} of version {version} has hashes")
    return config


def check_export_file(folder: Path, config: Mapping[str, Any], name: str) -> None:
    """Check a file of an export against :func:`read_export_config`'s result.

    Raises:
        ValueError, OSError: it is damaged or missing.
    """
    if config["format_version"] == VERSION_WITHOUT_HASHES:
        return
    if file_sha256(folder / name) != config["sha256_of"].get(name):
        raise ValueError(f"{name} is not what its sha256 says")
