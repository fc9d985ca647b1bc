"""One YAML file drives build, train and evaluate; this file defines its keys.

Every section is a frozen dataclass. A field's annotation says which values it takes, and the comment beside it (or
right above it) says what they mean: docs/config.md and ``--help-config`` are made from both
(:mod:`fmrl_dist.config.reference`). An unknown key, a wrong value or an impossible combination is a
:class:`~fmrl_dist.base.errors.UserError` at construction, whose message says what to fix. Any key can be overridden on
the command line as ``--section.key value`` (the value is read as YAML).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from fmrl_dist.base.errors import require
from fmrl_dist.base.urls import hide_credentials, is_url
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import MAX_CODES, FeatureConfig, PqFeature
from fmrl_dist.config.parsing import (
    Fraction,
    Limits,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from fmrl_dist.config.tables import (
    DataFormat,
    DirtConfig,
    IdKinds,
    InteractionsConfig,
    ItemTableConfig,
    SequenceTableConfig,
    SplitConfig,
)

FEATURE_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED_NAMES = {"ids", "users", "starts", "items", "times", "targets", "mask", "count", "block_items", "block_counts"}
MIN_CHUNK_WIDTH = 4
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024  # of a path; less than any file system allows, with room for our own names
RANK_METRICS = ("recall", "ndcg", "mrr")
MAX_CUTOFF = 1000  # of ranks that are counted
MAX_SIZES = 64  # far more than anyone deploys
FULL_SOFTMAX_ITEMS = 4096  # so many are scored at once anyway
AUTO_EPOCHS, AUTO_STEPS = 20, 3500  # at least
AUTO_ID_DROPOUT = 0.1
AUTO_ID_LR_POWER = 0.67
TrainPrecision = Literal["fp32", "bf16"]


def check_path(key: str, path: str) -> None:
    """Refuse what cannot be a file's name, or would not survive a shell script: it ends up in batch scripts."""
    require(path.isprintable(), f"{key} is {path!r}, with a character that cannot be printed; choose another name")
    require(path == path.strip(), f"{key} is {path!r}, with a blank at its begin or end; remove it")
    longest = max((len(part.encode()) for part in path.split("/")), default=0)
    require(
        is_url(path) or (longest <= MAX_NAME_BYTES and len(path.encode()) <= MAX_PATH_BYTES),
        f"{key} is {path[:60]!r}…, with a name of {longest} bytes; expected at most {MAX_NAME_BYTES}, and "
        f"{MAX_PATH_BYTES} in all",
    )


@dataclass(frozen=True)
class DemoConfig:
    """Size and seed of the generated demo data (``shards.demo``)."""

    users: PositiveInt = 3000  # number of users
    items: PositiveInt = 2000  # number of items
    seed: NonNegativeInt = 0  # the same seed and size give the same data

    def __post_init__(self) -> None:
        check_fields(self, "data.demo")


@dataclass(frozen=True)
class DataConfig:
    """Raw tables, and how a history is read from the store."""

    root: str = "data"  # folder of the raw tables
    demo: DemoConfig | None = None  # if set, the raw tables are generated into data.root when they are missing
    # tables: columns are named below | the others are read as their publishers write them (docs/data.md)
    format: DataFormat = "tables"
    # text: as written, so that 0042, 42 and 4.2e1 are three ids | integer: numbers, and anything else is refused; or a
    # mapping, {items: integer, users: text}, where items and users differ
    ids: Literal["text", "integer"] | IdKinds = "text"
    sequences: SequenceTableConfig = field(default_factory=SequenceTableConfig)
    items: ItemTableConfig = field(default_factory=ItemTableConfig)
    interactions: InteractionsConfig = field(default_factory=InteractionsConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    # events of an item that the item table lacks: stop: refuse | drop: leave them out | add: the item joins the
    # catalogue, without text or image
    on_unknown_item: Literal["stop", "drop", "add"] = "stop"
    dirt: DirtConfig = field(default_factory=DirtConfig)
    # item features by name; each has a source, and that source's keys
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    # parts of an item's text, with columns of the item table in braces; an item lacks the parts whose columns it lacks;
    # []: those of "Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}" that the table has
    text: tuple[str, ...] = ()
    text_separator: str = "\n"  # what joins the parts of an item's text
    max_length: PositiveInt = 50  # targets of a training window, events of an evaluation history
    # last: one window per user | all: windows that partition the user's targets
    windows: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        check_fields(self, "data")
        self._check_event_columns()
        reserved = ", ".join(sorted(RESERVED_NAMES))
        for name, feature in self.features.items():
            require(
                FEATURE_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES,
                f"feature name {name!r} is not allowed: expected [a-z][a-z0-9_]*, none of {reserved}",
            )
            check_fields(feature, f"data.features.{name}")
            feature.check(f"data.features.{name}")
            if isinstance(feature, PqFeature):
                self._check_quantised(name, feature)

    def _check_quantised(self, name: str, feature: PqFeature) -> None:
        vectors = [other for other, source in self.features.items() if not isinstance(source, PqFeature)]
        require(
            feature.of in vectors,
            f"data.features.{name}.of is {feature.of!r}; expected another feature that holds vectors: "
            f"{', '.join(vectors) or 'there is none'}",
        )

    @property
    def item_ids(self) -> Literal["text", "integer"]:
        return self.ids.items if isinstance(self.ids, IdKinds) else self.ids

    @property
    def user_ids(self) -> Literal["text", "integer"]:
        return self.ids.users if isinstance(self.ids, IdKinds) else self.ids

    @property
    def recorded_ids(self) -> str | dict[str, str]:
        """``ids`` as records of what something was made from name it: one kind where both are the same."""
        return self.item_ids if self.item_ids == self.user_ids else {"items": self.item_ids, "users": self.user_ids}

    def _check_event_columns(self) -> None:
        """A filter or split of events needs the column that it is about; a published format has its own ratings."""
        columns = self.sequences
        has_rating = bool(columns.rating) or self.format != "tables"
        for key, is_set, has_column, name in (
            ("data.interactions.min_rating", self.interactions.min_rating is not None, has_rating, "rating"),
            ("data.interactions.events", bool(self.interactions.events), bool(columns.event), "event"),
            ("data.split.by: given", self.split.by == "given" and not self.split.valid, bool(columns.split), "split"),
        ):
            require(
                not is_set or has_column,
                f"{key} is set, but data.sequences.{name} names no column; name it, or leave {key} out",
            )


@dataclass(frozen=True)
class StoreConfig:
    """The shard store that ``shards.build`` writes and everything else reads."""

    path: str = ""  # folder, or URL to read from (http, https, s3, gs); "" for stores/<config name>
    build_dir: str = ""  # folder for what builds can use again (encoded rows, sorted events); "" for <path>.build
    users_per_block: PositiveInt = 256  # users of a block, the unit of reading and shuffling
    items_per_block: PositiveInt = 1024  # items of a block
    blocks_per_shard: PositiveInt = 16  # blocks of a tar file
    # table: features are read from a table of all items, unpacked once per node | inline: they ride with the
    # histories (the store is built so), and nothing that training holds grows with the catalogue
    feature_mode: Literal["table", "inline"] = "table"
    timeout_s: PositiveFloat = 120.0  # seconds for one block from a URL, all tries together
    retries: NonNegativeInt = 4  # tries for a block after the first
    # folder for what is unpacked or counted once per node, and for blocks from a URL; "" for <path>.derived beside a
    # folder that can be written to, else fmrl-dist in the user's cache folder
    cache_dir: str = ""
    cache_gb: NonNegativeFloat = 10.0  # 10^9 bytes of blocks from a URL to keep, those read last; 0: none
    # stop: a damaged block ends the run | skip: leave its users out, and count them
    on_bad_shard: Literal["stop", "skip"] = "stop"
    max_lost_share: Fraction = 0.25  # largest share of a split's users that skipped blocks may cost; then all stops

    def __post_init__(self) -> None:
        check_fields(self, "store")
        check_path("store.path", self.path)
        check_path("store.build_dir", self.build_dir)
        require(
            not self.build_dir or Path(self.build_dir).resolve() != Path(self.path).resolve(),
            f"store.build_dir is store.path, {self.path}; choose another folder: the store is replaced as a whole",
        )
        check_path("store.cache_dir", self.cache_dir)
        require(
            not is_url(self.path) or not re.search(r"\s", self.path),
            "store.path is a URL with a blank in it; write it as %20",
        )

    @property
    def build_folder(self) -> Path:
        """What builds of the store can use again. A store at a URL has none."""
        target = Path(self.path).resolve()
        return Path(self.build_dir).resolve() if self.build_dir else target.with_name(f"{target.name}.build")


@dataclass(frozen=True)
class ModelConfig:
    """fMRLRec (paper section 3), with what makes it better: norms at both ends, ids, a longer memory."""

    sizes: tuple[int, ...] = (8, 16, 32, 64, 128)  # Matryoshka sizes, increasing by at least 4; the last is the width
    depth: Annotated[int, Limits(1, 1000)] = 2  # number of blocks
    # rate on the input embeddings and in the feed-forward network, of the last channels
    dropout: Fraction = 0.5
    # what lets the events of a history see each other: lru: the paper's linear recurrence | attention: causal, as
    # SASRec's | filter: FMLP-Rec's learned filter, causal | circular: the same as published, over all of a window |
    # bsarec: causal attention beside a rescaling of high frequencies | bidirectional: attention to all of a history,
    # trained to fill in masked items, as BERT4Rec
    mixer: Literal["lru", "attention", "filter", "circular", "bsarec", "bidirectional"] = "lru"
    lru_dropout: Fraction = 0.5  # rate after the mixer, of the last channels
    # how fast both rates fall towards smaller sizes: the channels that size m adds have the rate times
    # (m / width)^dropout_power; 0: all have the same
    dropout_power: Annotated[float, Limits(0, 2)] = 0.4
    r_min: float = 0.5  # inner radius of the ring on which |Λ| starts, below r_max
    r_max: float = 0.99  # outer radius of that ring, at most 1
    head_width: PositiveInt = 32  # channels of an attention head, at most; each lies within one of sizes' chunks
    # how attention knows where an event stands: rotary: distances | learned: a row per position | none: it does not
    positions: Literal["rotary", "learned", "none"] = "rotary"
    # events that attention and filters read of a history, bidirectional's mask included; auto: data.max_length
    window: PositiveInt | Literal["auto"] = "auto"
    low_pass: PositiveInt = 5  # frequencies that bsarec keeps as they are, on both sides of the spectrum together
    low_pass_share: Fraction = 0.7  # share of bsarec's rescaled frequencies in the mix, the rest is attention's
    input_norm: bool = True  # a layer-norm per chunk before the first block (not in the paper)
    output_norm: bool = True  # and one after the last block, before scoring
    features: tuple[str, ...] | None = None  # names of features to read; null: every feature of the store
    # a trained embedding per item (the paper's "w/o Lang. & Image" is features: [] and this); auto: unless the store is
    # inline, which serves no id table
    id_table: bool | Literal["auto"] = "auto"
    id_width: NonNegativeInt = 0  # first channels that the id table is added to, one of sizes; 0: all of them
    id_init: NonNegativeFloat | None = 0.02  # standard deviation of the id table's first rows; null: 1/√width
    # share of the items whose ids a training step leaves out, wherever these items occur, so that features learn to
    # carry new items; auto: 0.1 if there are features
    id_dropout: Fraction | Literal["auto"] = "auto"
    # share of the items of which a training step leaves out a feature, each feature by itself, wherever these items
    # occur, so that the model learns to bear items that lack one
    feature_dropout: Fraction = 0.0
    # how the recurrence is computed in training: auto: by device and shape | stepwise: one event of all histories at a
    # time | doubling | triton | plain: one event of one history at a time
    scan: Literal["auto", "stepwise", "doubling", "triton", "plain"] = "auto"
    # projection: features become embeddings by one matrix, as in the paper | unisrec: by UniSRec's whitening and
    # mixture of experts | vqrec: by VQRec's tables, which codes look up (features of source pq alone)
    item_encoder: Literal["projection", "unisrec", "vqrec"] = "projection"
    experts: Annotated[int, Limits(1, 1000)] = 8  # of unisrec
    codes: Annotated[int, Limits(2, MAX_CODES)] = 256  # of vqrec: numbers that a code can be, as the features have them
    # none: features as they are | a number: features times it | standardize: mean 0, and mean variance 1 | length: mean
    # 0, and mean squared length 9, whatever the dim; codes are never scaled
    feature_scale: Literal["none", "standardize", "length"] | PositiveFloat = "length"

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_sizes(self.sizes)
        require(
            0 <= self.r_min < self.r_max <= 1,
            f"model.r_min, r_max are {self.r_min}, {self.r_max}; expected 0 <= r_min < r_max <= 1",
        )
        names = self.features or ()
        require(len(set(names)) == len(names), f"model.features {list(names)} name a feature twice; name each once")
        require(
            self.features != () or bool(self.id_table),
            "model.features is empty and model.id_table is off: nothing would distinguish items; turn one on",
        )
        require(
            self.id_width in (0, *self.sizes),
            f"model.id_width is {self.id_width}; expected 0 or one of model.sizes {list(self.sizes)}",
        )
        require(
            self.features != () or self.item_encoder == "projection",
            f"model.item_encoder is {self.item_encoder}, which embeds features, and model.features is empty; name "
            "some, or choose projection",
        )
        require(
            self.features != () or self.feature_dropout == 0,
            f"model.feature_dropout is {self.feature_dropout} and model.features is empty: there is nothing to leave "
            "out; set it to 0",
        )
        require(
            self.features != () or self.id_dropout in ("auto", 0),
            f"model.id_dropout is {self.id_dropout} and model.features is empty: nothing would distinguish items "
            "without their ids; set it to 0",
        )

    @property
    def has_ids(self) -> bool:
        """Whether there is an id table, of a configuration that is resolved for a store."""
        assert isinstance(self.id_table, bool), "resolved"
        return self.id_table

    @property
    def id_dropout_rate(self) -> float:
        """Share of the items whose ids a step leaves out, likewise."""
        assert not isinstance(self.id_dropout, str), "resolved"
        return self.id_dropout

    @property
    def num_window_events(self) -> int:
        """Events that the mixer reads, likewise; 1 for the LRU, which has no limit."""
        assert self.mixer == "lru" or isinstance(self.window, int), "resolved"
        return 1 if isinstance(self.window, str) else self.window

    @property
    def width(self) -> int:
        """D, the largest size."""
        return self.sizes[-1]


def check_sizes(sizes: tuple[int, ...]) -> None:
    """Refuse sizes that do not nest: increasing, in chunks of at least 4 channels."""
    require(len(sizes) > 0, "model.sizes is empty; expected at least one size")
    require(len(sizes) <= MAX_SIZES, f"model.sizes has {len(sizes):,} numbers; expected at most {MAX_SIZES}")
    chunks = [high - low for low, high in zip((0, *sizes), sizes, strict=False)]
    require(all(c > 0 for c in chunks), f"model.sizes {list(sizes)} do not increase; write them from small to large")
    require(
        all(c >= MIN_CHUNK_WIDTH for c in chunks),
        f"model.sizes {list(sizes)} have a chunk of {min(chunks)} channels; "
        f"a layer-norm needs at least {MIN_CHUNK_WIDTH} between sizes",
    )


@dataclass(frozen=True)
class LossConfig:
    """Nested cross-entropy (paper eq. 14), over the whole catalogue or over sampled items."""

    # how the loss is computed: auto: by device | tiled | triton: a GPU's kernels | plain: all scores at once
    impl: Literal["auto", "tiled", "triton", "plain"] = "auto"
    predict_first: bool = True  # a start position predicts the first item of a whole history
    size_weights: tuple[float, ...] | None = None  # weight c_m of each size's loss; null: 1
    # τ_m by which each size's scores are divided; null: (m / width)^temperature_power, as small sizes score lower
    temperatures: tuple[PositiveFloat, ...] | None = None
    temperature_power: Annotated[float, Limits(0, 2)] = 0.5  # of them; 0: all are 1
    normalize: bool = False  # score by cosines of each size's prefixes; needs temperatures
    # share α_m of what a size learns from the largest size's softmax instead of from the right item: a number for all
    # smaller sizes, or one for each size, the last of them 0
    distillation: Annotated[float, Limits(0, 1)] | tuple[Annotated[float, Limits(0, 1)], ...] = 0.5
    teacher_temperature: PositiveFloat = 1.0  # κ by which the largest size's scores are divided, to teach
    # full: over all items | sampled: over the target and negatives | auto: sampled in an inline store, or if there are
    # more than 4,096 items; full if the catalogue is split
    softmax: Literal["auto", "full", "sampled"] = "auto"
    # whole: each rank scores all items | split: each scores a slice of them, for all ranks; for the full softmax
    catalogue: Literal["whole", "split"] = "whole"
    # uniform: drawn from all items | popularity: drawn by training counts | in_batch: the batch's targets | mixed:
    # uniform and in_batch | stratified: the batch's targets exactly, and uniform ones that stand for all others
    negatives: Literal["uniform", "popularity", "in_batch", "mixed", "stratified"] = "stratified"
    num_negatives: PositiveInt = 64  # negatives drawn per lane; in_batch draws none
    popularity_power: Annotated[float, Limits(0, 2)] = 0.75  # popularity is (train_count + 1)^power; 0 is uniform
    mask_rate: Annotated[float, Limits(0, 1)] = 0.2  # share of a history's items that mixer bidirectional fills in
    # whether items without a training event are scored, too: never right, they would only learn to rank low
    score_untrained: bool = False
    # lane: a position's negatives are those of its lane | batch: those of the whole global batch
    scope: Literal["lane", "batch"] = "batch"

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        weights = self.size_weights
        require(
            weights is None or min(weights, default=-1) >= 0 < sum(weights),
            f"loss.size_weights is {list(weights or ())}; expected numbers of at least 0, one of them more",
        )
        require(
            self.catalogue == "whole" or self.softmax != "sampled",
            "loss.catalogue is split and loss.softmax is sampled, which scores no catalogue; choose whole, or full",
        )
        require(
            self.catalogue == "whole" or not self.normalize,
            "loss.catalogue is split, which loss.normalize does not support; choose whole, or turn loss.normalize off",
        )
        require(
            not self.normalize or self.temperatures is not None,
            "loss.normalize needs loss.temperatures, one for each size: a cosine is at most 1; 0.05 is a usual start",
        )
        require(
            not self.normalize or self.alphas(2) is None,
            f"loss.normalize scores each size apart, which loss.distillation {shown(self.distillation)} does not "
            "support; set that to 0",
        )
        require(
            not isinstance(self.distillation, tuple) or self.distillation[-1:] == (0.0,),
            f"loss.distillation is {shown(self.distillation)}; the largest size has no teacher: write 0 last",
        )

    def alphas(self, num_sizes: int) -> tuple[float, ...] | None:
        """α_m of each size; None where no size learns from the largest one."""
        shares = self.distillation
        if not isinstance(shares, tuple):
            shares = (shares,) * (num_sizes - 1) + (0.0,)
        return shares if any(shares) else None


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation (paper section 5.3), reading ahead, and checkpoints."""

    # passes over the training users, at most; early stopping may end a run earlier; auto: 20, or more for 3,500 steps
    epochs: PositiveInt | Literal["auto"] = "auto"
    max_steps: NonNegativeInt = 0  # optimiser steps, at most; 0: no limit but the epochs
    schedule_epochs: NonNegativeInt = 0  # length of the cosine schedule; 0: train.epochs
    batch_size: PositiveInt = 128  # histories per step, over all ranks
    lanes: NonNegativeInt = 0  # equal parts of the batch that ranks share out; 0: the batch's largest divisor up to 16
    micro_batches: PositiveInt = 1  # parts into which a rank divides its share of a batch, to hold one at a time
    shuffle_blocks: PositiveInt = 64  # blocks whose users are shuffled together; each lane's reader holds that many
    lr: PositiveFloat = 2e-3  # peak learning rate of AdamW, reached after warm-up
    min_lr_ratio: NonNegativeFloat = 0.0  # learning rate at the end of the cosine, as a share of the peak
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
            self.lanes == 0 or self.batch_size % self.lanes == 0,
            f"train.lanes is {self.lanes}, which does not divide train.batch_size {self.batch_size}",
        )

    @property
    def num_epochs(self) -> int:
        """Epochs of a configuration that is resolved for a store."""
        assert isinstance(self.epochs, int), "resolved"
        return self.epochs

    @property
    def id_lr_power_in_force(self) -> float:
        """How fast the ids' rates grow towards smaller sizes, likewise."""
        assert not isinstance(self.id_lr_power, str), "resolved"
        return self.id_lr_power

    @property
    def num_lanes(self) -> int:
        """Lanes that divide the global batch (contracts: the largest divisor up to 16)."""
        return self.lanes or max(n for n in range(1, 17) if self.batch_size % n == 0)


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


def _hidden(value: Any) -> Any:
    """Plain values with the credentials of every URL hidden."""
    if isinstance(value, str):
        return hide_credentials(value)
    if isinstance(value, list):
        return [_hidden(part) for part in value]
    return {key: _hidden(part) for key, part in value.items()} if isinstance(value, dict) else value


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
            self.eval.size in ("mean", 0, *self.model.sizes),
            f"eval.size is {self.eval.size}, which is not trained; choose one of {list(self.model.sizes)}, or mean",
        )
        require(
            self.model.item_encoder == "projection" or self.loss.catalogue == "whole",
            f"loss.catalogue is split, which needs items that are projected, and model.item_encoder is "
            f"{self.model.item_encoder}; choose whole, or projection",
        )
        window, mixer = self.model.window, self.model.mixer
        require(
            mixer == "lru" or window == "auto" or window >= self.data.max_length,
            f"model.window is {window}, less than the {self.data.max_length} events of data.max_length that mixer "
            f"{mixer} is to read; leave model.window out, or shorten data.max_length",
        )
        components = 2 * ((self.data.max_length if window == "auto" else window) // 2) + 1
        require(
            mixer != "bsarec" or self.model.low_pass < components,
            f"model.low_pass is {self.model.low_pass}, which leaves no high frequencies of a window's {components}; "
            "lower it, or raise model.window",
        )
        require(
            mixer != "bidirectional" or self.loss.predict_first,
            "model.mixer is bidirectional and loss.predict_first is off: training would never see a history's first "
            "event; turn it on",
        )
        require(
            self.loss.softmax != "full" or self.train.id_lr_power in ("auto", 0),
            f"train.id_lr_power is {self.train.id_lr_power} and the softmax is full, whose optimiser has one rate for "
            "all channels of the ids; set it to 0, or loss.softmax to sampled",
        )
        for key in ("size_weights", "temperatures", "distillation"):
            values = getattr(self.loss, key)
            if isinstance(values, tuple):
                require(
                    len(values) == len(self.model.sizes),
                    f"loss.{key} has {len(values)} numbers; expected one for each of model.sizes "
                    f"{list(self.model.sizes)}",
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may be printed and recorded: URLs without their credentials."""
        values = typing.cast(dict[str, Any], _hidden(json.loads(json.dumps(dataclasses.asdict(self)))))
        values["data"] |= {"text": list(self.data.text), "text_separator": self.data.text_separator}  # as they are
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def chosen_by(self) -> str:
        """The name in ``metrics.jsonl`` of the validation figure that chooses the best checkpoint."""
        return f"{self.eval.metric}@{self.eval.size or self.model.width}"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """τ_m of each size."""
        power = self.loss.temperature_power
        return self.loss.temperatures or tuple((size / self.model.width) ** power for size in self.model.sizes)

    def temperature_of(self, size: int) -> float:
        """What a trained size's scores are divided by."""
        return self.temperatures[self.model.sizes.index(size)]

    def resolved(self, num_items: int, steps_per_epoch: int, has_features: bool) -> Config:
        """This configuration for a store: what is "auto" because it depends on one has its value."""
        inline = self.store.feature_mode == "inline"
        ids, softmax, epochs = self.model.id_table, self.loss.softmax, self.train.epochs
        id_dropout = self.model.id_dropout
        if ids == "auto":
            ids = not inline
        if id_dropout == "auto":
            id_dropout = AUTO_ID_DROPOUT if ids and has_features else 0.0
        if softmax == "auto":
            samples = self.loss.catalogue == "whole" and (inline or num_items > FULL_SOFTMAX_ITEMS)
            softmax = "sampled" if samples else "full"
        if epochs == "auto":
            epochs = max(AUTO_EPOCHS, -(-AUTO_STEPS // steps_per_epoch))
        id_lr_power = self.train.id_lr_power
        if id_lr_power == "auto":
            id_lr_power = AUTO_ID_LR_POWER if softmax == "sampled" else 0.0
        window = self.model.window
        if window == "auto" and self.model.mixer != "lru":
            window = self.data.max_length
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, id_table=ids, id_dropout=id_dropout, window=window),
            loss=dataclasses.replace(self.loss, softmax=softmax),
            train=dataclasses.replace(self.train, epochs=epochs, id_lr_power=id_lr_power),
        )

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
