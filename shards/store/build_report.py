"""What a build found in its input: rows, events, items and images that could not be used, counted by their cause.

The steps of a build add to a :class:`BuildReport`; at the end it is ``build-report.json`` in the store's folder. It is
no part of the store's identity, and a store without it is whole. The same input gives the same report, but for
``written`` and ``seconds``. :mod:`shards.store.report_text` words it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.json_text import parse_object
from fmrl_dist.config.parsing import NonNegativeFloat, NonNegativeInt, build
from fmrl_dist.data.store.reader import Store
from shards.encoders.item_feature import ItemFeature

REPORT_VERSION = 1
BUILD_REPORT_FILE = "build-report.json"
SECONDS_DIGITS = 3


@dataclass
class TableCounts:
    """Rows of a raw table."""

    rows: NonNegativeInt = 0  # that were read, bad ones included
    bad: dict[str, NonNegativeInt] = field(default_factory=dict)  # rows that could not be used, by cause


@dataclass
class FunnelStep:
    """A step on the way from the events of the raw tables to those of the store; what it does not count is None."""

    step: str = ""  # in words
    # remain: that many do after it | removed: it took that many away | noted: of those that remain, that many are so
    effect: Literal["remain", "removed", "noted"] = "remain"
    users: NonNegativeInt | None = None
    items: NonNegativeInt | None = None
    events: NonNegativeInt | None = None


@dataclass
class CatalogueCounts:
    """Items of the store, and what they lack."""

    items: NonNegativeInt = 0
    untitled: NonNegativeInt | None = None  # None where titles are not kept
    # by column that a text is made of: items whose cell is null, NaN, blank or an empty list
    without: dict[str, NonNegativeInt] = field(default_factory=dict)


@dataclass
class UsedImages:
    """Images of one feature."""

    given: NonNegativeInt = 0  # of known items, not empty
    bad: dict[str, NonNegativeInt] = field(default_factory=dict)  # by cause (shards.images.causes)
    empty: NonNegativeInt = 0  # cells without an image
    unknown_items: NonNegativeInt = 0  # rows of items that are not in the item table


@dataclass
class UsedTexts:
    """Texts of one feature whose encoder reads ``max_tokens`` of each, special ones included."""

    given: NonNegativeInt = 0  # items that have one
    cut: NonNegativeInt = 0  # items whose text is longer: its end plays no part
    max_tokens: NonNegativeInt = 0


@dataclass
class FeatureCounts:
    """A feature of the items."""

    present: NonNegativeInt = 0  # items that have it
    absent: NonNegativeInt = 0
    images: UsedImages | None = None  # of a feature that is made of images
    texts: UsedTexts | None = None  # of a feature that a transformer makes of texts


@dataclass
class BuildReport:
    """What one build read, left out and noted."""

    schema_version: int = REPORT_VERSION
    written: str = ""  # UTC, ISO 8601
    config: str = ""  # name of the config's file
    tables: dict[str, TableCounts] = field(default_factory=dict)  # by config key
    funnel: tuple[FunnelStep, ...] = ()  # in order
    catalogue: CatalogueCounts = field(default_factory=CatalogueCounts)
    features: dict[str, FeatureCounts] = field(default_factory=dict)
    seconds: dict[str, NonNegativeFloat] = field(default_factory=dict)  # by step of the build
    made_with: dict[str, str] = field(default_factory=dict)  # versions, and devices of encoders

    def add_step(
        self,
        step: str,
        effect: Literal["remain", "removed", "noted"],
        users: int | None = None,
        items: int | None = None,
        events: int | None = None,
    ) -> None:
        """Append a step of the funnel."""
        self.funnel += (FunnelStep(step, effect, users, items, events),)

    def add_items(self, table: pa.Table, id_column: str, title: str) -> None:
        """Count what the item table lacks: titles, and cells of the columns that texts are made of.

        Args:
            table: with these columns.
            id_column: of item ids.
            title: column of titles, "" for none.
        """
        self.tables["data.items"] = TableCounts(table.num_rows)
        texts = [name for name in table.column_names if name not in (id_column, title)]
        self.catalogue = CatalogueCounts(
            table.num_rows,
            num_lacking(table[title]) if title else None,
            {name: num_lacking(table[name]) for name in texts},
        )

    def add_feature(self, feature: ItemFeature) -> None:
        """Count a feature that was made."""
        present = feature.manifest_entry.present
        counts = FeatureCounts(present, len(feature.present) - present)
        if (images := feature.images) is not None:
            counts.images = UsedImages(images.num_given, dict(images.bad), images.num_empty, images.num_unknown)
        if (texts := feature.texts) is not None:
            counts.texts = UsedTexts(texts.num_given, texts.num_cut, texts.max_tokens)
        self.features[feature.name] = counts

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that the block takes to that of ``step``."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self.seconds[step] = round(self.seconds.get(step, 0.0) + took, SECONDS_DIGITS)

    def write(self, folder: Path) -> None:
        """Write ``build-report.json`` with the time of now into a store's folder."""
        self.written = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        write_atomically(folder / BUILD_REPORT_FILE, text.encode() + b"\n")

    @classmethod
    def from_bytes(cls, data: bytes) -> BuildReport:
        """Parse and check a report.

        Raises:
            UserError: it is not JSON, of another version, or not what :meth:`write` writes.
        """
        mend = "build the store again, or remove the file: the store is whole without it"
        raw = parse_object(data, BUILD_REPORT_FILE, mend)
        version = raw.get("schema_version")
        require(
            type(version) is int and version == REPORT_VERSION,
            f"{BUILD_REPORT_FILE} is of version {str(version)[:60]!r}, expected {REPORT_VERSION}: {mend}",
        )
        lacking = sorted({one.name for one in fields(cls)} - raw.keys())
        require(not lacking, f"{BUILD_REPORT_FILE} lacks {', '.join(lacking)}; {mend}")
        try:
            report: BuildReport = build(cls, raw, "")
        except UserError as error:
            raise UserError(f"{BUILD_REPORT_FILE} is not as it was written ({error}); {mend}") from None
        return report


def read_report(store: Store) -> BuildReport | None:
    """The report of a store; None where there is none, as in a store of an older version.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    try:
        return store.files.read(BUILD_REPORT_FILE, BuildReport.from_bytes)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"store {store.location}: {error}") from None


def num_lacking(column: pa.ChunkedArray) -> int:
    """How many cells of a column hold nothing: null, NaN, blank text, or an empty list."""
    kind = column.type
    found = pc.is_null(column, nan_is_null=True)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        found = pc.or_kleene(found, pc.equal(pc.utf8_trim_whitespace(column), ""))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        found = pc.or_kleene(found, pc.equal(pc.list_value_length(column), 0))
    return pc.sum(found).as_py() or 0
