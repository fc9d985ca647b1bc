"""Whether there is anything to learn: targets, and other items to compare them with. Without, the loss is 0."""

from __future__ import annotations

from fmrl_dist.base.errors import require
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import Store


def check_targets(config: Config, store: Store) -> None:
    """Refuse a store and a loss that leave no target, or none that is compared with another item.

    Raises:
        UserError: likewise.
    """
    blocks = store.manifest.splits["train"]
    num_users, num_events = sum(block.count for block in blocks), sum(block.events for block in blocks)
    require(
        config.loss.predict_first or num_events > num_users,
        f"all {num_users:,} training histories of store {store.location} have one event, and loss.predict_first is "
        "off: there is no target to learn from; turn it on, or build the store from longer histories",
    )
    loss, data, train = config.loss, config.data, config.train
    users_together = train.batch_size // (train.num_lanes if loss.scope == "lane" else 1)
    one_target_each = num_events == num_users or (data.max_length == 1 and data.windows == "last")
    require(
        loss.softmax == "full" or loss.negatives != "in_batch" or users_together > 1 or not one_target_each,
        "loss.negatives is in_batch, but each target is alone (one user for each lane, with one target each): the loss "
        "would be 0; take a larger train.batch_size, fewer train.lanes, or other negatives",
    )
    require(
        store.manifest.num_items > 1,
        f"store {store.location} has one item: there is nothing to tell it from; build the store from more items",
    )
