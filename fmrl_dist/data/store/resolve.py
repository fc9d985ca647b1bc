"""What a configuration leaves to the store: keys that are "auto"."""

from __future__ import annotations

from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import Manifest


def resolved_for(config: Config, manifest: Manifest) -> Config:
    """A configuration in which all that is "auto" has its value for a store (:meth:`Config.resolved`)."""
    blocks, names = manifest.splits["train"], config.model.features
    return config.resolved(
        manifest.num_items,
        num_users=sum(block.count for block in blocks),
        num_events=sum(block.events for block in blocks),
        has_features=bool(manifest.features if names is None else names),
    )
