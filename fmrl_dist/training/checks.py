"""Whether the loss and the scan can run here in the way that the configuration asks for, and have anything to learn."""

from __future__ import annotations

import importlib.util

import torch

from fmrl_dist.base.errors import require
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.built_from import list_differences, recorded_keys
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.model.mixers.attention import chunk_heads

SPLIT_ZERO_STAGES = (1, 2)
MENTIONED_SHARE = 0.05  # of the training events; fewer left out are no news


def resolve_loss_impl(impl: str, device: torch.device) -> str:
    """The implementation of the loss that ``loss.impl`` asks for on ``device``; "auto" chooses.

    Raises:
        UserError: Triton without a GPU or the package.
    """
    if impl == "auto":  # benchmarks/results/h100-2026-11-26: Triton takes 0.2 … 0.9 of the time of tiles
        return "triton" if _has_triton(device) else "tiled"
    if impl == "triton":
        _require_triton("loss.impl", device, "choose tiled or auto")
    return impl


def check_scan_impl(impl: str, device: torch.device) -> None:
    """Refuse a ``model.scan`` that cannot run on ``device``.

    Raises:
        UserError: Triton without a GPU or the package.
    """
    if impl == "triton":
        _require_triton("model.scan", device, "choose doubling or auto")


def _require_triton(key: str, device: torch.device, mend: str) -> None:
    require(
        _has_triton(device),
        f"{key} is triton, which needs a CUDA device and the extra fmrl-dist[triton]; this process runs on {device}: "
        f"{mend}",
    )


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def splits_catalogue(config: Config, runtime: Runtime) -> bool:
    """Whether each rank scores a slice of the items. A single process always scores all of them.

    Raises:
        UserError: an engine under which this is not supported.
    """
    if config.loss.catalogue == "whole" or runtime.world_size == 1:
        return False
    stage = runtime.accelerator.deepspeed_plugin.zero_stage if runtime.uses_deepspeed else None
    require(
        stage is None or stage in SPLIT_ZERO_STAGES,
        f"loss.catalogue is split, which ZeRO {stage} does not support; choose ZeRO 1 or 2, DDP, or loss.catalogue: "
        "whole",
    )
    return True


def check_inline(config: Config, store: Store) -> None:
    """Refuse to train inline on what only a table can serve."""
    if config.store.feature_mode == "table":
        return
    mend = "or read features from a table, by --store.feature_mode table"
    require(
        store.manifest.inline,
        f"store {store.location} does not carry features with its histories; build it with "
        f"python -m shards.build --overwrite --store.feature_mode inline, {mend}",
    )
    loss = config.loss
    found = "full" if loss.softmax == "full" else loss.negatives
    require(
        found in ("uniform", "in_batch", "mixed", "stratified"),
        f"store.feature_mode is inline, and the softmax is {found}; expected loss.softmax sampled with negatives "
        f"uniform, in_batch, mixed or stratified, {mend}",
    )
    require(not config.model.has_ids, f"store.feature_mode is inline and model.id_table is on; turn it off, {mend}")


def check_something_tells_items_apart(config: Config, store: Store) -> None:
    """Refuse a model without any feature and without an id table, or with one that steps leave out: all its items
    would be the same.
    """
    has_features = bool(store.manifest.features if config.model.features is None else config.model.features)
    require(
        has_features or config.model.has_ids,
        f"store {store.location} has no features and model.id_table is off: nothing would tell items apart; turn "
        "model.id_table on, or build the store with data.features",
    )
    for key, rate in (("id_dropout", config.model.id_dropout_rate), ("feature_dropout", config.model.feature_dropout)):
        require(
            has_features or rate == 0,
            f"model.{key} is {rate} and store {store.location} has no features: "
            + ("nothing would tell items apart" if key == "id_dropout" else "there is nothing to leave out")
            + "; set it to 0, or build the store with data.features",
        )


def check_heads(config: Config) -> None:
    """Refuse heads of one channel, which rotary positions cannot turn: they would not know the order of events."""
    model = config.model
    if model.mixer not in ("attention", "bsarec", "bidirectional") or model.positions != "rotary":
        return
    for low, high, width in chunk_heads(model.sizes, model.head_width):
        require(
            width > 1,
            f"model.sizes {list(model.sizes)} have a chunk of {high - low} channels, which heads of at most "
            f"{model.head_width} (model.head_width) divide by single channels only, and rotary positions turn pairs; "
            "choose other sizes or a larger head_width, or model.positions learned",
        )


def check_item_encoder(config: Config, store: Store) -> None:
    """Refuse an item encoder whose features are not what it reads: codes are no vector, and a vector is no codes."""
    kind, named = config.model.item_encoder, config.model.features
    features = [one for one in store.manifest.features if named is None or one.name in named]
    require(
        kind == "projection" or len(features) > 0,
        f"model.item_encoder is {kind}, which embeds features, and store {store.location} has none; build it with "
        "data.features, or choose projection",
    )
    for one in features:
        if kind == "vqrec":
            codes = [other.name for other in store.manifest.features if other.num_codes]
            require(
                one.num_codes > 0,
                f"model.item_encoder is vqrec, which reads codes, and feature {one.name!r} holds vectors; give "
                f"model.features those of source pq: {', '.join(codes) or 'the store has none'}",
            )
            require(
                one.num_codes == config.model.codes,
                f"model.codes is {config.model.codes}, and feature {one.name!r} has {one.num_codes} codes; make them "
                "the same",
            )
        require(
            kind == "vqrec" or not one.num_codes,
            f"feature {one.name!r} holds codes, which model.item_encoder {kind} would read as a vector; leave it out "
            "of model.features, or choose vqrec",
        )


def note_on_other_config(config: Config, store: Store) -> str:
    """How the store differs from the one that this config would build; "" if it does not, or nobody recorded it.

    It is no mistake: a config may name nothing but a store. But whoever changed a key and did not build again sees it.
    """
    built_from = store.manifest.built_from
    differences = built_from.differences(recorded_keys(config)) if built_from is not None else []
    if not differences:
        return ""
    return f"note: store {store.location} was built by another config: {list_differences(differences)}"


def note_on_left_out_events(config: Config, store: Store) -> str:
    """How many training events ``data.windows: last`` leaves out, as far as the manifest tells; "" for none or few.

    Histories within a block may differ, so this is the least that it can be.
    """
    if config.data.windows == "all":
        return ""
    blocks, longest = store.manifest.splits["train"], config.data.max_length
    num_events = sum(block.events for block in blocks)
    left_out = sum(max(0, block.events - longest * block.count) for block in blocks)
    if left_out < MENTIONED_SHARE * num_events:
        return ""
    return (
        f"note: at least {left_out / num_events:.0%} of the training events are left out: data.windows is last, so "
        f"the last {longest} events of each user train; data.windows all trains on all of them"
    )


def check_targets(config: Config, store: Store) -> None:
    """Refuse a store and a loss that leave no target, or none that is compared with another item: the loss would be 0.

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
    users_together = train.histories_per_step // (train.num_lanes if loss.scope == "lane" else 1)
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
