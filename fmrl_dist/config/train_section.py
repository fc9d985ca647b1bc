"""Sections of the configuration: training, evaluation, and the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fmrl_dist.base.errors import require
from fmrl_dist.config.data_section import check_path
from fmrl_dist.config.parsing import (
    Fraction,
    Limits,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)

RANK_METRICS = ("recall", "ndcg", "mrr")
MAX_CUTOFF = 1000  # of ranks that are counted
AUTO_EPOCHS, MIN_AUTO_STEPS = 20, 400  # passes over the training users, or as many as make so many steps
MAX_AUTO_BATCH, MIN_AUTO_BATCH = 128, 16  # histories of a step: halved until
WANTED_AUTO_STEPS = 750  # 20 epochs have so many steps, and
MAX_AUTO_TARGETS, MANY_AUTO_STEPS = 1024, 5000  # a step has at most so many targets on average, or 20 epochs many steps
TrainPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation (paper section 5.3), reading ahead, and checkpoints."""

    # passes over the training users, at most; early stopping may end a run earlier; auto: 20, or more for 400 steps
    epochs: PositiveInt | Literal["auto"] = "auto"
    max_steps: NonNegativeInt = 0  # optimiser steps, at most; 0: no limit but the epochs
    schedule_epochs: NonNegativeInt = 0  # length of the cosine schedule; 0: train.epochs
    # histories per step, over all ranks, each with all its windows; auto: 128, halved while 20 epochs have fewer than
    # 750 steps, or fewer than 5,000 and a step more than 1,024 targets on average; but at least 16, and train.lanes
    batch_size: PositiveInt | Literal["auto"] = "auto"
    lanes: NonNegativeInt = 0  # equal parts of the batch that ranks share out; 0: the batch's largest divisor up to 16
    micro_batches: PositiveInt = 1  # parts into which a rank divides its share of a batch, to hold one at a time
    shuffle_blocks: PositiveInt = 64  # blocks whose users are shuffled together; each lane's reader holds that many
    lr: PositiveFloat = 2e-3  # peak learning rate of AdamW, reached after warm-up
    # learning rate at the end of the cosine, as a share of the peak
    min_lr_ratio: Annotated[float, Limits(0, 1)] = 0.0
    weight_decay: NonNegativeFloat = 1e-2  # AdamW's weight decay, of nested and projection matrices only
    id_lr_factor: PositiveFloat = 1.0  # learning rate of the id table's last channels, as a multiple of all others'
    # how fast that grows in sizes below half of the width: the channels that such a size m adds have the multiple times
    # (width / 2m)^id_lr_power; for a sampled softmax; auto: 0.67 with one, else 0
    id_lr_power: Annotated[float, Limits(0, 2)] | Literal["auto"] = "auto"
    id_weight_decay: NonNegativeFloat = 0.0  # AdamW's weight decay of the id table; sampled: of a batch's rows
    beta1: Fraction = 0.9  # AdamW's decay of the first moment
    beta2: Fraction = 0.999  # AdamW's decay of the second moment
    eps: PositiveFloat = 1e-9  # AdamW's epsilon
    warmup_steps: NonNegativeInt = 100  # steps of linear warm-up
    clip_norm: PositiveFloat = 5.0  # gradients of all parameters together are clipped to this norm
    # bf16: inputs of matrix products are bfloat16; parameters, optimiser and ranking stay float32
    precision: TrainPrecision = "fp32"
    init: str = ""  # run or checkpoint whose weights a fresh run starts from; "" for random weights
    seed: NonNegativeInt = 0  # seed of initialisation, order, negatives and dropout
    threads: PositiveInt | Literal["auto"] = "auto"  # CPU threads per process; auto: cores / local ranks
    workers: NonNegativeInt = 1  # processes per rank that read ahead; 0: read when a step needs it
    worker_timeout_s: PositiveFloat = 600.0  # longest wait for the workers before the run ends
    hang_timeout_s: PositiveFloat = 1800.0  # longest step or evaluation; then every rank writes its stacks and ends
    patience: NonNegativeInt = 0  # evaluations without gain before early stopping; 0: never stop early
    log_every_steps: PositiveInt = 10  # steps between two records in metrics.jsonl
    checkpoint_every_steps: NonNegativeInt = 0  # steps between checkpoints, besides those at every evaluation; 0: none
    checkpoint_every_minutes: NonNegativeFloat = 0.0  # minutes between checkpoints, besides the others; 0: none
    keep_checkpoints: PositiveInt = 2  # number of newest checkpoints to keep; the best is always kept

    def __post_init__(self) -> None:
        check_fields(self, "train")
        require(
            self.lanes == 0 or self.largest_batch_size % self.lanes == 0,
            f"train.lanes is {self.lanes}, which does not divide train.batch_size {self.largest_batch_size}",
        )

    @property
    def num_epochs(self) -> int:
        """Epochs of a configuration that is resolved for a store."""
        assert isinstance(self.epochs, int), "resolved"
        return self.epochs

    @property
    def histories_per_step(self) -> int:
        """Histories of a global batch, likewise."""
        assert isinstance(self.batch_size, int), "resolved"
        return self.batch_size

    @property
    def id_lr_power_in_force(self) -> float:
        """How fast the ids' rates grow towards smaller sizes, likewise."""
        assert not isinstance(self.id_lr_power, str), "resolved"
        return self.id_lr_power

    @property
    def num_lanes(self) -> int:
        """Lanes that divide the global batch: unless they are set, its largest divisor up to 16."""
        return self.lanes or max(n for n in range(1, 17) if self.largest_batch_size % n == 0)

    @property
    def largest_batch_size(self) -> int:
        """The batch; with auto the largest that it may be, which all lanes that it may have divide alike."""
        return MAX_AUTO_BATCH if self.batch_size == "auto" else self.batch_size

    def auto_batch_size(self, num_users: int, targets_per_user: float) -> int:
        """What ``batch_size: auto`` is: small where an epoch would have few steps, and a step many targets."""
        batch_size = MAX_AUTO_BATCH
        while batch_size > max(MIN_AUTO_BATCH, self.lanes):
            steps, targets = AUTO_EPOCHS * num_users / batch_size, batch_size * targets_per_user
            if steps >= WANTED_AUTO_STEPS and (targets <= MAX_AUTO_TARGETS or steps >= MANY_AUTO_STEPS):
                break
            batch_size //= 2
        return batch_size


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training, and what decides which checkpoint is best."""

    cutoffs: tuple[Annotated[int, Limits(1, MAX_CUTOFF)], ...] = (5, 10)  # k of the metrics, in increasing order
    # metrics, each at every cut-off: recall, ndcg and mrr of the target's rank; and, in final evaluations alone, of the
    # items that are recommended: coverage, the share of the catalogue that somebody gets | popularity, mean percentile
    metrics: tuple[Literal["recall", "ndcg", "mrr", "coverage", "popularity"], ...] = ("recall", "ndcg", "mrr")
    metric: str = "ndcg@10"  # validation metric that chooses the best checkpoint, at eval.size: one of the metrics@k
    # which of model.sizes chooses the best checkpoint; mean: all of them, by the mean of their metrics | 0: the largest
    size: NonNegativeInt | Literal["mean"] = "mean"
    every_steps: NonNegativeInt = 0  # steps between validations; 0: once per epoch
    users: NonNegativeInt = 0  # validate on a fixed, evenly spread subset of so many users; 0: all
    # free baselines beside a final evaluation's figures, computed once per store: popularity | cosine of the last
    # item's features | item_knn: items that the same users have
    baselines: tuple[Literal["popularity", "cosine", "item_knn"], ...] = ("popularity", "cosine", "item_knn")
    # keep every user's ranks beside an evaluation's figures, for fmrl_dist.compare (while it is written, 24 bytes per
    # user, and 16 per user and size)
    per_user: bool = True
    # final evaluations also rank with cut vectors, outputs and item vectors of the whole network, rotated and cut to
    # each smaller size: twice the time
    cut_vectors: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "eval")
        require(
            len(self.cutoffs) > 0 and list(self.cutoffs) == sorted(set(self.cutoffs)),
            f"eval.cutoffs is {list(self.cutoffs)}; expected increasing numbers, such as [5, 10]",
        )
        require(
            len(self.metrics) > 0 and len(set(self.metrics)) == len(self.metrics),
            f"eval.metrics is {list(self.metrics)}; expected different names, such as [recall, ndcg]",
        )
        require(
            any(name in RANK_METRICS for name in self.metrics),
            f"eval.metrics is {list(self.metrics)}; expected at least one of {', '.join(RANK_METRICS)} too",
        )
        require(
            self.metric in self.metric_names,
            f"eval.metric is {self.metric!r}; expected one of: {', '.join(self.metric_names)} (eval.metrics, each at "
            "eval.cutoffs)",
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """``name@k`` of every metric of ranks at every cut-off."""
        return tuple(f"{name}@{k}" for k in self.cutoffs for name in self.metrics if name in RANK_METRICS)

    @property
    def list_metric_names(self) -> tuple[str, ...]:
        """``name@k`` of every other metric, of the items that are recommended."""
        return tuple(f"{name}@{k}" for k in self.cutoffs for name in self.metrics if name not in RANK_METRICS)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = ""  # the run's folder; "" for runs/<config name>
    tensorboard: bool = True  # write TensorBoard files too

    def __post_init__(self) -> None:
        check_fields(self, "run")
        check_path("run.dir", self.dir)
