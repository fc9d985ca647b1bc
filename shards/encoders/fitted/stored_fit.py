"""The fit of a feature in another store, a run or an export: what ``data.features.<name>.fit`` names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.urls import is_url
from fmrl_dist.data.store.manifest import MANIFEST_FILE, fit_file
from fmrl_dist.data.store.reader import Store

# Records of an export and of a run's checkpoints, which have the hash of a fit as its feature's revision.
RECORDS = ("config.json", "checkpoints/*/state.json")


def read_fit(feature: str, place: str) -> bytes:
    """The file of the fit, checked against the hash that is recorded beside it.

    Args:
        feature: its name there.
        place: folder or URL of a store, or folder of a run or an export.

    Raises:
        UserError: none of them, without such a fit, or the file is missing or damaged.
    """
    if _is_store(place):
        return _store_with_fit(feature, place).read_fit(feature)
    expected, path = _recorded(feature, Path(place)), Path(place) / fit_file(feature)
    data = path.read_bytes()
    require(
        hashlib.sha256(data).hexdigest() == expected,
        f"{path} is damaged: its sha256 is not the recorded {expected[:12]}; name the store instead",
    )
    return data


def fit_sha256(feature: str, place: str) -> str:
    """Hash of that file, as it is recorded beside it."""
    return (
        _store_with_fit(feature, place).manifest.fits[feature] if _is_store(place) else _recorded(feature, Path(place))
    )


def _is_store(place: str) -> bool:
    return is_url(place) or (Path(place) / MANIFEST_FILE).is_file()


def _store_with_fit(feature: str, place: str) -> Store:
    store = Store.open(place)
    require(
        feature in store.manifest.fits,
        f"data.features.{feature}.fit names store {store.location}, which keeps no fit of a feature {feature!r}; name "
        "one that does, such as a store that this version built with source tfidf or pq",
    )
    return store


def _recorded(feature: str, folder: Path) -> str:
    """Hash of the fit of a run or an export."""
    if (folder / fit_file(feature)).is_file():
        for path in sorted(path for pattern in RECORDS for path in folder.glob(pattern)):
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["feature_encoders"][feature]["revision"])
            except (OSError, ValueError, LookupError, TypeError, RecursionError):
                continue
    raise UserError(
        f"data.features.{feature}.fit names {folder}, which is no store, run or export with a fit of a feature "
        f"{feature!r}; expected a folder with {fit_file(feature)}"
    )
