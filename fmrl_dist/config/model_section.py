"""Sections of the configuration: the model, and the loss that it learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from fmrl_dist.base.errors import require
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import MAX_CODES
from fmrl_dist.config.parsing import (
    Fraction,
    Limits,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)

MIN_CHUNK_WIDTH = 4
MAX_SIZES = 64  # far more than anyone deploys
SPARSE_DROPOUT, SPARSE_TARGETS = 0.5, 30  # rate where an item is at most so many targets of an epoch on average
DENSE_DROPOUT, DENSE_TARGETS = 0.2, 300  # and where it is at least so many


@dataclass(frozen=True)
class ModelConfig:
    """fMRLRec (paper section 3), with what makes it better: norms at both ends, ids, a longer memory."""

    sizes: tuple[int, ...] = (8, 16, 32, 64, 128)  # Matryoshka sizes, increasing by at least 4; the last is the width
    depth: Annotated[int, Limits(1, 1000)] = 2  # number of blocks
    # rate on the input embeddings and in the feed-forward network, of the last channels; auto: 0.5 if an item has up to
    # 30 targets in an epoch on average, 0.2 from 300 on, and between them along their logarithm
    dropout: Fraction | Literal["auto"] = "auto"
    # what lets the events of a history see each other: lru: the paper's linear recurrence | attention: causal, as
    # SASRec's | filter: FMLP-Rec's learned filter, causal | circular: the same as published, over all of a window |
    # bsarec: causal attention beside a rescaling of high frequencies | bidirectional: attention to all of a history,
    # trained to fill in masked items, as BERT4Rec
    mixer: Literal["lru", "attention", "filter", "circular", "bsarec", "bidirectional"] = "lru"
    lru_dropout: Fraction | Literal["auto"] = "auto"  # rate after the mixer, of the last channels; auto: likewise
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
    def dropout_rates(self) -> dict[str, float]:
        """``dropout`` and ``lru_dropout``, likewise."""
        assert not isinstance(self.dropout, str) and not isinstance(self.lru_dropout, str), "resolved"
        return {"dropout": self.dropout, "lru_dropout": self.lru_dropout}

    @property
    def num_window_events(self) -> int:
        """Events that the mixer reads, likewise; 1 for the LRU, which has no limit."""
        assert self.mixer == "lru" or isinstance(self.window, int), "resolved"
        return 1 if isinstance(self.window, str) else self.window

    @property
    def width(self) -> int:
        """D, the largest size."""
        return self.sizes[-1]


def auto_dropout(targets_per_item: float) -> float:
    """What ``dropout: auto`` is, to two decimals: less where items are seen so often that there is less to overfit."""
    targets = min(max(targets_per_item, SPARSE_TARGETS), DENSE_TARGETS)
    density = math.log(targets / SPARSE_TARGETS) / math.log(DENSE_TARGETS / SPARSE_TARGETS)
    return round(SPARSE_DROPOUT + (DENSE_DROPOUT - SPARSE_DROPOUT) * density, 2)


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
    # score by cosines of each size's prefixes; needs temperatures, and distillation 0
    normalize: bool = False
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
            weights is None or weights[-1] > 0 or self.alphas(len(weights)) is None,
            f"loss.size_weights is {list(weights or ())}: the largest size, which teaches the others "
            f"(loss.distillation {shown(self.distillation)}), would learn nothing; give it a weight, or set "
            "loss.distillation to 0",
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
