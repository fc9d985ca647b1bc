"""What a resumed run must have in common with its checkpoint."""

from __future__ import annotations

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.config.sections import Config

# Settings that must equal the checkpoint's, or the losses would not be those of a single run.
FIXED = {
    "data": ("max_length", "windows"),
    "store": ("feature_mode",),
    "model": (
        "sizes",
        "depth",
        "dropout",
        "mixer",
        "lru_dropout",
        "dropout_power",
        "r_min",
        "r_max",
        "head_width",
        "positions",
        "window",
        "low_pass",
        "low_pass_share",
        "input_norm",
        "output_norm",
        "features",
        "id_table",
        "id_width",
        "id_init",
        "id_dropout",
        "feature_dropout",
        "feature_scale",
        "item_encoder",
        "experts",
        "codes",
    ),
    "loss": (
        "predict_first",
        "size_weights",
        "temperatures",
        "temperature_power",
        "normalize",
        "distillation",
        "teacher_temperature",
        "softmax",
        "negatives",
        "num_negatives",
        "popularity_power",
        "mask_rate",
        "score_untrained",
        "scope",
    ),
    "train": (
        "batch_size",
        "shuffle_blocks",
        "seed",
        "precision",
        "lr",
        "min_lr_ratio",
        "warmup_steps",
        "weight_decay",
        "id_lr_factor",
        "id_lr_power",
        "id_weight_decay",
        "beta1",
        "beta2",
        "eps",
        "clip_norm",
    ),
}


def check_same_run(config: Config, checkpoint: Checkpoint, manifest_sha256: str) -> None:
    """Refuse to resume from a checkpoint of another run.

    Args:
        config: of this run.
        checkpoint: to resume from.
        manifest_sha256: of this run's store.

    Raises:
        UserError: a setting that must stay, or the store, is another one; the first of them is named.
    """
    saved = config_from_dict(checkpoint.config)
    pairs = [
        (f"{section}.{key}", getattr(getattr(saved, section), key), getattr(getattr(config, section), key))
        for section, keys in FIXED.items()
        for key in keys
    ]
    pairs.append(("train.lanes", saved.train.num_lanes, config.train.num_lanes))
    pairs.append(("train.schedule_epochs", schedule_epochs(saved), schedule_epochs(config)))
    pairs.append(("the store's manifest", checkpoint.manifest_sha256[:12], manifest_sha256[:12]))
    follows = not (saved.train.schedule_epochs or config.train.schedule_epochs)
    for key, before, now in pairs:
        if before != now:
            own = f" (--train.epochs {before}, which it follows)" if key == "train.schedule_epochs" and follows else ""
            raise UserError(
                f"checkpoint {checkpoint.path} has {key} {before!r}, this run {now!r}; "
                f"restore the value{own}, or start another run with --run.dir"
                + (f" (from these weights: --train.init {checkpoint.path})" if "epochs" in key else "")
            )


def schedule_epochs(config: Config) -> int:
    """Length of the cosine schedule in epochs."""
    return config.train.schedule_epochs or config.train.num_epochs
