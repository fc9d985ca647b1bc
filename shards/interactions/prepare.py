"""From raw events to histories: done once, kept in the build folder, done anew when what it is made from changes."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.files import file_sha256, json_sha256, replaced_folder
from fmrl_dist.base.locks import BeingWrittenError, only_writer
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.tables import InteractionsConfig, SplitConfig
from fmrl_dist.data.store.tables import rows_sha256
from shards.interactions.engine import open_engine
from shards.interactions.funnel import Funnel, Removal
from shards.interactions.history_file import write_histories
from shards.interactions.kept_events import KeptEvents, keep_events
from shards.tables.bad_rows import check_bad_rows
from shards.tables.events import load_events

VERSION = 4  # raise it when the same input gives other histories
HISTORIES, ITEMS, MADE_FROM = "histories.parquet", "items.parquet", "made-from.json"
UNRECORDED = {"memory_gb", "threads"}  # change nothing of the result
NOT_IN_TABLE = -1
POLL_S = 1.0
RESULT = re.compile("[0-9a-f]{16}")
KEPT_RESULTS = 3  # the others are removed
SPILL = "spill"


@dataclass(frozen=True)
class Prepared:
    """Histories that are ready to be written to a store."""

    histories: Path  # see shards.interactions.history_file
    item_ids: pa.Array  # external ids, row = internal id
    item_rows: np.ndarray  # int64 [V], rows of the item table; -1 for items that it lacks
    trained: np.ndarray  # bool [V], whether a training event names the item
    funnel: Funnel
    split_rule: str


def needs_engine(data: DataConfig) -> bool:
    """Whether a config asks for more than to read whole histories as they are."""
    return (
        data.format != "tables"
        or data.sequences.layout == "interactions"
        or data.split != SplitConfig()
        or _settings(data.interactions) != _settings(InteractionsConfig())
        or not data.items.path
        or data.items.keep == "with_events"
        or data.on_unknown_item != "stop"
    )


def prepare(
    data: DataConfig,
    folder: Path,
    downloads: Path | None,
    catalogue: pa.Array | None,
    files: Mapping[str, str],
    patient: bool = False,
    check_inputs: Callable[[], None] = lambda: None,
) -> Prepared:
    """Histories of a config, from ``folder`` if they were made from the same, else anew.

    Args:
        data: the config's section.
        folder: that keeps results, each under a name of its own: other builds may be using theirs. It is made when it
            is needed, and not left without a result.
        downloads: folder for copies of tables from URLs; None: there may be none.
        catalogue: ids of the item table, int64 or text, in its order; None if there is none.
        files: hashes of the input files, by config key.
        patient: wait for another process that is at it, rather than refuse.
        check_inputs: raises if the input files are not those of ``files`` any more; called once they were read.

    Raises:
        UserError: the tables are refused.
    """
    made_from = _made_from(data, catalogue, files)
    result = folder / json_sha256(made_from)[:16]
    while True:
        record = _read_record(result)
        if record is not None and record["made_from"] == made_from:
            prepared = _as_prepared(result, record)
            check_bad_rows(Counter(prepared.funnel.bad), prepared.funnel.rows, "of events", data.dirt.max_bad_rows)
            result.touch()
            return prepared
        try:
            with replaced_folder(result, is_kept=lambda _: False) as aside, _scratch(folder) as scratch:
                _say_what_changed(folder, made_from)
                _make(data, aside, scratch, downloads, catalogue, made_from)
                check_inputs()
        except BeingWrittenError:
            if not patient:
                raise
            time.sleep(POLL_S)
        else:
            _remove_oldest(folder)


def _made_from(data: DataConfig, catalogue: pa.Array | None, files: Mapping[str, str]) -> dict[str, Any]:
    """All that decides the result, as JSON values."""
    sequences = {key: value for key, value in asdict(data.sequences).items() if key != "path"}
    split = {key: value for key, value in asdict(data.split).items() if key not in ("valid", "test")}
    catalogue_sha256 = "" if catalogue is None else rows_sha256([pa.table({"id": catalogue})])
    raw = {
        "version": VERSION,
        "data.format": data.format,
        "data.ids": data.recorded_ids,
        **{f"data.sequences.{key}": value for key, value in sequences.items()},
        **{f"data.interactions.{key}": value for key, value in _settings(data.interactions).items()},
        **{f"data.split.{key}": value for key, value in split.items()},
        "data.on_unknown_item": data.on_unknown_item,
        "data.items.keep": data.items.keep,
        "the kind of file": [PurePath(path).suffixes[-2:] for path in _paths(data)],
        "the ids of the item table": catalogue_sha256,
        **{key: value for key, value in files.items() if key.startswith(("data.sequences.", "data.split."))},
    }
    return dict(json.loads(json.dumps(raw)))


def _paths(data: DataConfig) -> list[str]:
    given = [data.sequences.path, data.split.valid, data.split.test]
    return [path for one in given for path in ((one,) if isinstance(one, str) else one)]


def _settings(settings: InteractionsConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if key not in UNRECORDED}


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for what the engine spills, which no other process touches; what killed ones left is removed."""
    with only_writer(folder / SPILL):
        shutil.rmtree(folder / SPILL, ignore_errors=True)
        (folder / SPILL).mkdir()
        try:
            yield folder / SPILL
        finally:
            shutil.rmtree(folder / SPILL, ignore_errors=True)


def _results(folder: Path) -> list[Path]:
    """The results in a folder, those used last first."""
    found = [path for path in folder.iterdir() if RESULT.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _remove_oldest(folder: Path) -> None:
    for path in _results(folder)[KEPT_RESULTS:]:
        shutil.rmtree(path, ignore_errors=True)


def _say_what_changed(folder: Path, made_from: dict[str, Any]) -> None:
    """Compare with the result that was used last."""
    for path in _results(folder)[:1]:
        record = _read_record(path)
        if record is not None and (there := record["made_from"]) != made_from:
            changed = [key for key in sorted(there.keys() | made_from.keys()) if there.get(key) != made_from.get(key)]
            words = [f"{key} was {shown(there.get(key))}, is {shown(made_from.get(key))}" for key in changed[:3]]
            print(f"events are prepared anew: {', '.join(words)}", flush=True)


def _make(
    data: DataConfig,
    aside: Path,
    scratch: Path,
    downloads: Path | None,
    catalogue: pa.Array | None,
    made_from: dict[str, Any],
) -> None:
    """Write all files of the result into ``aside``."""
    funnel = Funnel()
    with open_engine(data.interactions, scratch) as connection:
        counts = load_events(connection, data, downloads)
        funnel.rows, funnel.bad = counts.rows, dict(counts.bad)
        if counts.time_unit not in ("none", "timestamp", "text"):
            funnel.notes.append(f"times are numbers of unit {counts.time_unit}")
        funnel.sorted_users = counts.sorted_users
        if counts.sorted_users:
            funnel.notes.append(f"{counts.sorted_users:,} users' events were out of order: sorted by time")
        if counts.joined_users:
            funnel.notes.append(f"{counts.joined_users:,} users have several rows: their lists are joined in order")
        if counts.empty_lists:
            funnel.notes.append(f"{counts.empty_lists:,} users' lists are empty: they are in no split")
        connection.execute("SET preserve_insertion_order = false")  # from here on, rows have numbers
        kept = keep_events(connection, data, catalogue, counts, funnel)
        order = _item_order(data, kept)
        new_items = np.full(len(kept.item_ids), -1, np.int64)
        new_items[order] = np.arange(len(order))
        write_histories(
            connection,
            aside / HISTORIES,
            new_items,
            counts.per_second if kept.has_times else None,
            has_periods=data.split.by != "leave_one_out",
            funnel=funnel,
        )
    rows = np.where(order < kept.num_catalogue, order, NOT_IN_TABLE)
    ids = kept.item_ids.take(pa.array(order))
    ids = ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.large_string())
    pq.write_table(pa.table({"row": rows, "id": ids, "trained": kept.trained[order]}), aside / ITEMS)
    record = {
        "made_from": made_from,
        "split_rule": kept.split_rule,
        "funnel": asdict(funnel),
        "files": {name: file_sha256(aside / name) for name in (HISTORIES, ITEMS)},
    }
    (aside / MADE_FROM).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _item_order(data: DataConfig, kept: KeptEvents) -> np.ndarray:
    """Codes of the items that make the catalogue, in the order of their internal ids.

    Items that events alone bring in stand last where they have no training event, so that nothing that happens after a
    cut moves another item.
    """
    keep, has_core = data.items.keep, data.interactions.min_item_events > 1
    by_events = keep == "with_events" or (keep == "auto" and has_core)
    codes = np.arange(len(kept.item_ids))
    is_free = by_events | (codes >= kept.num_catalogue)  # in the catalogue only by its events
    first = np.flatnonzero(~is_free | kept.trained)
    return np.concatenate((first, np.flatnonzero(is_free & kept.used & ~kept.trained)))


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What the folder's files were made from; None if they are not whole."""
    try:
        record = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
        whole = all(file_sha256(folder / name) == sha256 for name, sha256 in record["files"].items())
        return dict(record) if whole and {HISTORIES, ITEMS} == set(record["files"]) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _as_prepared(folder: Path, record: dict[str, Any]) -> Prepared:
    raw = record["funnel"]
    funnel = Funnel(**{**raw, "steps": [Removal(**step) for step in raw["steps"]]})
    items = pq.read_table(folder / ITEMS)
    return Prepared(
        histories=folder / HISTORIES,
        item_ids=items["id"].combine_chunks(),
        item_rows=items["row"].to_numpy(),
        trained=items["trained"].to_numpy(),
        funnel=funnel,
        split_rule=record["split_rule"],
    )
