"""One YAML file drives build, train and evaluate; this file says what may stand in it.

Every section is a frozen dataclass. An unknown key, a wrong type or an impossible combination is a
:class:`~fmrl_dist.base.errors.UserError` at construction, with the mend in its message. Any key can be overridden on
the command line as ``--section.key value`` (the value is read as YAML).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from dataclasses import dataclass, field
from typing import Any

import yaml

from fmrl_dist.base.errors import require
from fmrl_dist.base.urls import hide_credentials, is_url
from fmrl_dist.config.features import FeatureConfig
from fmrl_dist.config.parsing import require_at_least, require_choice

FEATURE_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED_NAMES = {"ids", "users", "starts", "items", "times", "targets", "mask", "count", "block_items", "block_counts"}
MIN_CHUNK_WIDTH = 4


@dataclass(frozen=True)
class DemoConfig:
    """Size and seed of the generated demo data (``shards.demo``)."""

    users: int = 3000
    items: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, "data.demo", 1, "users", "items")
        require_at_least(self, "data.demo", 0, "seed")


@dataclass(frozen=True)
class SequenceTableConfig:
    """The histories: a table of whole sequences, or of single interactions (Parquet or CSV)."""

    path: str = "sequences.parquet"
    layout: str = "sequences"  # sequences: one row a user, items a list | interactions: one row an event
    user: str = "user_id"
    items: str = "item_ids"
    times: str = ""  # optional column; interactions are ordered by it, ties keep the table's order

    def __post_init__(self) -> None:
        require_choice("data.sequences.layout", self.layout, ("sequences", "interactions"))


@dataclass(frozen=True)
class ItemTableConfig:
    """The catalogue: one row an item; row = internal id."""

    path: str = "items.parquet"
    id: str = "item_id"
    title: str = ""  # optional column, kept in the vocabulary for reading recommendations


@dataclass(frozen=True)
class DataConfig:
    """Raw tables, and how a history is read from the store."""

    root: str = "data"
    demo: DemoConfig | None = None  # set: the raw tables are generated into data.root when they are missing
    sequences: SequenceTableConfig = field(default_factory=SequenceTableConfig)
    items: ItemTableConfig = field(default_factory=ItemTableConfig)
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    text: tuple[str, ...] = ("Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}")
    text_separator: str = "\n"
    max_length: int = 50  # targets of a training window, events of an evaluation history
    windows: str = "last"  # last: one window a user | all: windows that partition the user's targets

    def __post_init__(self) -> None:
        require_choice("data.windows", self.windows, ("last", "all"))
        require_at_least(self, "data", 1, "max_length")
        reserved = ", ".join(sorted(RESERVED_NAMES))
        for name, feature in self.features.items():
            require(
                FEATURE_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES,
                f"feature name {name!r} is not allowed: expected [a-z][a-z0-9_]*, none of {reserved}",
            )
            feature.check(f"data.features.{name}")


@dataclass(frozen=True)
class StoreConfig:
    """The shard store that ``shards.build`` writes and everything else reads."""

    path: str = ""  # a folder, or to read from a URL (http, https, s3, gs); default: stores/<config name>
    users_per_block: int = 256
    items_per_block: int = 1024
    blocks_per_shard: int = 16
    # table: features are read from a table of all items, unpacked once for each node | inline: they ride with the
    # histories (the store is built so), and nothing that training holds grows with the catalogue
    feature_mode: str = "table"
    timeout_s: float = 120.0  # for one block from a URL, all tries together
    retries: int = 4  # after the first try
    # For what is unpacked or counted once for each node, and blocks from a URL; default: <path>.derived beside a folder
    # that may be written to, else fmrl-dist in the user's cache folder.
    cache_dir: str = ""
    cache_gb: float = 10.0  # 10^9 bytes; the blocks read longest ago go first; 0: no cache
    on_bad_shard: str = "stop"  # stop | skip: leave the users of a damaged block out, and count them

    def __post_init__(self) -> None:
        require_at_least(self, "store", 1, "users_per_block", "items_per_block", "blocks_per_shard")
        require_at_least(self, "store", 0, "retries", "cache_gb")
        require_choice("store.feature_mode", self.feature_mode, ("table", "inline"))
        require_choice("store.on_bad_shard", self.on_bad_shard, ("stop", "skip"))
        require(self.timeout_s > 0, f"store.timeout_s is {self.timeout_s}; expected more than 0")
        require(
            not is_url(self.path) or not re.search(r"\s", self.path),
            "store.path is a URL with a blank in it; write it as %20",
        )


@dataclass(frozen=True)
class ModelConfig:
    """fMRLRec (paper section 3)."""

    sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    width: int = 128
    depth: int = 2
    dropout: float = 0.5  # input embeddings and FFN
    lru_dropout: float = 0.5  # after the LRU
    r_min: float = 0.0
    r_max: float = 0.1
    features: tuple[str, ...] | None = None  # None: every feature of the store
    id_table: bool = False  # a trained embedding per item (the paper's "w/o Lang. & Image" is features: [] and this)
    scan: str = (
        "auto"  # of the recurrence in training: auto: by device | doubling | triton | plain: one event at a time
    )
    feature_scale: str | float = "none"  # none | a number: features times it | standardize: mean 0, unit mean variance

    def __post_init__(self) -> None:
        check_sizes(self.sizes, self.width)
        require_choice("model.scan", self.scan, ("auto", "doubling", "triton", "plain"))
        require_at_least(self, "model", 1, "depth")
        for key in ("dropout", "lru_dropout"):
            require(0 <= getattr(self, key) < 1, f"model.{key} is {getattr(self, key)}; expected 0 <= rate < 1")
        require(
            0 <= self.r_min < self.r_max <= 1,
            f"model.r_min, r_max are {self.r_min}, {self.r_max}; expected 0 <= r_min < r_max <= 1",
        )
        require(
            self.feature_scale in ("none", "standardize")
            or (isinstance(self.feature_scale, float) and self.feature_scale > 0),
            f"model.feature_scale is {self.feature_scale!r}; expected none, standardize or a number above 0",
        )
        names = self.features or ()
        require(len(set(names)) == len(names), f"model.features {list(names)} name a feature twice; name each once")
        require(
            self.features != () or self.id_table,
            "model.features is empty and model.id_table is off: nothing would tell items apart; turn one on",
        )


def check_sizes(sizes: tuple[int, ...], width: int) -> None:
    """Refuse sizes that do not nest: increasing, chunks of at least 4 channels, the last one the width."""
    require(len(sizes) > 0, "model.sizes is empty; expected at least one size")
    chunks = [high - low for low, high in zip((0, *sizes), sizes, strict=False)]
    require(all(c > 0 for c in chunks), f"model.sizes {list(sizes)} do not increase; write them from small to large")
    require(
        all(c >= MIN_CHUNK_WIDTH for c in chunks),
        f"model.sizes {list(sizes)} have a chunk of {min(chunks)} channels; "
        f"a layer-norm needs at least {MIN_CHUNK_WIDTH} between sizes",
    )
    require(sizes[-1] == width, f"the last of model.sizes is {sizes[-1]} but model.width is {width}; make them equal")


@dataclass(frozen=True)
class LossConfig:
    """Nested cross-entropy (paper eq. 14), over the whole catalogue or over sampled items."""

    impl: str = "auto"  # auto: by device | tiled | triton: a GPU's kernels | plain: all scores at once
    predict_first: bool = True  # a start position predicts the first item of a whole history
    size_weights: tuple[float, ...] | None = None  # c_m of each size; None: 1
    temperatures: tuple[float, ...] | None = None  # τ_m by which each size's scores are divided; None: 1
    normalize: bool = False  # score by cosines of each size's prefixes; needs temperatures
    softmax: str = "full"  # full | sampled
    catalogue: str = "whole"  # of the full softmax: whole: each rank scores all items | split: a slice of them, for all
    negatives: str = "uniform"  # uniform | popularity | in_batch | mixed: uniform and in-batch
    num_negatives: int = 256  # drawn for each lane; in_batch draws none
    popularity_power: float = 0.75  # popularity is (train_count + 1)^power
    scope: str = "lane"  # lane: a position's negatives are its lane's | batch: the whole global batch's

    def __post_init__(self) -> None:
        require_choice("loss.impl", self.impl, ("auto", "tiled", "triton", "plain"))
        require_choice("loss.softmax", self.softmax, ("full", "sampled"))
        require_choice("loss.catalogue", self.catalogue, ("whole", "split"))
        require_choice("loss.negatives", self.negatives, ("uniform", "popularity", "in_batch", "mixed"))
        require_choice("loss.scope", self.scope, ("lane", "batch"))
        require_at_least(self, "loss", 1, "num_negatives")
        require(
            0 <= self.popularity_power <= 2,
            f"loss.popularity_power is {self.popularity_power}; expected 0 (uniform) to 2, often 0.75 or 1",
        )
        weights = self.size_weights
        require(
            weights is None or min(weights, default=-1) >= 0 < sum(weights),
            f"loss.size_weights is {list(weights or ())}; expected numbers of at least 0, one of them more",
        )
        require(
            self.catalogue == "whole" or self.softmax == "full",
            "loss.catalogue is split and loss.softmax is sampled, which scores no catalogue; choose whole, or full",
        )
        require(
            self.catalogue == "whole" or not self.normalize,
            "loss.catalogue is split, which loss.normalize does not support; choose whole, or turn loss.normalize off",
        )
        temperatures = self.temperatures
        require(
            not self.normalize or temperatures is not None,
            "loss.normalize needs loss.temperatures, one for each size: a cosine is at most 1; 0.05 is a usual start",
        )
        require(
            temperatures is None or min(temperatures, default=0) > 0,
            f"loss.temperatures is {list(temperatures or ())}; expected numbers above 0",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation (paper section 5.3)."""

    epochs: int = 500
    max_steps: int = 0  # 0: no limit but the epochs
    schedule_epochs: int = 0  # length of the cosine; 0: train.epochs
    batch_size: int = 32  # histories, over all ranks
    lanes: int = 0  # 0: the largest divisor of batch_size up to 16
    micro_batches: int = 1  # into how many a rank divides its lanes' batch, to hold one at a time
    shuffle_blocks: int = 64  # blocks whose users are shuffled together; each lane's reader holds that many
    lr: float = 1e-3
    min_lr_ratio: float = 0.0
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-9
    warmup_steps: int = 100
    clip_norm: float = 5.0
    precision: str = "fp32"  # fp32 | bf16: matmul inputs in bfloat16, parameters and optimiser stay float32
    seed: int = 0
    threads: int | str = "auto"  # auto: cores / local ranks
    workers: int = 1  # processes that read ahead, for each rank; 0: read when a step wants it
    worker_timeout_s: float = 600.0  # longest wait for them before the run ends
    hang_timeout_s: float = 1800.0  # longest step or evaluation; then every rank writes where it stands, and ends
    patience: int = 10  # evaluations without gain before stopping; 0: never
    log_every_steps: int = 10
    checkpoint_every_steps: int = 0  # besides those at every evaluation; 0: no others
    checkpoint_every_minutes: float = 0.0  # likewise, since the last one
    keep_checkpoints: int = 2  # the newest, to fall back on; the best is always kept

    def __post_init__(self) -> None:
        require_choice("train.precision", self.precision, ("fp32", "bf16"))
        require_at_least(self, "train", 1, "epochs", "batch_size", "log_every_steps")
        require_at_least(self, "train", 1, "micro_batches", "shuffle_blocks", "keep_checkpoints")
        require_at_least(self, "train", 0, "max_steps", "schedule_epochs", "warmup_steps", "checkpoint_every_steps")
        require_at_least(self, "train", 0, "checkpoint_every_minutes", "workers")
        require_at_least(self, "train", 0, "lanes", "patience", "seed", "min_lr_ratio", "weight_decay")
        require(
            self.lanes == 0 or self.batch_size % self.lanes == 0,
            f"train.lanes is {self.lanes}, which does not divide train.batch_size {self.batch_size}",
        )
        for key in ("lr", "eps", "clip_norm", "worker_timeout_s", "hang_timeout_s"):
            require(getattr(self, key) > 0, f"train.{key} is {getattr(self, key)}; expected more than 0")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"train.{key} is {getattr(self, key)}; expected 0 <= beta < 1")
        require(
            self.threads == "auto" or (isinstance(self.threads, int) and self.threads >= 1),
            f"train.threads is {self.threads!r}; expected 'auto' or a number of at least 1",
        )

    @property
    def num_lanes(self) -> int:
        """Lanes that divide the global batch (contracts: the largest divisor up to 16)."""
        return self.lanes or max(n for n in range(1, 17) if self.batch_size % n == 0)


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training, and what decides which checkpoint is best."""

    metric: str = "ndcg@10"
    size: int = 0  # 0: the model's width
    every_steps: int = 0  # 0: at the end of each epoch
    users: int = 0  # validation on a fixed subset; 0: all

    def __post_init__(self) -> None:
        require_choice("eval.metric", self.metric, ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10"))
        require_at_least(self, "eval", 0, "every_steps", "users")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = ""  # default: runs/<config name>
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    """Everything a run needs, and nothing that it does not."""

    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            self.eval.size in (0, *self.model.sizes),
            f"eval.size is {self.eval.size}, which is not trained; choose one of {list(self.model.sizes)}",
        )
        for key in ("size_weights", "temperatures"):
            values = getattr(self.loss, key)
            require(
                values is None or len(values) == len(self.model.sizes),
                f"loss.{key} has {len(values or ())} numbers; expected one for each of model.sizes "
                f"{list(self.model.sizes)}",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may be printed and recorded: a store's URL without its credentials."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["store"]["path"] = hide_credentials(self.store.path)
        return typing.cast(dict[str, Any], values)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
