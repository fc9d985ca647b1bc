"""What the raw tables are, and what becomes of their events before they are a store: parts of section ``data``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fmrl_dist.base.errors import require
from fmrl_dist.config.parsing import Fraction, Limits, NonNegativeInt, changed_keys, check_fields

# A file, a folder of parts, a pattern with * or ?, a URL, or a list of these.
TablePath = str | tuple[str, ...]
DataFormat = Literal["tables", "amazon2014", "amazon2018", "amazon2023", "movielens"]
TimeUnit = Literal["auto", "s", "ms", "us", "ns"]


@dataclass(frozen=True)
class IdKinds:
    """What the ids of items and those of users are, where they are not the same."""

    items: Literal["text", "integer"] = "text"  # like data.ids, of items alone
    users: Literal["text", "integer"] = "text"  # like data.ids, of users alone

    def __post_init__(self) -> None:
        check_fields(self, "data.ids")


@dataclass(frozen=True)
class CsvConfig:
    """How the CSV or TSV files of a table are written. Parquet and JSON Lines need none of it."""

    delimiter: str = ""  # what parts the columns, one character or several; "": a comma, in .tsv files a tab
    quote: str = '"'  # character around texts that hold a delimiter; "" for none
    encoding: str = "utf-8"  # a name that Python knows, such as latin-1, cp1252 or utf-16
    header: bool = True  # whether the first line of each file has the names of the columns
    names: tuple[str, ...] = ()  # names of the columns in their order, where there is no header

    def __post_init__(self) -> None:
        check_fields(self, "csv")
        require(self.header != bool(self.names), "csv.names goes with csv.header: false; set both, or neither")
        require(len(self.quote) <= 1, f"csv.quote is {self.quote!r}; expected one character, or none")


@dataclass(frozen=True)
class SequenceTableConfig:
    """The histories: a table of whole sequences, or of single interactions."""

    # file, folder of parts, pattern (*, ?) or URL, or a list of these: Parquet, CSV, TSV or JSON Lines, each also .gz
    # or .zst; relative to data.root
    path: TablePath = "sequences.parquet"
    # sequences: one row per user with a list of items, oldest first | interactions: one row per event
    layout: Literal["sequences", "interactions"] = "sequences"
    user: str = "user_id"  # column of user ids; a.b is field b of column a, here and below
    items: str = "item_ids"  # column of item ids: lists of them, or single ones for interactions
    times: str = ""  # column of times, "" for none: numbers, ISO dates or timestamps
    time_unit: TimeUnit = "auto"  # of times that are numbers; auto: from their size, and said
    rating: str = ""  # column of ratings, "" for none; data.interactions.min_rating needs it
    event: str = ""  # column of what kind each event is, "" for none; data.interactions.events needs it
    split: str = ""  # column of train, valid or test, "" for none; data.split.by: given needs it, or paths
    csv: CsvConfig = field(default_factory=CsvConfig)

    def __post_init__(self) -> None:
        check_fields(self, "data.sequences")
        require(
            self.layout == "interactions" or not (self.rating or self.event or self.split),
            "data.sequences.rating, event and split are columns of single events; set layout: interactions",
        )
        require(
            self.time_unit == "auto" or bool(self.times),
            f"data.sequences.time_unit is {self.time_unit}, but data.sequences.times names no column; name it, or "
            "leave time_unit out",
        )


@dataclass(frozen=True)
class ItemTableConfig:
    """The catalogue: one row per item. The row of an item, among those that are kept, is its internal id."""

    path: TablePath = "items.parquet"  # like data.sequences.path; "": no table, the items are those of the events
    id: str = "item_id"  # column of item ids
    title: str = ""  # column of titles, "" for none; kept in the vocabulary for reading recommendations
    csv: CsvConfig = field(default_factory=CsvConfig)
    # which items of the table: all | with_events: those that a kept event names | auto: those, under a k-core of items,
    # else all
    keep: Literal["auto", "all", "with_events"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "data.items")
        if not self.path:
            without_use = [key for key in changed_keys(self) if key not in ("path", "title")]  # titles: see raw_items
            require(
                not without_use,
                f"data.items.{', '.join(without_use)} is set, but data.items.path is empty: there is no table; name "
                "it, or leave the key out",
            )


@dataclass(frozen=True)
class InteractionsConfig:
    """Which events are kept, in this order of steps, and in which order those of one time stand."""

    min_rating: float | None = None  # events with a lower rating, or none, are left out; null: none is
    events: tuple[str, ...] = ()  # kinds of events to keep; []: all
    # none: keep all | event: one of those that are equal in user, item and time | first, last: of each user and item,
    # the earliest or the latest event
    duplicates: Literal["none", "event", "first", "last"] = "none"
    # k-core: users with fewer events and items with fewer events are left out, again and again until none is left; the
    # paper has 5 and 5
    min_user_events: NonNegativeInt = 0
    min_item_events: NonNegativeInt = 0  # see min_user_events
    # order of a user's events of one time: hash: by a hash of their ids, so that neither the files' order nor that of
    # the ids can be learnt | table: as they stand in the files
    ties: Literal["hash", "table"] = "hash"
    # latest events of a user that are kept, 0: all; leave_one_out counts those that it holds out, and needs at least 3;
    # other splits count those that train, and need at least 2
    max_events: NonNegativeInt = 0
    # 10^9 bytes that sorting and grouping may take; the rest goes to the build folder
    memory_gb: Annotated[float, Limits(0.05, 1e6)] = 2.0
    # of the engine; auto: as many as there are cores
    threads: Annotated[int, Limits(1, 1024)] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "data.interactions")
        require(self.max_events != 1, "data.interactions.max_events is 1; expected 0 for all, or at least 2")


SPLIT_KEYS = {  # the ways to split that read a key
    **dict.fromkeys(("valid_from", "test_from", "valid_quantile", "test_quantile"), ("time",)),
    **dict.fromkeys(("valid", "test"), ("given",)),
    "target": ("time", "given"),
}


@dataclass(frozen=True)
class SplitConfig:
    """What trains, and what is held out."""

    # leave_one_out: each user's last event is for the test, the one before it for validation | time: what happens from
    # a time on is held out, for all users alike | given: column data.sequences.split, or valid and test below
    by: Literal["leave_one_out", "time", "given"] = "leave_one_out"
    # time: first moment of validation, a date, an ISO time or a number as in the table
    valid_from: str | int | float = ""
    test_from: str | int | float = ""  # time: first moment of the test
    # time: shares of the events that lie before these two moments, where they are not given
    valid_quantile: Annotated[float, Limits(0, 1, without_low=True, without_high=True)] = 0.8
    test_quantile: Annotated[float, Limits(0, 1, without_low=True, without_high=True)] = 0.9  # see valid_quantile
    valid: TablePath = ""  # given: events for validation, like data.sequences.path, which has those for training
    test: TablePath = ""  # given: events for the test
    target: Literal["first", "last"] = "first"  # time, given: which of a user's held-out events is to be predicted

    def __post_init__(self) -> None:
        check_fields(self, "data.split")
        self._check_use()
        if self.by == "time":
            require(
                (self.valid_from == "") == (self.test_from == ""),
                "data.split has one of valid_from and test_from; expected both, or neither (then quantiles)",
            )
            require(
                self.valid_quantile < self.test_quantile,
                f"data.split.valid_quantile is {self.valid_quantile}, test_quantile {self.test_quantile}; expected the "
                "first to be smaller",
            )
        require(bool(self.valid) == bool(self.test), "data.split has one of valid and test; expected both, or neither")

    def _check_use(self) -> None:
        """Refuse keys that this way to split does not read."""
        changed = changed_keys(self)
        for key, ways in SPLIT_KEYS.items():
            require(
                key not in changed or self.by in ways,
                f"data.split.{key} needs data.split.by: {' or '.join(ways)}, which is {self.by}; set it, or leave "
                f"{key} out",
            )
        shares = [key for key in changed if key.endswith("_quantile")]
        require(
            not shares or self.valid_from == "",
            f"data.split.{', '.join(shares)} is for a split without valid_from and test_from; leave one of both out",
        )


@dataclass(frozen=True)
class DirtConfig:
    """What happens to rows that cannot be used. All are counted by their cause in ``build-report.json``."""

    max_bad_rows: Fraction = 0.01  # largest share of a table's rows that may be unreadable; with more the build stops
    max_bad_images: Fraction = 0.5  # largest share of the images that may be unreadable; with more the build stops
