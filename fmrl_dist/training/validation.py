"""Validation while a run trains: every size's metrics, the best so far, and early stopping (sec. 5.3)."""

from __future__ import annotations

import torch

from fmrl_dist.checkpoint.folder import TrainState
from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.distributed.signals import Stopped, StopRequest
from fmrl_dist.evaluation.catalogue import Catalogue, EmbeddedCatalogue, StreamedCatalogue
from fmrl_dist.evaluation.histograms import count_together
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.split_catalogue import SplitCatalogue, ranks_share
from fmrl_dist.training.learner import Learner
from fmrl_dist.training.logbook import Logbook, Progress
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.run import Run


def note_validation(
    run: Run, learner: Learner, state: TrainState, logbook: Logbook, progress: Progress, stop: StopRequest
) -> bool:
    """Validate, record it, and see whether this is the best so far; False if a signal came, and it is due still."""
    epoch = (state.step - 1) // run.order.steps_per_epoch
    try:
        with learner.engine.whole_weights():
            record = validate(run, learner.module, stop)
    except Stopped:
        return False
    logbook.write({"step": state.step, "epoch": epoch, "split": "valid"} | record)
    update_early_stopping(run.config, state, record)
    state.validation_is_due = False
    progress.say(describe_validation(run.config, state, epoch, record))
    return True


def validate(run: Run, module: TrainingModule, stop: StopRequest) -> dict[str, float]:
    """Metrics of every size on the validation users: ``ndcg@10@512`` and so on.

    Raises:
        Stopped: a signal came amid it.
    """
    config, runtime = run.config, run.runtime
    module.eval()
    with torch.no_grad():
        catalogue = ranked_catalogue(run, module)
        blocks = evaluation_blocks(
            run.store,
            "valid",
            config.data.max_length,
            runtime.my_share(len(run.store.manifest.splits["valid"])),
            config.eval.users,
            catalogue.inline_dims,
        )
        histograms = count_together(runtime, module.model, catalogue, blocks, False, config.loss.normalize, stop)
    module.train()
    return {
        f"{metric}@{size}": value
        for size, histogram in zip(module.model.sizes, histograms, strict=True)
        for metric, value in metrics_from_histogram(histogram).items()
    }


def ranked_catalogue(run: Run, module: TrainingModule) -> Catalogue:
    """All items as they are now, to validate on."""
    encoder = module.model.encoder
    if run.inline:
        return StreamedCatalogue(encoder, run.store, encoder.feature_dims)
    num_items = run.store.manifest.num_items
    if not ranks_share(num_items, module.model.width, run.runtime.world_size, module.part is not None):
        return EmbeddedCatalogue(module.item_embeddings())
    return SplitCatalogue.embed(run.runtime.rank, run.runtime.world_size, num_items, module.item_embeddings)


def update_early_stopping(config: Config, state: TrainState, record: dict[str, float]) -> None:
    """Note whether the chosen metric is the best so far; every rank has the same figures and so the same answer."""
    value = record[f"{config.eval.metric}@{config.eval.size or config.model.width}"]
    if value > state.best_value:
        state.best_value, state.best_step, state.evaluations_without_gain = value, state.step, 0
    else:
        state.evaluations_without_gain += 1


def describe_validation(config: Config, state: TrainState, epoch: int, record: dict[str, float]) -> str:
    metric, sizes = config.eval.metric, config.model.sizes
    values = "  ".join(f"{size}: {record[f'{metric}@{size}']:.4f}" for size in sizes)
    best = f"(best {state.best_value:.4f} at step {state.best_step})"
    return f"epoch {epoch + 1}, step {state.step}: valid {metric}  {values}  {best}"
