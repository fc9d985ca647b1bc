"""The fit of a feature in another store, or in an export: what ``data.features.<name>.fit`` names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.urls import is_url
from fmrl_dist.data.store.manifest import MANIFEST_FILE, fit_file
from fmrl_dist.data.store.reader import Store

EXPORT_FILE = "config.json"


def read_fit(feature: str, place: str) -> bytes:
    """The file of the fit, checked against the hash that its store or export records.

    Args:
        feature: its name there.
        place: folder or URL of a store, or folder of an export.

    Raises:
        UserError: neither, without such a fit, or the file is missing or damaged.
    """
    if _is_store(place):
        return _store_with_fit(feature, place).read_fit(feature)
    expected, path = _of_export(feature, Path(place)), Path(place) / fit_file(feature)
    data = path.read_bytes() if path.is_file() else b""
    require(
        hashlib.sha256(data).hexdigest() == expected,
        f"{path} is missing or damaged; export {place} again, or use a store",
    )
    return data


def fit_sha256(feature: str, place: str) -> str:
    """Hash of that file, as its store or export records it."""
    return (
        _store_with_fit(feature, place).manifest.fits[feature] if _is_store(place) else _of_export(feature, Path(place))
    )


def _is_store(place: str) -> bool:
    return is_url(place) or (Path(place) / MANIFEST_FILE).is_file()


def _store_with_fit(feature: str, place: str) -> Store:
    store = Store.open(place)
    require(
        feature in store.manifest.fits,
        f"data.features.{feature}.fit names store {store.location}, which keeps no fit of a feature {feature!r}; name "
        "one that does, such as a store that this version built with source tfidf",
    )
    return store


def _of_export(feature: str, folder: Path) -> str:
    path = folder / EXPORT_FILE
    try:
        encoders = json.loads(path.read_text(encoding="utf-8"))["feature_encoders"]
        if (folder / fit_file(feature)).exists():
            return str(encoders[feature]["revision"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UserError(
        f"data.features.{feature}.fit names {folder}, which is neither a store nor an export with a fit of a feature "
        f"{feature!r}; expected a folder with {fit_file(feature)}"
    )
