"""Unreadable blocks under ``store.on_bad_shard: skip``: all ranks leave them out together."""

from __future__ import annotations

import torch

from fmrl_dist.checkpoint.folder import TrainState
from fmrl_dist.data.store.reader import check_lost_users
from fmrl_dist.training.run import Run


def leave_out(run: Run, state: TrainState, damaged: list[int]) -> None:
    """From this step on, leave out on all ranks the blocks that any rank could not read.

    Raises:
        UserError: on all ranks; they hold too many of the users.
    """
    flags = torch.zeros(len(run.store.manifest.splits["train"]), dtype=torch.int64, device=run.runtime.device)
    flags[[*state.skipped_blocks, *damaged]] = 1
    state.skipped_blocks = run.runtime.sum(flags).nonzero().flatten().tolist()
    run.runtime.say(describe_lost_users(run, state.skipped_blocks))
    check_lost_users(num_lost_users(run, state.skipped_blocks), run.order.num_users, "train", run.store)


def num_lost_users(run: Run, skipped_blocks: list[int]) -> int:
    return sum(run.store.manifest.splits["train"][number].count for number in skipped_blocks)


def describe_lost_users(run: Run, skipped_blocks: list[int]) -> str:
    """The number of lost users, and the shards to repair."""
    blocks = [run.store.manifest.splits["train"][number] for number in skipped_blocks]
    shards = sorted({block.shard for block in blocks})
    lost, total = num_lost_users(run, skipped_blocks), run.order.num_users
    return (
        f"{len(blocks)} damaged block(s) of {', '.join(shards[:5])}{' …' if len(shards) > 5 else ''} left out: "
        f"{lost:,} of {total:,} training users are lost; see python -m shards.verify {run.store.location}"
    )
