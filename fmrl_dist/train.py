"""``accelerate launch -m fmrl_dist.train [--config C]``: train every size at once, then evaluate the best on test.

All of training is the loop in fmrl_dist/training/steps/loop.py: batch → losses → backward → clip → step → record →
validate → save. Here a run is opened, started or resumed, and its best checkpoint evaluated.
"""

from __future__ import annotations

import fmrl_dist.base.parent_process  # noqa: F401  # first: importing torch takes seconds, and the launcher may die in them

# isort: split
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import json_sha256
from fmrl_dist.checkpoint.folder import Checkpoint, latest_sha256, linked_checkpoint, load_checkpoint
from fmrl_dist.checkpoint.run_folder import (
    REPORT_FILE,
    is_finished,
    mark_finished,
    open_run,
    training_is_over,
    wait_for_earlier_life,
)
from fmrl_dist.config.command_line import command_parser, parse_command
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.config.sections import Config
from fmrl_dist.data.item_table import feature_dims
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store, require_users
from fmrl_dist.data.store.resolve import resolved_for
from fmrl_dist.deploy.report_page.page import write_final_page
from fmrl_dist.distributed.processes import Runtime, start_runtime
from fmrl_dist.distributed.signals import Stopped, StopRequest, ask_for_requeue, forget_requeue
from fmrl_dist.evaluation.baselines import baseline_histograms
from fmrl_dist.evaluation.cut_vectors import count_deployments
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.ranker import ranker_of_checkpoint
from fmrl_dist.evaluation.results.figures import EvaluatedModel
from fmrl_dist.evaluation.results.report import report
from fmrl_dist.training.checks import (
    check_heads,
    check_inline,
    check_item_encoder,
    check_something_tells_items_apart,
    check_targets,
    note_on_left_out_events,
    note_on_other_config,
)
from fmrl_dist.training.demo_store import build_missing_demo_store
from fmrl_dist.training.run import Run
from fmrl_dist.training.steps.loop import take_steps

SLACK_S = 300.0  # ranks wait this much longer for each other than the timeouts that end a run with a message
NEW_LINK_S = 90  # a network file system may show an old link for a minute


def train(config: Config, resume: str | None) -> None:
    """Start or resume a training run (see the module's docstring)."""
    build_missing_demo_store(config)
    patience_s = max(config.train.hang_timeout_s, config.train.worker_timeout_s) + SLACK_S
    runtime = start_runtime(config.train.threads, config.train.num_lanes, config.train.precision, patience_s)
    config = replace(config, train=replace(config.train, precision=runtime.precision))
    with StopRequest() as stop:
        try:
            train_and_evaluate(config, runtime, resume, stop)
        except Stopped:
            runtime.say("stopped by a signal; resume with --resume auto")
            if runtime.is_main and stop.requeue:
                ask_for_requeue(Path(config.run.dir))
    runtime.leave()


def train_and_evaluate(config: Config, runtime: Runtime, resume: str | None, stop: StopRequest) -> None:
    """Run the remaining steps of a run, if any, then evaluate its best checkpoint.

    Raises:
        Stopped: a signal was received; everything is saved.
    """
    began, folder = time.monotonic(), Path(config.run.dir)
    store = Store.open(config.store.path, config.store)
    for split in ("valid", "test"):
        require_users(store, split)
    feature_dims(store, config.model.features)  # refuses names that the store lacks
    config = resolved_for(config, store.manifest)
    order = Order(
        [block.count for block in store.manifest.splits["train"]],
        batch_size=config.train.histories_per_step,
        lanes=config.train.num_lanes,
        seed=config.train.seed,
        pool_blocks=config.train.shuffle_blocks,
    )
    check_inline(config, store)
    check_targets(config, store)
    check_something_tells_items_apart(config, store)
    check_heads(config)
    check_item_encoder(config, store)
    for note in (note_on_other_config(config, store), note_on_left_out_events(config, store)):
        if note:
            runtime.say(note)
    runtime.require_same("store", store.manifest.sha256)
    wait_for_earlier_life(folder, runtime)
    found = {latest_sha256(folder / "checkpoints")}
    checkpoint = open_run(config, resume, store.manifest.sha256, runtime.say)
    if checkpoint is not None:
        found.add(checkpoint.sha256)
    if runtime.is_main:
        forget_requeue(folder)
    runtime.require_same("checkpoint", json_sha256(checkpoint and asdict(checkpoint.state)))
    total_steps = config.train.num_epochs * order.steps_per_epoch
    total_steps = min(total_steps, config.train.max_steps or total_steps)

    if checkpoint is None or not training_is_over(config, checkpoint, total_steps):
        with ExitStack() as claim:  # until the evaluation is written, the folder is this run's
            run = Run(config, runtime, folder, store, order, total_steps)
            take_steps(run, checkpoint, found, stop, claim)
            runtime.accelerator.wait_for_everyone()
            _evaluate_best(config, runtime, store, folder, stop, began)
        return
    require(
        linked_checkpoint(folder / "checkpoints", "best") is not None,
        f"checkpoint {checkpoint.path} has nothing left to train, and {folder} has none of its own; evaluate it with "
        "python -m fmrl_dist.evaluate, or start a run that goes further, from its weights, with --train.init",
    )
    if is_finished(folder):
        runtime.say(f"{folder} is finished (step {checkpoint.state.step}); nothing to do")
        if (folder / REPORT_FILE).is_file():
            runtime.say(f"report: {folder / REPORT_FILE}")
        return
    _evaluate_best(config, runtime, store, folder, stop, began)


def load_best(folder: Path, runtime: Runtime) -> Checkpoint:
    """A run's best checkpoint, the same on all ranks; a network file system may show a new one late."""
    for tries_left in reversed(range(NEW_LINK_S)):
        checkpoint, problem = None, ""
        try:
            checkpoint = load_checkpoint(folder, with_optimizer=False)
        except UserError as error:
            problem = str(error)
        if runtime.have_same(checkpoint.sha256 if checkpoint else "0" * 15):
            break
        if tries_left:
            time.sleep(1)
    require(checkpoint is not None, problem)
    assert checkpoint is not None
    runtime.require_same("best checkpoint", checkpoint.sha256)
    return checkpoint


def _evaluate_best(
    config: Config, runtime: Runtime, store: Store, folder: Path, stop: StopRequest, began: float
) -> None:
    stop.raise_together(runtime, stop.requested)  # what comes next can take a while before it listens
    best = load_best(folder, runtime)
    ranker = ranker_of_checkpoint(best, config, store, runtime)
    protocol = EvaluationProtocol.of_report(store, "test", mask_seen=False, config=config.eval)
    counts = count_deployments(ranker, protocol, runtime, stop)
    baselines = baseline_histograms(config.eval.baselines, store, "test", runtime, stop)
    if runtime.is_main:
        model = EvaluatedModel(best.state.step, best.sha256, best.manifest_sha256)
        report(counts, baselines, ranker.model.sizes, protocol, model, folder)
        mark_finished(folder, best)
        write_final_page(folder, store, time.monotonic() - began)


def main(argv: list[str]) -> None:
    parser = command_parser("fmrl_dist.train", "Train every size at once, then evaluate the best checkpoint on test.")
    parser.add_argument("--resume", metavar="auto|PATH", help="resume from the run's latest checkpoint, or from PATH")
    arguments, config = parse_command(parser, argv)
    warn_of_credentials(argv)
    train(config, arguments.resume)


if __name__ == "__main__":
    run_command(main)
