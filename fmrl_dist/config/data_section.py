"""Sections of the configuration: raw data, and the store that is built from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fmrl_dist.base.errors import require
from fmrl_dist.base.urls import hide_credentials, is_url
from fmrl_dist.config.features import FeatureConfig, PqFeature
from fmrl_dist.config.parsing import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    changed_keys,
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
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024  # of a path; less than any file system allows, with room for our own names


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
        self._check_format()
        self._check_event_columns()
        self._check_unknown_items()
        self._check_cap()
        reserved = ", ".join(sorted(RESERVED_NAMES))
        for name, feature in self.features.items():
            require(
                FEATURE_NAME.fullmatch(name) is not None and name not in RESERVED_NAMES,
                f"feature name {name!r} is not allowed: expected [a-z][a-z0-9_]*, none of {reserved}",
            )
            check_fields(feature, f"data.features.{name}")
            feature.check(f"data.features.{name}")
            self._check_feature_path(name, feature)
            if isinstance(feature, PqFeature):
                self._check_quantised(name, feature)

    def _check_feature_path(self, name: str, feature: FeatureConfig) -> None:
        """Tables of events and items may be URLs, which are copied; a feature's file may not."""
        path = getattr(feature, "path", "")
        at_url = is_url(path) or (bool(path) and is_url(self.root) and not Path(path).is_absolute())
        where = f"data.features.{name}.path" if is_url(path) else "data.root"
        shown = hide_credentials(path if is_url(path) else self.root)
        require(
            not at_url,
            f"{where} is {shown}, a URL, and the file of a feature is read from a folder; copy it there, and name it "
            f"in data.features.{name}.path",
        )

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

    def _check_format(self) -> None:
        """A published data set says itself what its columns are."""
        if self.format == "tables":
            return
        changed = [f"data.sequences.{key}" for key in changed_keys(self.sequences) if key != "path"]
        changed += [f"data.items.{key}" for key in changed_keys(self.items) if key not in ("path", "keep")]
        changed += ["data.interactions.events"] * bool(self.interactions.events)
        require(
            not changed,
            f"{', '.join(changed)} is set, but data.format is {self.format}, from which columns and kinds of events "
            "follow; leave the key out, or set data.format: tables",
        )
        require(
            self.split.by != "given" or bool(self.split.valid),
            f"data.split.by is given, but events of data.format {self.format} have no column of it; name tables with "
            "data.split.valid and test, or split otherwise",
        )

    def _check_event_columns(self) -> None:
        """A filter or split of events needs the column that it is about."""
        if self.format != "tables":
            return
        columns, by_column = self.sequences, self.split.by == "given" and not self.split.valid
        for key, is_set, column, name in (
            ("data.interactions.min_rating", self.interactions.min_rating is not None, columns.rating, "rating"),
            ("data.interactions.events", bool(self.interactions.events), columns.event, "event"),
            ("data.interactions.duplicates: event", self.interactions.duplicates == "event", columns.times, "times"),
            ("data.split.by: time", self.split.by == "time", columns.times, "times"),
            ("data.split.by: given", by_column, columns.split, "split"),
        ):
            require(
                not is_set or bool(column),
                f"{key} is set, but data.sequences.{name} names no column; name it, or leave {key} out",
            )
        require(
            by_column or not columns.split,
            f"data.sequences.split names column {columns.split!r}, but data.split.by is {self.split.by}"
            f"{', with tables of its own' if self.split.valid else ''}; set data.split.by: given, without tables, or "
            "leave the column out",
        )

    def _check_cap(self) -> None:
        require(
            self.interactions.max_events != 2 or self.split.by != "leave_one_out",
            "data.interactions.max_events is 2, and data.split.by leave_one_out holds out two events of a user: there "
            "would be nothing to predict them from; expected 0 for all, or at least 3",
        )

    def _check_unknown_items(self) -> None:
        require(
            bool(self.items.path) or self.on_unknown_item != "drop",
            "data.on_unknown_item is drop, but data.items.path is empty: without a table of items none is unknown; "
            "name it, or leave data.on_unknown_item out",
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
