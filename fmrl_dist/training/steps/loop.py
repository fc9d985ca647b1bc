"""The training loop: batch → losses → backward → clip → step → record → validate → save.

Losses are sums over positions, divided once by the global count, so they do not depend on the number of processes (at
dropout 0). Dropout is seeded by (seed, step, rank): a resumed run draws what the uninterrupted run would draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from types import TracebackType
from typing import Self

from fmrl_dist.base.progress import Progress
from fmrl_dist.checkpoint.folder import Checkpoint, TrainState
from fmrl_dist.checkpoint.run_folder import RunClaim, claimed_run_folder, files_of_store, out_of_patience
from fmrl_dist.checkpoint.writer import CheckpointWriter
from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.negatives import NegativeSampler
from fmrl_dist.distributed.signals import Stopped, StopRequest
from fmrl_dist.training.learner import Learner, prepare_learner, save
from fmrl_dist.training.monitoring.logbook import Logbook
from fmrl_dist.training.monitoring.rank_monitor import RankMonitor
from fmrl_dist.training.monitoring.step_metrics import StepMetrics
from fmrl_dist.training.monitoring.step_timer import DATA_WAIT, MEETING, StepTimer
from fmrl_dist.training.run import Run
from fmrl_dist.training.start_line import describe_start
from fmrl_dist.training.steps.agreement import StepResult, agree, stop_if_not_finite
from fmrl_dist.training.steps.feeding import make_feed, make_negative_sampler, make_stream, read_without
from fmrl_dist.training.steps.learning import learn, size_weights
from fmrl_dist.training.steps.schedule import check_learning_rate
from fmrl_dist.training.steps.skipped_blocks import describe_lost_users
from fmrl_dist.training.validation import note_validation


def take_steps(run: Run, resume_from: Checkpoint | None, known: set[str], stop: StopRequest, claim: ExitStack) -> None:
    """Train from a checkpoint, or from the start, to the last step or to the end of patience.

    Args:
        run: its fixed parts.
        resume_from: a checkpoint, whose tensors are let go once they are copied.
        known: hashes of the checkpoints that were found in the run's folder; another one means another run.
        stop: the signals.
        claim: keeps the folder this run's beyond the steps.

    Raises:
        Stopped: a signal was received, by any process; everything is saved.
    """
    learner = prepare_learner(run, resume_from)
    state = TrainState()
    if resume_from is not None:
        state = resume_from.state
        for copied in (resume_from.model, resume_from.optimizer):
            copied.clear()
    check_learning_rate(run, state.step)
    sampler = make_negative_sampler(run)
    features, has_ids = learner.module.model.encoder.feature_dims, run.config.model.has_ids
    store_files = files_of_store(run.store, features, has_ids) if run.runtime.is_main else {}
    claimed = claim.enter_context(claimed_run_folder(run.folder, run.config, run.runtime, store_files, known))
    with TrainingLoop(run, learner, state, sampler, claimed, stop) as loop:
        run.runtime.say(describe_start(run, learner, state.step))
        loop.take_steps()
    loop.progress.close()
    if state.skipped_blocks:
        run.runtime.say(describe_lost_users(run, state.skipped_blocks))
    if loop.stopped:
        raise Stopped


class TrainingLoop:
    """The steps of a run on one process, and what is done between them.

    Use it as a context manager: its workers read ahead, and it writes the run's records and checkpoints.

    Args:
        run: its fixed parts.
        learner: what is trained.
        state: how far it is; kept up to date.
        sampler: of the negatives; None under a full softmax.
        claimed: the run's folder.
        stop: the signals.
    """

    def __init__(
        self,
        run: Run,
        learner: Learner,
        state: TrainState,
        sampler: NegativeSampler | None,
        claimed: RunClaim,
        stop: StopRequest,
    ) -> None:
        self.progress = Progress("step", run.total_steps, state.step, enabled=run.runtime.is_main)
        self.stopped = False  # by a signal, as agreed by all processes
        self._run, self._learner, self._state = run, learner, state
        self._sampler, self._claimed, self._stop = sampler, claimed, stop
        self._last_step: StepResult | None = None

    def __enter__(self) -> Self:
        run, train, state = self._run, self._run.config.train, self._state
        self._timer = StepTimer(self._learner.module)
        self._metrics = StepMetrics(run.config.model.sizes, size_weights(run.config), run.runtime, self._timer)
        self._clock = SaveClock(train.checkpoint_every_minutes)
        with ExitStack() as stack:
            self._logbook = stack.enter_context(
                Logbook(
                    run.folder,
                    state.step,
                    run.config.run.tensorboard,
                    enabled=run.runtime.is_main,
                    repeats_validation=state.validation_is_due,
                )
            )
            self._writer = stack.enter_context(
                CheckpointWriter(run.folder / "checkpoints", self._learner.facts, train.keep_checkpoints)
            )
            self._feed = stack.enter_context(make_feed(run, make_stream(run, self._sampler, state)))
            self._monitor = stack.enter_context(
                RankMonitor(run.runtime, run.folder, state.step, self._timer, train.hang_timeout_s)
            )
            stack.enter_context(closing(self._timer))
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def take_steps(self) -> None:
        """All steps that are left, or until patience ends or a signal was received."""
        run, config, state = self._run, self._run.config, self._state
        if state.validation_is_due:  # the previous job saved, but had no time left for it
            self._validate()
            if not self.stopped:
                self._save()
            self._timer.restart()
        for step in range(state.step, run.total_steps):
            if self.stopped or out_of_patience(config, state.evaluations_without_gain):
                return
            batches, num_targets, save_now = self._read(step)
            self._last_step = learn(run, self._learner, step, batches, num_targets)
            self._metrics.add(self._last_step.loss_sums, num_targets)
            self._timer.steps += 1
            self._monitor.is_alive()

            state.step = step + 1
            state.validation_is_due = state.step % run.evaluate_every_steps == 0 or state.step == run.total_steps
            save_now |= state.validation_is_due or self.stopped or is_save_step(config, state.step)
            if state.step % config.train.log_every_steps == 0 or save_now:  # sums since a record are in no checkpoint
                self._record(self._last_step)
            if state.validation_is_due and not self.stopped:  # a stopping run leaves it to the next job
                self._validate()
            if save_now:
                self._save()

    def _read(self, step: int) -> tuple[Sequence[Packed], int, bool]:
        """This process' batches, the number of all processes' targets, and whether all save after the step."""
        with self._timer.timing(DATA_WAIT):
            batches, damaged = self._feed.batches(step)
        with self._timer.timing(MEETING):
            agreed = agree(self._run.runtime, batches, damaged, self._clock.is_due(), self._stop, self._last_step)
        stop_if_not_finite(self._run.runtime, step, self._last_step, agreed.num_not_finite)
        if agreed.num_stop:
            self.stopped = True
            self._stop.requeue = agreed.num_requeue > 0  # whichever process was notified
        num_targets = agreed.num_targets
        if agreed.num_damaged:
            batches, num_targets = read_without(self._run, self._state, self._feed, self._sampler, damaged, step)
        return batches, num_targets, agreed.num_save_due > 0

    def _record(self, last_step: StepResult) -> None:
        """Write what the steps since the last record have cost and learned."""
        step = self._state.step
        record = self._metrics.record() | {"lr": last_step.lr, "grad_norm": float(last_step.grad_norm)}
        # All processes see the same losses and norm here: none saves what is not finite.
        stop_if_not_finite(self._run.runtime, step, last_step, not all(map(math.isfinite, record.values())))
        self._claimed.check()
        epoch = (step - 1) // self._run.order.steps_per_epoch
        self._logbook.write({"step": step, "epoch": epoch, "split": "train"} | record)
        if slow_ranks := self._monitor.record(step):
            self.progress.say(slow_ranks)
        self._timer.restart()
        self.progress.update(step, self._metrics.line(record))

    def _validate(self) -> None:
        done = note_validation(self._run, self._learner, self._state, self._logbook, self.progress, self._stop)
        self.stopped = not done
        self._monitor.is_alive()

    def _save(self) -> None:
        self._claimed.check()
        save(self._run, self._learner, self._state, self._writer)
        self._clock.restart()
        self._timer.restart()
        self._monitor.is_alive()


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
