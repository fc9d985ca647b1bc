"""What a run says before its first step."""

from __future__ import annotations

from fmrl_dist.config.model_section import ModelConfig
from fmrl_dist.config.sections import Config
from fmrl_dist.training.learner import Learner
from fmrl_dist.training.run import Run


def describe_start(run: Run, learner: Learner, step: int) -> str:
    """What is about to run: processes, engine, parameters, sizes, loss, config hash."""
    manifest = run.store.manifest
    return (
        f"{run.folder}: {run.runtime.describe()}\n"
        f"  config {run.config.hash}, {learner.num_parameters:,} parameters, sizes {list(run.config.model.sizes)}, "
        f"loss {learner.module.settings.impl}, {describe_softmax(run.config)}, {describe_ids(run.config.model)}, "
        f"dropout {describe_dropout(run.config.model)}\n"
        f"  {manifest.num_users:,} users, {manifest.num_items:,} items, {run.order.steps_per_epoch} steps per epoch of "
        f"{run.config.train.histories_per_step} histories each, "
        f"from step {step} to at most {run.total_steps}"
    )


def describe_softmax(config: Config) -> str:
    """What a position's target is compared with."""
    loss = config.loss
    if loss.softmax == "full":
        return f"full softmax, catalogue {loss.catalogue}"
    drawn = "" if loss.negatives == "in_batch" else f"{loss.num_negatives:,} "
    return f"sampled softmax, {drawn}{loss.negatives} negatives a lane"


def describe_ids(model: ModelConfig) -> str:
    """Which channels have ids."""
    return f"ids on {model.id_width or model.width} channels" if model.has_ids else "no ids"


def describe_dropout(model: ModelConfig) -> str:
    """The rates of the last channels."""
    return " and ".join(dict.fromkeys(f"{rate:g}" for rate in model.dropout_rates.values()))
