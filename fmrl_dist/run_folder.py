"""A run's folder: whether it may be written, and where a resumed run goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from fmrl_dist.checkpoint import Checkpoint, TrainState, load_checkpoint
from fmrl_dist.config import Config, config_from_dict
from fmrl_dist.errors import UserError

# What a resumed run must share with its checkpoint, or its losses would not be those of one run.
FIXED = {
    "data": ("max_length", "windows"),
    "model": (
        *("sizes", "width", "depth", "dropout", "lru_dropout", "r_min", "r_max"),
        *("features", "id_table", "feature_scale"),
    ),
    "loss": (
        *("predict_first", "size_weights", "temperatures", "normalize"),
        *("softmax", "negatives", "num_negatives", "popularity_power", "scope"),
    ),
    "train": (
        *("batch_size", "seed", "precision", "lr", "min_lr_ratio", "warmup_steps"),
        *("weight_decay", "beta1", "beta2", "eps", "clip_norm"),
    ),
    "eval": ("metric", "size"),
}


def open_run(config: Config, resume: str | None, manifest_sha256: str) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a fresh run.

    Args:
        config: of this run.
        resume: None (a fresh run), "auto" (the run's own latest checkpoint, if there is one) or a path. From a path
            the search for the best starts anew unless the folder holds the best that the checkpoint knows of.
        manifest_sha256: of the store.

    Raises:
        UserError: the run's folder exists and ``resume`` is None, or the checkpoint is of another run.
    """
    folder = Path(config.run.dir)
    if resume is None:
        if folder.exists():
            raise UserError(f"run folder {folder} exists; go on with it by --resume auto, or choose another --run.dir")
        return None
    if resume == "auto":
        if not (folder / "checkpoints" / "latest").exists():
            return None
        checkpoint = load_checkpoint(folder, "latest")
    else:
        checkpoint = load_checkpoint(Path(resume), "latest")
        if not _is_best_step(folder, checkpoint.state.best_step):  # else training could end without a best to evaluate
            checkpoint = replace(checkpoint, state=TrainState(step=checkpoint.state.step))
    _check_same_run(config, checkpoint, manifest_sha256)
    return checkpoint


def schedule_epochs(config: Config) -> int:
    """Length of the cosine in epochs."""
    return config.train.schedule_epochs or config.train.epochs


def training_is_over(config: Config, checkpoint: Checkpoint, total_steps: int) -> bool:
    """Whether a checkpoint's run has nothing left to train."""
    return checkpoint.state.step >= total_steps or out_of_patience(config, checkpoint.state.evaluations_without_gain)


def out_of_patience(config: Config, evaluations_without_gain: int) -> bool:
    """Early stopping's rule; patience 0 never stops."""
    return evaluations_without_gain >= (config.train.patience or math.inf)


def run_of_best(checkpoint: Checkpoint) -> Path | None:
    """The run whose best checkpoint this is: its figures and exports are those of its best. None for any other."""
    run = checkpoint.path.parent.parent
    return run if (run / "checkpoints" / "best").resolve() == checkpoint.path else None


def _is_best_step(folder: Path, step: int) -> bool:
    """Whether the folder's best checkpoint is of ``step``."""
    best = folder / "checkpoints" / "best"
    return best.exists() and load_checkpoint(best).state.step == step


def _check_same_run(config: Config, checkpoint: Checkpoint, manifest_sha256: str) -> None:
    saved = config_from_dict(checkpoint.config)
    pairs = [
        (f"{section}.{key}", getattr(getattr(saved, section), key), getattr(getattr(config, section), key))
        for section, keys in FIXED.items()
        for key in keys
    ]
    pairs.append(("train.lanes", saved.train.num_lanes, config.train.num_lanes))
    pairs.append(("train.schedule_epochs", schedule_epochs(saved), schedule_epochs(config)))
    pairs.append(("the store's manifest", checkpoint.manifest_sha256[:12], manifest_sha256[:12]))
    for key, before, now in pairs:
        if before != now:
            raise UserError(
                f"checkpoint {checkpoint.path} has {key} {before!r}, this run {now!r}; "
                "restore the value, or start another run with --run.dir"
            )
