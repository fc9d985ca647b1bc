"""A record per finished row in ``benchmarks/results/paper``: its figures, and what they were measured with.

The page is made of records, so a row that another machine trained is in it, and one whose configuration has changed
since, be it by a default, is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import describe_setting, processor_name
from benchmarks.paper.rows import Places, Row
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import write_atomically

KEPT = ("sizes", "baselines")  # of an evaluation, among all items and with seen items masked
Records = dict[Row, dict[str, Any]]


def keep_record(row: Row, places: Places, threads: int, folder: Path) -> None:
    """Record a row whose run is finished, unless that was done; without a finished run nothing happens."""
    evaluation = places.evaluation(row)
    if evaluation is None or _read(row, places, folder) is not None:
        return
    figures = {key: evaluation[key] for key in KEPT}
    figures["masked"] = {key: evaluation["masked"][key] for key in KEPT}
    record = {
        "row": row.name,
        "setting": describe_setting() | {"hardware": f"{processor_name()}, {threads} thread(s) each"},
        "meaning": places.meaning(row),
        "evaluation": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_path(row, folder), json.dumps(record, indent=1).encode() + b"\n")


def read_records(rows: Iterable[Row], places: Places, folder: Path) -> Records:
    """Records of the rows as they are now, in the rows' order; a line on standard error for each row without one."""
    records = {}
    for row in rows:
        record = _read(row, places, folder)
        if record is None:
            why = "its configuration has changed since" if _path(row, folder).exists() else "it is not finished"
            print(f"{row.name}: not in the table, for {why}", file=sys.stderr)
        else:
            records[row] = record
    return records


def _read(row: Row, places: Places, folder: Path) -> dict[str, Any] | None:
    """The row's record, if it is of the row as it is now."""
    path = _path(row, folder)
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record if places.is_meaning(record["meaning"], row) else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a row; delete it, and run the row again") from error


def _path(row: Row, folder: Path) -> Path:
    return folder / f"{row.name}.json"
