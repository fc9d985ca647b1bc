"""``accelerate launch -m fmrl_dist.train [--config C]``: train every size at once, then evaluate the best on test.

The loop below is all of training: batch → losses → backward → clip → step → log → evaluate → save. Losses are
sums over positions, divided once by the global count, so they do not depend on the number of processes (at dropout 0).
Dropout is seeded by (seed, step, rank): a resumed run draws what the uninterrupted run would draw.
"""

from __future__ import annotations

import fmrl_dist.base.parent_process  # noqa: F401  # first: importing torch takes seconds, and the launcher may die in them

# isort: split
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import json_sha256
from fmrl_dist.base.progress import Progress
from fmrl_dist.checkpoint.folder import Checkpoint, TrainState, latest_sha256, linked_checkpoint, load_checkpoint
from fmrl_dist.checkpoint.run_folder import (
    REPORT_FILE,
    claimed_run_folder,
    files_of_store,
    is_finished,
    mark_finished,
    open_run,
    out_of_patience,
    schedule_epochs,
    training_is_over,
    wait_for_earlier_life,
)
from fmrl_dist.checkpoint.writer import CheckpointWriter
from fmrl_dist.config.command_line import command_parser, parse_command
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.config.model_section import ModelConfig
from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.item_table import feature_dims
from fmrl_dist.data.negatives import NegativeSampler, make_sampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store, require_users
from fmrl_dist.data.store.resolve import resolved_for
from fmrl_dist.data.streamed_negatives import StreamedNegatives
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import window_rule
from fmrl_dist.deploy.report_page.page import write_final_page
from fmrl_dist.distributed.processes import Runtime, start_runtime
from fmrl_dist.distributed.signals import Stopped, StopRequest, ask_for_requeue, forget_requeue
from fmrl_dist.evaluation.baselines import baseline_histograms
from fmrl_dist.evaluation.cut_vectors import count_deployments
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.ranker import ranker_of_checkpoint
from fmrl_dist.evaluation.results.figures import EvaluatedModel
from fmrl_dist.evaluation.results.report import report
from fmrl_dist.training.agreement import StepResult, agree, count_targets, stop_if_not_finite
from fmrl_dist.training.checks import (
    check_heads,
    check_inline,
    check_item_encoder,
    check_something_tells_items_apart,
    check_targets,
    note_on_other_config,
)
from fmrl_dist.training.demo_store import build_missing_demo_store
from fmrl_dist.training.learner import Learner, prepare_learner, save
from fmrl_dist.training.logbook import Logbook
from fmrl_dist.training.optimizer import learning_rate
from fmrl_dist.training.rank_monitor import RankMonitor
from fmrl_dist.training.run import Run
from fmrl_dist.training.skipped_blocks import describe_lost_users, leave_out
from fmrl_dist.training.step_metrics import StepMetrics
from fmrl_dist.training.step_timer import DATA_WAIT, MEETING, StepTimer
from fmrl_dist.training.validation import note_validation

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
    if note := note_on_other_config(config, store):
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
            _train_steps(run, checkpoint, found, stop, claim)
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


def _train_steps(
    run: Run, resume_from: Checkpoint | None, found: set[str], stop: StopRequest, claim: ExitStack
) -> None:
    config, runtime, order = run.config, run.runtime, run.order
    learner = prepare_learner(run, resume_from)
    model = learner.module.model
    state = TrainState()
    if resume_from is not None:
        state = resume_from.state
        for copied in (resume_from.model, resume_from.optimizer):
            copied.clear()
    check_learning_rate(run, state.step)
    sampler = make_negative_sampler(run)
    progress = Progress("step", run.total_steps, state.step, enabled=runtime.is_main)
    timer = StepTimer(learner.module)
    step_metrics = StepMetrics(model.sizes, size_weights(config), runtime, timer)
    clock = SaveClock(config.train.checkpoint_every_minutes)
    stopped = False  # by a signal, as agreed by all processes
    result: StepResult | None = None

    features = model.encoder.feature_dims
    store_files = files_of_store(run.store, features, config.model.has_ids) if runtime.is_main else {}
    claimed = claim.enter_context(claimed_run_folder(run.folder, config, runtime, store_files, found))
    with (
        Logbook(
            run.folder,
            state.step,
            config.run.tensorboard,
            enabled=runtime.is_main,
            repeats_validation=state.validation_is_due,
        ) as logbook,
        CheckpointWriter(run.folder / "checkpoints", learner.facts, config.train.keep_checkpoints) as writer,
        make_feed(run, make_stream(run, sampler, state)) as feed,
        RankMonitor(runtime, run.folder, state.step, timer, config.train.hang_timeout_s) as monitor,
        closing(timer),
    ):
        runtime.say(describe_start(run, learner, state.step))
        if state.validation_is_due:  # the previous job saved, but had no time left for it
            stopped = not note_validation(run, learner, state, logbook, progress, stop)
            if not stopped:
                save(run, learner, state, writer)
            timer.restart()
            monitor.is_alive()
        for step in range(state.step, run.total_steps):
            if stopped or out_of_patience(config, state.evaluations_without_gain):
                break
            epoch = step // order.steps_per_epoch
            with timer.timing(DATA_WAIT):
                batches, damaged = feed.batches(step)
            with timer.timing(MEETING):
                agreed = agree(runtime, batches, damaged, clock.is_due(), stop, result)
            stop_if_not_finite(runtime, step, result, agreed.num_not_finite)
            if stopped := agreed.num_stop > 0:
                stop.requeue = agreed.num_requeue > 0  # whichever process was notified
            num_targets = agreed.num_targets
            if agreed.num_damaged:
                batches, num_targets = read_without(run, state, feed, sampler, damaged, step)

            result = learn(run, learner, step, batches, num_targets)
            step_metrics.add(result.loss_sums, num_targets)
            timer.steps += 1
            monitor.is_alive()

            state.step = step + 1
            evaluate_now = state.step % run.evaluate_every_steps == 0 or state.step == run.total_steps
            save_now = evaluate_now or is_save_step(config, state.step) or agreed.num_save_due > 0 or stopped
            if state.step % config.train.log_every_steps == 0 or save_now:  # sums since a record are in no checkpoint
                record = step_metrics.record() | {"lr": result.lr, "grad_norm": float(result.grad_norm)}
                # All processes see the same losses and norm here: none saves what is not finite.
                stop_if_not_finite(runtime, state.step, result, not all(map(math.isfinite, record.values())))
                claimed.check()
                logbook.write({"step": state.step, "epoch": epoch, "split": "train"} | record)
                if slow_ranks := monitor.record(state.step):
                    progress.say(slow_ranks)
                timer.restart()
                progress.update(state.step, step_metrics.line(record))
            state.validation_is_due = evaluate_now
            if state.validation_is_due and not stopped:  # a stopping run leaves it to the next job
                stopped = not note_validation(run, learner, state, logbook, progress, stop)
                monitor.is_alive()
            if save_now:
                claimed.check()
                save(run, learner, state, writer)
                clock.restart()
                timer.restart()
                monitor.is_alive()
    progress.close()
    if state.skipped_blocks:
        runtime.say(describe_lost_users(run, state.skipped_blocks))
    if stopped:
        raise Stopped


def make_negative_sampler(run: Run) -> NegativeSampler | None:
    """The sampler, if the softmax is sampled; one process of each node computes the files that the others only read."""
    with run.runtime.accelerator.local_main_process_first():
        return make_sampler(run.config, run.store)


def make_stream(run: Run, sampler: NegativeSampler | None, state: TrainState) -> TrainStream:
    """Training batches, without the damaged blocks found so far."""
    config, streamed_negatives = run.config, None
    if run.inline:
        assert sampler is not None, "checked at the start"
        dims = feature_dims(run.store, config.model.features)
        streamed_negatives = StreamedNegatives(run.store, dims, sampler.num_drawn, config.train.seed)
    return TrainStream(
        run.store,
        run.order,
        window_rule(config),
        sampler,
        share_negatives=config.loss.scope == "batch",
        skipped=state.skipped_blocks,
        streamed_negatives=streamed_negatives,
    )


def make_feed(run: Run, stream: TrainStream) -> BatchFeed:
    """This rank's lanes of the stream, read ahead."""
    train, lanes = run.config.train, run.runtime.my_share(run.order.lanes)
    return BatchFeed(stream, lanes, run.total_steps, train.workers, train.worker_timeout_s, train.micro_batches)


def read_without(
    run: Run, state: TrainState, feed: BatchFeed, sampler: NegativeSampler | None, damaged: list[int], step: int
) -> tuple[list[Packed], int]:
    """The batches of a step, and all ranks' number of targets, after leaving out blocks until none is damaged."""
    num_damaged = 1  # on some rank
    while num_damaged:
        leave_out(run, state, damaged)
        feed.change_stream(make_stream(run, sampler, state))
        batches, damaged = feed.batches(step)
        num_targets, num_damaged = run.runtime.agree(count_targets(batches), len(damaged))
    return batches, num_targets


def learn(run: Run, learner: Learner, step: int, batches: Sequence[Packed], num_targets: int) -> StepResult:
    """One optimiser step, on the micro-batches of this process."""
    runtime, engine = run.runtime, learner.engine
    seed_dropout(run.config.train.seed, step, runtime.rank)
    learner.module.begin_step(step)
    weights_S = torch.tensor(size_weights(run.config), device=runtime.device)
    loss_of = partial(mean_loss, weights_S, runtime.world_size, num_targets)
    loss_sums = torch.zeros_like(weights_S)
    for number, batch in enumerate(batches, 1):
        loss_sums += engine.add_gradients(batch.to(runtime.device), loss_of, last=number == len(batches))
    lr = step_learning_rate(run, step)
    engine.set_learning_rate(lr)
    return StepResult(loss_sums, engine.clip_and_step(), lr, batches)


def mean_loss(weights_S: Tensor, world_size: int, num_targets: int, loss_sums: Tensor) -> Tensor:
    """The loss to differentiate, []: engines average over ranks, so it is multiplied by their number."""
    return (weights_S @ loss_sums) / weights_S.sum() * world_size / max(num_targets, 1)


class SaveClock:
    """Tells rank 0, which decides for all, when a checkpoint is due; 0 minutes means never."""

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def is_due(self) -> bool:
        return 0 < self._seconds <= time.monotonic() - self._began


def is_save_step(config: Config, step: int) -> bool:
    """Whether ``train.checkpoint_every_steps`` requires a checkpoint after ``step`` steps; 0 means never."""
    every = config.train.checkpoint_every_steps
    return every > 0 and step % every == 0


def size_weights(config: Config) -> tuple[float, ...]:
    """c_m of each size's loss."""
    return config.loss.size_weights or (1.0,) * len(config.model.sizes)


def check_learning_rate(run: Run, first_step: int) -> None:
    """Refuse steps that would all be taken at a rate of 0, and announce where some would.

    Raises:
        UserError: the cosine has reached 0, and there is nothing but steps at that rate left.
    """
    train = run.config.train
    schedule_steps = schedule_epochs(run.config) * run.order.steps_per_epoch
    if train.min_lr_ratio > 0 or run.total_steps <= schedule_steps:
        return
    require(
        first_step < schedule_steps,
        f"the cosine of {schedule_epochs(run.config)} epochs (train.schedule_epochs) has ended at learning rate 0: "
        "more steps would change nothing; start a new run that goes further with --train.epochs, from these weights "
        f"with --train.init {run.folder}",
    )
    run.runtime.say(f"from step {schedule_steps} on the learning rate is 0 (train.schedule_epochs, train.min_lr_ratio)")


def step_learning_rate(run: Run, step: int) -> float:
    """Learning rate of ``step``."""
    train = run.config.train
    schedule_steps = schedule_epochs(run.config) * run.order.steps_per_epoch
    return learning_rate(step, train.lr, train.warmup_steps, schedule_steps, train.min_lr_ratio)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed a step's dropout from (seed, step, rank), so that checkpoints need no generator state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


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
