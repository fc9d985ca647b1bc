"""What a store was built from: config keys and contents of input files, recorded in its manifest.

A path is no identity: a key that names a file or folder is recorded by the sha256 of what that holds, any other key by
its value. Every key of the sections ``data`` and ``store`` is recorded unless :data:`UNRECORDED` names it, so a new key
is recorded until somebody decides that it changes no byte of a store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import json_sha256
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import TextFeature
from fmrl_dist.config.sections import Config

# Where things are, how a store is read, and how fast and with how much memory an encoder works.
UNRECORDED = {
    "data": {"root", "text", "text_separator", "max_length", "windows"},
    "store": {"path", "build_dir", "timeout_s", "retries", "cache_dir", "cache_gb", "on_bad_shard", "max_lost_share"},
    "feature": {"workers", "batch_tokens", "batch_images"},
}
UNRECORDED_PARTS = {"data.interactions.memory_gb", "data.interactions.threads", "data.dirt"}
OPEN_CHOICES = {"precision": "auto", "dim": 0}  # of a feature: values that leave the choice to the build
SHOWN = 6  # differences in a message


@dataclass(frozen=True)
class BuiltFrom:
    """The record. Library versions and devices change a row only by rounding: they are there to be read."""

    keys: dict[str, Any]  # config keys, such as data.sequences.layout, with the values that the build chose
    files: dict[str, str]  # config keys that name files or folders → sha256 of what these hold
    made_with: dict[str, str]  # versions of libraries, and the device of each encoder that has one

    @cached_property
    def sha256(self) -> str:
        """Hash of the record's canonical JSON."""
        return json_sha256(asdict(self))

    @classmethod
    def from_raw(cls, raw: Any) -> BuiltFrom:
        """The record in a manifest.

        Raises:
            UserError: it lacks a part, holds something else, or was changed after it was written.
        """
        parts = ("keys", "files", "made_with")
        if not isinstance(raw, dict) or set(raw) != {*parts, "sha256"}:
            raise UserError(f"the manifest's built_from does not have the fields {', '.join(parts)}, sha256")
        if not all(isinstance(raw[part], dict) for part in parts) or not all(
            isinstance(value, str) for part in parts[1:] for value in raw[part].values()
        ):
            raise UserError("the manifest's built_from holds something else than keys and texts; build the store again")
        record = cls(*(raw[part] for part in parts))
        if record.sha256 != raw["sha256"]:
            raise UserError("the manifest's built_from was changed after it was written; build the store again")
        return record

    def differences(self, keys: dict[str, Any], files: dict[str, str] | None = None) -> list[str]:
        """How a config differs from the one that the store was built from, a few words each.

        Args:
            keys: :func:`recorded_keys` of the config.
            files: hashes of what it names, as in the record; None to compare keys only.
        """
        named = self.files.keys() | (files or {}).keys()
        # Contents say more than the arguments of the generated demo; an inline store can be read as a table too.
        skipped = ("data.demo",) if files is not None else ("store.feature_mode",)
        compared = {key for key in self.keys.keys() | keys.keys() if not key.startswith(skipped)}
        found, defaults = [], {} if self.keys.keys() >= keys.keys() else recorded_keys(Config())
        for key in sorted(_of_both(compared - named, keys, self.keys)):
            if key not in self.keys and key in defaults and keys[key] == defaults[key]:
                continue  # a key that the version which built the store did not have
            here, there = keys.get(key), self.keys.get(key)
            needs_table = files is None and key.endswith(".text") and here == []  # the default template
            if here != there and not needs_table and not _is_left_open(key, here):
                found.append(f"{key} is {shown(there)}, the config's {shown(here)}")
        if files is None:
            return found
        for key in sorted(_of_both(named, keys, self.keys)):
            here, there = (hashes[key][:12] if key in hashes else "none" for hashes in (files, self.files))
            if here != there:
                found.append(f"what {key} names has the sha256 {there}, the config's {here}")
        return found


def recorded_keys(config: Config) -> dict[str, Any]:
    """Every key of a config that says what a store holds, paths included, by its name.

    A text feature has the template that is in force, its own or the config's; [] is the default one, whose parts depend
    on the columns of the item table.
    """
    values = config.to_dict()
    values["data"]["ids"] = config.data.recorded_ids
    keys: dict[str, Any] = {}
    for section in ("data", "store"):
        for key, value in values[section].items():
            if key in UNRECORDED[section]:
                continue
            inner = value if isinstance(value, dict) and key != "ids" else {}
            keys |= {f"{section}.{key}.{name}": leaf for name, leaf in inner.items()} or {f"{section}.{key}": value}
    for part in UNRECORDED_PARTS:
        keys = {key: value for key, value in keys.items() if key != part and not key.startswith(f"{part}.")}
    keys = {key: value for key, value in keys.items() if not key.startswith("data.features")}
    keys["data.features"] = list(config.data.features)  # in their order, which is that of the columns
    for name, feature in config.data.features.items():
        of_feature = {key: v for key, v in asdict(feature).items() if key not in UNRECORDED["feature"]}
        if isinstance(feature, TextFeature):
            of_feature |= {"text": feature.text or config.data.text, "text_separator": config.data.text_separator}
        keys |= {f"data.features.{name}.{key}": value for key, value in of_feature.items()}
    plain: dict[str, Any] = json.loads(json.dumps(keys))  # tuples are lists, as in a manifest that was read
    return plain


def list_differences(differences: list[str]) -> str:
    """Several differences for a message of one line."""
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return "; ".join(differences[:SHOWN]) + more


def _is_left_open(key: str, value: Any) -> bool:
    return key.startswith("data.features.") and value == OPEN_CHOICES.get(key.rpartition(".")[2], object())


def _of_both(names: Iterable[str], *keys: dict[str, Any]) -> set[str]:
    """``names`` without those of a feature that only one side has: that it is missing says enough."""
    lists = [found if isinstance(found := side.get("data.features"), list) else [] for side in keys]
    common = {name for name in lists[0] if name in lists[1]}
    return {name for name in names if not name.startswith("data.features.") or name.split(".")[2] in common}
