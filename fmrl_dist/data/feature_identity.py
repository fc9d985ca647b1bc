"""Whether a feature of a store is the one that a model was trained on: made by the same encoder, in the same way.

Axes of another encoder, of another fit, of texts by another template: the model would read numbers that mean something
else, and nothing would fail. Rows of the same recipe differ by rounding at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fmrl_dist.base.yaml_text import shown
from fmrl_dist.data.store.reader import Store

NPY = "npy"  # a precomputed array says nothing of what made it, and its hash is another for every catalogue

MadeBy = dict[str, Any] | str  # a text in checkpoints of older versions


def feature_encoders(store: Store) -> dict[str, MadeBy]:
    """What made each feature of a store: encoder, revision and, unless an older version built it, recipe."""
    return {
        feature.name: {"encoder": feature.encoder, "revision": feature.revision}
        | ({} if feature.recipe is None else {"recipe": feature.recipe})
        for feature in store.manifest.features
    }


def with_origins(names: Iterable[str], store: Store) -> list[str]:
    """Some features of a store, and those that they are codes of: what a new item's are made by."""
    chosen = list(names)
    origins = [feature.codes_of for feature in store.manifest.features if feature.name in chosen and feature.codes_of]
    return list(dict.fromkeys([*chosen, *origins]))


def encoder_differences(trained_on: MadeBy, found: MadeBy) -> list[str]:
    """How two entries of :func:`feature_encoders` differ, a few words each; none if they make the same rows.

    Names of models, which may be paths, count only where a recipe is missing; what older versions did not record is
    not compared.
    """
    if not (isinstance(trained_on, dict) and isinstance(found, dict)):
        there, here = _as_text(trained_on), _as_text(found)
        return [] if there == here else [f"it was {shown(there)}, now {shown(here)}"]
    if trained_on.get("encoder") == found.get("encoder") == NPY:
        return []
    pairs = {"revision": (trained_on.get("revision"), found.get("revision"))}
    before, now = trained_on.get("recipe"), found.get("recipe")
    if isinstance(before, dict) and isinstance(now, dict):
        pairs |= {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    else:
        pairs["encoder"] = (trained_on.get("encoder"), found.get("encoder"))
    return [f"{key} was {shown(there)}, now {shown(here)}" for key, (there, here) in pairs.items() if there != here]


def _as_text(made_by: MadeBy) -> str:
    """As older versions recorded it."""
    if not isinstance(made_by, dict):
        return str(made_by)
    return NPY if made_by.get("encoder") == NPY else f"{made_by.get('encoder')} {made_by.get('revision')}"
