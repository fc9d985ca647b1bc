"""Validation during training: every size's metrics, the best so far, and early stopping (sec. 5.3)."""

from __future__ import annotations

from statistics import fmean

from fmrl_dist.base.progress import Progress
from fmrl_dist.checkpoint.folder import TrainState
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import check_lost_users
from fmrl_dist.distributed.signals import Stopped, StopRequest
from fmrl_dist.evaluation.histograms import EvaluationProtocol, count_target_ranks
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.ranker import build_ranker
from fmrl_dist.evaluation.results.figures import num_users_in
from fmrl_dist.evaluation.target_ranks import ALL
from fmrl_dist.training.learner import Learner
from fmrl_dist.training.monitoring.logbook import Logbook
from fmrl_dist.training.run import Run


def note_validation(
    run: Run, learner: Learner, state: TrainState, logbook: Logbook, progress: Progress, stop: StopRequest
) -> bool:
    """Validate, log the result, and update the best so far; False if a signal interrupted it: it is still due."""
    epoch = (state.step - 1) // run.order.steps_per_epoch
    try:
        with learner.whole_model():
            record = validate(run, learner, stop)
    except Stopped:
        return False
    logbook.write({"step": state.step, "epoch": epoch, "split": "valid"} | record)
    update_early_stopping(run.config, state, record)
    state.validation_is_due = False
    progress.say(describe_validation(run.config, state, epoch, record))
    return True


def validate(run: Run, learner: Learner, stop: StopRequest) -> dict[str, float]:
    """Metrics of every size on the validation users: ``ndcg@10@512`` and so on, and their means, ``ndcg@10@mean``.

    In evaluation mode everything is float32: the figures equal those of ``fmrl_dist.evaluate --split valid``.

    Raises:
        Stopped: a signal came before the end.
        UserError: damaged blocks cost too many of the users.
    """
    module = learner.module
    module.eval()
    ranker = build_ranker(module.model, run.config, run.store, learner.table, run.runtime)
    protocol = EvaluationProtocol(run.store, "valid", False, run.config.eval.users, run.config.eval.metric_names)
    counts = count_target_ranks(ranker, protocol, run.runtime, stop)
    module.train()
    num_users = min(protocol.num_users or num_users_in(protocol), num_users_in(protocol))
    check_lost_users(num_users - counts.num_users, num_users, "valid", run.store)
    of_sizes = [metrics_from_histogram(histogram, protocol.metrics) for histogram in counts.all_users[ALL]]
    figures = dict(zip(map(str, module.model.sizes), of_sizes, strict=True))
    figures["mean"] = {metric: fmean(of_size[metric] for of_size in of_sizes) for metric in protocol.metrics}
    return {f"{metric}@{row}": value for row, of_row in figures.items() for metric, value in of_row.items()}


def update_early_stopping(config: Config, state: TrainState, record: dict[str, float]) -> None:
    """Record whether the chosen metric is the best so far; all ranks have the same figures and so the same answer."""
    value = record[config.chosen_by]
    if value > state.best_value:
        state.best_value, state.best_step, state.evaluations_without_gain = value, state.step, 0
    else:
        state.evaluations_without_gain += 1


def describe_validation(config: Config, state: TrainState, epoch: int, record: dict[str, float]) -> str:
    metric, sizes = config.eval.metric, config.model.sizes
    values = "  ".join(f"{size}: {record[f'{metric}@{size}']:.4f}" for size in sizes)
    which = " mean" if config.eval.size == "mean" else ""
    best = f"(best{which} {state.best_value:.4f} at step {state.best_step})"
    return f"epoch {epoch + 1}, step {state.step}: valid {metric}  {values}  {best}"
