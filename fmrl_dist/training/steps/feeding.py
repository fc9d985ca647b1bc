"""The batches of a run: read ahead by workers, without the blocks that turned out to be damaged."""

from __future__ import annotations

from fmrl_dist.checkpoint.folder import TrainState
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.feed import BatchFeed
from fmrl_dist.data.item_table import feature_dims
from fmrl_dist.data.negatives import NegativeSampler, make_sampler
from fmrl_dist.data.streamed_negatives import StreamedNegatives
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import window_rule
from fmrl_dist.training.run import Run
from fmrl_dist.training.steps.agreement import count_targets
from fmrl_dist.training.steps.skipped_blocks import leave_out


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
