"""One YAML file drives build, train and evaluate; this file says what may stand in it.

Every section is a frozen dataclass. An unknown key, a wrong type or an impossible combination is a
:class:`~fmrl_dist.errors.UserError` at construction, with the mend in its message. Any key can be overridden on the
command line as ``--section.key value`` (the value is read as YAML).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist import __version__
from fmrl_dist.errors import UserError

DEMO_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
FEATURE_NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED_NAMES = {"ids", "users", "starts", "items", "times", "targets", "mask", "count", "block_items"}
MIN_CHUNK_WIDTH = 4


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {value!r}; expected one of: {', '.join(choices)}")


@dataclass(frozen=True)
class DemoConfig:
    """Size and seed of the generated demo data (``shards.demo``)."""

    users: int = 3000
    items: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class SequenceTable:
    """The histories: a table of whole sequences, or of single interactions (Parquet or CSV)."""

    path: str = "sequences.parquet"
    layout: str = "sequences"  # sequences: one row a user, items a list | interactions: one row an event
    user: str = "user_id"
    items: str = "item_ids"
    times: str = ""  # optional column; interactions are ordered by it, ties keep the table's order

    def __post_init__(self) -> None:
        require_choice("data.sequences.layout", self.layout, ("sequences", "interactions"))


@dataclass(frozen=True)
class ItemTable:
    """The catalogue: one row an item; row = internal id."""

    path: str = "items.parquet"
    id: str = "item_id"
    title: str = ""  # optional column, kept in the vocabulary for reading recommendations


@dataclass(frozen=True)
class FeatureConfig:
    """One frozen item feature and where it comes from."""

    source: str = "npy"  # npy: a precomputed [V, dim] array | tfidf: TF-IDF + SVD of the item text | pixels: a descriptor
    path: str = ""  # npy: the array | pixels: a table of item id and image bytes
    dim: int = 0  # npy: 0 takes the file's, another is checked | tfidf: the SVD's rank | pixels: fixed by the descriptor
    id: str = "item_id"  # pixels: column of the item id
    image: str = "image"  # pixels: column of the encoded image bytes
    text: tuple[str, ...] = ()  # tfidf: parts of the item text; () takes data.text

    def __post_init__(self) -> None:
        require_choice("data.features.*.source", self.source, ("npy", "tfidf", "pixels"))
        require(self.source == "tfidf" or bool(self.path), f"a feature of source {self.source!r} needs a path")
        require(self.source != "tfidf" or self.dim > 0, "a feature of source 'tfidf' needs dim, the rank of its SVD")


@dataclass(frozen=True)
class DataConfig:
    """Raw tables, and how a history is read from the store."""

    root: str = "data"
    demo: DemoConfig | None = None  # set: the raw tables are generated into data.root when they are missing
    sequences: SequenceTable = field(default_factory=SequenceTable)
    items: ItemTable = field(default_factory=ItemTable)
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    text: tuple[str, ...] = ("Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}")
    text_separator: str = "\n"
    max_length: int = 50  # targets of a training window, events of an evaluation history
    windows: str = "last"  # last: one window a user | all: windows that partition the user's targets

    def __post_init__(self) -> None:
        require_choice("data.windows", self.windows, ("last", "all"))
        require(self.max_length >= 1, f"data.max_length is {self.max_length}; expected at least 1")
        for name in self.features:
            require(
                FEATURE_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES,
                f"feature name {name!r} is not allowed: expected [a-z][a-z0-9_]*, none of {', '.join(sorted(RESERVED_NAMES))}",
            )


@dataclass(frozen=True)
class StoreConfig:
    """The shard store that ``shards.build`` writes and everything else reads."""

    path: str = ""  # default: stores/<config name>
    users_per_block: int = 256
    items_per_block: int = 1024
    blocks_per_shard: int = 16

    def __post_init__(self) -> None:
        for key in ("users_per_block", "items_per_block", "blocks_per_shard"):
            require(getattr(self, key) >= 1, f"store.{key} is {getattr(self, key)}; expected at least 1")


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
    feature_scale: str | float = "none"  # none | a number: features times it | standardize: mean 0, unit mean variance

    def __post_init__(self) -> None:
        check_sizes(self.sizes, self.width)
        require(self.depth >= 1, f"model.depth is {self.depth}; expected at least 1")
        for key in ("dropout", "lru_dropout"):
            require(0 <= getattr(self, key) < 1, f"model.{key} is {getattr(self, key)}; expected 0 <= rate < 1")
        require(0 <= self.r_min < self.r_max <= 1, f"model.r_min, r_max are {self.r_min}, {self.r_max}; expected 0 <= r_min < r_max <= 1")
        if isinstance(self.feature_scale, str):
            require_choice("model.feature_scale", self.feature_scale, ("none", "standardize"))
        require(self.features != () or self.id_table, "model.features is empty and model.id_table is off: items have nothing to be told apart by; turn one on")


def check_sizes(sizes: tuple[int, ...], width: int) -> None:
    """Refuse sizes that do not nest: increasing, chunks of at least 4 channels, the last one the width."""
    require(len(sizes) > 0, "model.sizes is empty; expected at least one size")
    chunks = [high - low for low, high in zip((0, *sizes), sizes, strict=False)]
    require(all(c > 0 for c in chunks), f"model.sizes {list(sizes)} do not increase; write them from small to large")
    require(
        all(c >= MIN_CHUNK_WIDTH for c in chunks),
        f"model.sizes {list(sizes)} have a chunk of {min(chunks)} channels; a layer-norm needs at least {MIN_CHUNK_WIDTH} between sizes",
    )
    require(sizes[-1] == width, f"the last of model.sizes is {sizes[-1]} but model.width is {width}; make them equal")


@dataclass(frozen=True)
class LossConfig:
    """Nested cross-entropy (paper eq. 14)."""

    impl: str = "tiled"
    predict_first: bool = True  # a start position predicts the first item of a whole history

    def __post_init__(self) -> None:
        require_choice("loss.impl", self.impl, ("tiled", "plain"))


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation (paper section 5.3)."""

    epochs: int = 500
    max_steps: int = 0  # 0: no limit but the epochs
    schedule_epochs: int = 0  # length of the cosine; 0: train.epochs
    batch_size: int = 32  # histories, over all ranks
    lanes: int = 0  # 0: the largest divisor of batch_size up to 16
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
    patience: int = 10  # evaluations without gain before stopping; 0: never
    log_every_steps: int = 10
    checkpoint_every_steps: int = 0  # 0: at every evaluation

    def __post_init__(self) -> None:
        require_choice("train.precision", self.precision, ("fp32", "bf16"))
        require(self.batch_size >= 1, f"train.batch_size is {self.batch_size}; expected at least 1")
        require(self.lanes >= 0, f"train.lanes is {self.lanes}; expected 0 (automatic) or a divisor of the batch size")
        require(
            self.lanes == 0 or self.batch_size % self.lanes == 0,
            f"train.lanes is {self.lanes}, which does not divide train.batch_size {self.batch_size}",
        )
        require(self.epochs >= 1, f"train.epochs is {self.epochs}; expected at least 1")
        require(self.lr > 0, f"train.lr is {self.lr}; expected more than 0")
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
    block_users: int = 256  # users ranked together; fixed, so figures do not depend on the ranks
    tile_items: int = 4096  # items scored together; fixed likewise

    def __post_init__(self) -> None:
        require_choice("eval.metric", self.metric, ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10"))


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

    def to_dict(self) -> dict[str, Any]:
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def load_config(path: Path | None, overrides: list[str] = []) -> Config:  # noqa: B006 - never mutated
    """Read a YAML file (``None``: the demo) and apply ``--section.key value`` overrides.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is impossible.
    """
    path = path or DEMO_CONFIG
    require(path.is_file(), f"config {path} does not exist; expected a YAML file such as configs/demo.yaml")
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    require(isinstance(raw, dict), f"config {path} holds {type(raw).__name__}; expected a mapping of sections")
    _apply_overrides(raw, overrides)
    name = path.stem if path.name != "config.yaml" else path.resolve().parent.name
    _set_default(raw, "store", "path", f"stores/{name}")
    _set_default(raw, "run", "dir", f"runs/{name}")
    return typing.cast(Config, _build(Config, raw, ""))


def _set_default(raw: dict[str, Any], section: str, key: str, value: str) -> None:
    values = raw.setdefault(section, {})
    if isinstance(values, dict) and not values.get(key):
        values[key] = value


def _apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])]
    require(len(words) % 2 == 0, f"override {words[-1] if words else ''!r} has no value; write --section.key value")
    for flag, text in zip(words[::2], words[1::2], strict=True):
        require(flag.startswith("--") and "." in flag, f"argument {flag!r} is not known; overrides are written --section.key value")
        node = raw
        *parents, key = flag[2:].split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            require(isinstance(node, dict), f"override {flag}: {parent!r} holds a value, not a section")
        try:
            node[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override {flag}: {text!r} is not a YAML value") from None


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn plain YAML ``value`` into type ``kind``; ``where`` names the key for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} is {value!r}; expected a list")
        return tuple(_build(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), f"{where} is {value!r}; expected a mapping")
        return {str(k): _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    matches = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    require(matches, f"{where} is {value!r}; expected {kind.__name__}")
    return value


def _build_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    *earlier, last = sorted((k for k in kinds if k is not type(None)), key=lambda k: k is str)  # a number before a name
    for kind in earlier:
        try:
            return _build(kind, value, where)
        except UserError:
            continue
    return _build(last, value, where)


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    value = {} if value is None else value
    require(isinstance(value, dict), f"{where or 'the config'} is {value!r}; expected a mapping")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown config key {_join(where, key)!r}; {hint}")
    return kind(**{key: _build(hints[key], v, _join(where, key)) for key, v in value.items()})


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def command_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The parser that every config-driven command starts from: ``--config``, ``--print-config``, ``--help``, ``--version``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        epilog="Any key of the config is overridden with --section.key value, e.g. --train.epochs 3.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file (default: the demo)")
    parser.add_argument("--print-config", action="store_true", help="print the config in force and end")
    parser.add_argument("--version", action="version", version=f"fmrl-dist {__version__}")
    return parser


def parse_command(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Parse a command line whose unknown words are overrides; ``--print-config`` prints and ends the process."""
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return arguments, config
