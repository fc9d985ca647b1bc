"""What the stages find: records appended to a JSON-lines file, and the same as Markdown tables."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


def write_record(path: Path, stage: str, fields: Mapping[str, Any]) -> None:
    """Append one line, whole or not at all."""
    with path.open("a") as file:
        file.write(json.dumps({"stage": stage, **fields}) + "\n")


def read_records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe_gpu(on_gpu: bool) -> dict[str, str]:
    """Name, memory, driver and versions of what runs the kernels."""
    versions = {"cuda": str(torch.version.cuda), "triton": _triton_version()}
    if not on_gpu:
        return {"gpu": "none: a dry run on the CPU, whose figures say nothing"} | versions
    properties = torch.cuda.get_device_properties(0)
    gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown ({error})"
    return {"gpu": gpu, "driver": driver} | versions


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def render(records: Sequence[Record], titles: Mapping[str, str]) -> str:
    """The setting, then a section for each stage, with a table for each kind of record in it."""
    by_stage: dict[str, list[Record]] = {name: [] for name in ("setting", "stage", *titles)}
    for record in records:
        by_stage[record["stage"]].append({k: v for k, v in record.items() if k != "stage"})
    outcomes = {record["name"]: record["outcome"] for record in by_stage["stage"]}
    parts = ["# Measurements on a GPU", _table(by_stage["setting"])]
    for name, title in titles.items():
        if name in outcomes:
            parts.append(f"## {title}\n\n`python -m benchmarks.gpu --stages {name}`: {outcomes[name]}")
            by_fields: dict[tuple[str, ...], list[Record]] = {}
            for record in by_stage[name]:
                by_fields.setdefault(tuple(record), []).append(record)
            parts += map(_table, by_fields.values())
    parts += ["## Stages", _table(by_stage["stage"])]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Record]) -> str:
    if not rows:
        return "Nothing was recorded."
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row.values()))} |" for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
