"""An export's folder with another catalogue: what is asked for is checked as a whole, then one folder is filled.

V items, D the model's width.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256
from fmrl_dist.checkpoint.export.files import CARD_FILE, is_export_file
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.deploy.card_source import with_source
from fmrl_dist.deploy.catalogue.encoded_items import EncodedItems
from fmrl_dist.deploy.catalogue.item_files import embedder, write_item_files
from fmrl_dist.deploy.catalogue.vocabulary_changes import ItemRecords, listed
from fmrl_dist.model.export_config import (
    CHANGES,
    CONFIG_FILE,
    FORMATS,
    REMOVED,
    check_export_file,
    export_config_text,
    read_export_config,
)

NO_FORMAT = ("format_version", "sha256_of")  # keys of config.json that are written anew
SECTION = "\n## Changes of the catalogue\n"


@dataclass(frozen=True)
class OpenExport:
    """An export whose files are all whole."""

    folder: Path
    config: dict[str, Any]
    items: ItemRecords
    config_sha256: str  # of the file config.json, which has the hashes of all others

    @classmethod
    def read(cls, folder: Path) -> OpenExport:
        """Check the hash of every file, and read the vocabulary.

        Raises:
            UserError: it is no export, of another version or format, or damaged.
        """
        require((folder / CONFIG_FILE).is_file(), f"{folder} is not an export: it has no {CONFIG_FILE}")
        try:
            config_sha256 = file_sha256(folder / CONFIG_FILE)
            config = read_export_config(folder)
            require(config["format"] in FORMATS, f"{folder} is of format {config['format']}, which cannot be changed")
            names = config.setdefault("sha256_of", {path.name: "" for path in folder.iterdir()})  # version 1 has none
            for name in names:
                if name != CONFIG_FILE and is_export_file(name):
                    check_export_file(folder, config, name)
            items = ItemRecords.read((folder / VOCAB_FILE).read_bytes(), str(folder / VOCAB_FILE))
            if len(items) != config["num_items"] or config["model"].get("num_items", 0) > len(items):
                raise ValueError(f"{VOCAB_FILE} has {len(items)} items, {CONFIG_FILE} says {config['num_items']}")
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise _damaged(folder, error) from None
        return cls(folder, config, items, config_sha256)

    def check_unchanged(self) -> None:
        """Refuse to go on where the folder is another export by now: what was read of it is of two.

        Raises:
            UserError: it is, or is gone.
        """
        try:
            is_same = file_sha256(self.folder / CONFIG_FILE) == self.config_sha256
        except OSError:
            is_same = False
        require(is_same, f"export {self.folder} was changed or removed meanwhile; nothing is written: begin again")

    @property
    def can_lend_ids(self) -> bool:
        """Whether new items can borrow ids, where the model has any."""
        return self.config["format"] != "onnx" or not self.config["model"].get("num_items")

    @property
    def feature_dims(self) -> dict[str, int]:
        """Name → dim of each feature that the model reads."""
        return dict(self.config["model"]["feature_dims"])

    @property
    def encoders(self) -> dict[str, Any]:
        """What made each of these.

        Raises:
            UserError: there are none, or it is not recorded.
        """
        require(
            bool(self.feature_dims),
            f"the model of {self.folder} reads no features: nothing tells it what a new item is; train again",
        )
        found = self.config.get("feature_encoders") or {}
        missing = [name for name in self.feature_dims if name not in found]
        require(
            not missing,
            f"export {self.folder} does not record what made its feature {missing[0] if missing else ''!r}: it is of "
            "an older version; export the run again",
        )
        return dict(found)


@dataclass(frozen=True)
class Changes:
    """What is asked for: at most one of ``added`` and ``updated``."""

    added: EncodedItems | None = None
    updated: EncodedItems | None = None
    removed: pa.Array | None = None  # external ids, each once


@dataclass(frozen=True)
class Counts:
    """What was done."""

    added: int
    updated: int
    removed: int
    num_items: int  # rows of the catalogue
    num_removed: int  # of which are not recommended


def write_changed(export: OpenExport, changes: Changes, aside: Path, folder_name: str) -> Counts:
    """Fill ``aside`` with the changed export, to be called ``folder_name``.

    Raises:
        UserError: an item to add is there, one to update or remove is not, or its vector does not fit; or a file of
            the export is damaged.
    """
    items, rows, new = _changed_items(export.items, changes)
    config = {key: value for key, value in export.config.items() if key not in NO_FORMAT}
    names = [name for name in export.config["sha256_of"] if is_export_file(name) and name != CONFIG_FILE]
    try:
        if new is not None:
            embeddings: Tensor = embedder(export.folder, export.config)(new.values, new.present, rows)
            write_item_files(export.folder, export.config, aside, rows, embeddings)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise _damaged(export.folder, error) from None
    (aside / VOCAB_FILE).write_bytes(items.to_bytes())
    before = config.get(CHANGES, {"added": 0, "updated": 0, "removed": 0})
    counts = Counts(
        added=len(items) - len(export.items),
        updated=0 if changes.updated is None else len(changes.updated.ids),
        removed=int((items.removed & ~_extended(export.items.removed, len(items))).sum()),
        num_items=len(items),
        num_removed=int(items.removed.sum()),
    )
    config |= {
        "num_items": counts.num_items,
        CHANGES: {name: before[name] + getattr(counts, name) for name in before},
        REMOVED: counts.num_removed,
    }
    if not counts.num_removed:
        del config[REMOVED]
    if CARD_FILE in names:
        card = (export.folder / CARD_FILE).read_text(encoding="utf-8")
        card = with_source(changed_card(card, config), folder_name, on_hub=False)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    for name in names:
        if not (aside / name).exists():
            shutil.copyfile(export.folder / name, aside / name)
    (aside / CONFIG_FILE).write_text(export_config_text(config, aside, sorted(names)), encoding="utf-8")
    for name in names:  # safetensors makes files readable only by their owner
        shutil.copymode(aside / CONFIG_FILE, aside / name)
    return counts


def _changed_items(items: ItemRecords, changes: Changes) -> tuple[ItemRecords, np.ndarray, EncodedItems | None]:
    """The vocabulary afterwards, and the rows int64 [n] of the items that come with features."""
    removed = np.empty(0, np.int64)
    if changes.removed is not None:
        removed = items.rows_of(changes.removed)
        unknown = changes.removed.filter(pa.array(removed < 0))
        require(
            len(unknown) == 0,
            f"{len(unknown):,} items to remove are not in the catalogue: {listed(unknown)}; leave them out",
        )
    rows, new = np.empty(0, np.int64), changes.added or changes.updated
    if changes.added is not None:
        found = items.rows_of(changes.added.ids)
        known = changes.added.ids.filter(pa.array(found >= 0))
        require(
            len(known) == 0,
            f"{len(known):,} of {len(found):,} new items are in the catalogue already: {listed(known)}; leave them "
            "out, or give them other features with --update",
        )
        rows = np.arange(len(items), len(items) + len(found))
        items = items.appended(changes.added.ids, changes.added.titles)
    if changes.updated is not None:
        rows = items.rows_of(changes.updated.ids)
        unknown = changes.updated.ids.filter(pa.array(rows < 0))
        require(
            len(unknown) == 0,
            f"{len(unknown):,} of {len(rows):,} items to update are not in the catalogue: {listed(unknown)}; add them "
            "first, without --update",
        )
        both = changes.updated.ids.filter(pa.array(np.isin(rows, removed)))
        require(len(both) == 0, f"{listed(both)} are to be updated and removed; choose one of the two")
        items = items.updated(rows, changes.updated.titles)
    items = items.without(removed)
    require(not items.removed.all(), "no item would be left to recommend; leave some in the catalogue")
    return items, rows, new


def _extended(flags: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate((flags, np.zeros(length - len(flags), np.bool_)))


def changed_card(card: str, config: Mapping[str, Any]) -> str:
    """The model card with a last section that says what has become of the catalogue."""
    kept = re.split(re.escape(SECTION), card, maxsplit=1)[0]
    changes, num_removed = config[CHANGES], config.get(REMOVED, 0)
    return (
        f"{kept.rstrip()}\n{SECTION}\nSince the export, without further training: {changes['added']:,} items were "
        f"added, {changes['updated']:,} updated and {changes['removed']:,} removed. The catalogue now has "
        f"{config['num_items']:,} items, of which {config['num_items'] - num_removed:,} are recommended. All figures "
        "above are of the catalogue as it was exported.\n"
    )


def _damaged(folder: Path, error: Exception) -> UserError:
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"export {folder} is damaged ({problem}); export it again")
