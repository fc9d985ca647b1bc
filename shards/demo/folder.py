"""The folder of the demo's raw tables: written whole, and kept if it was generated with the same arguments."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.locks import only_writer
from shards.demo.catalogue import make_attributes
from shards.demo.histories import MIN_EVENTS, make_histories, sequence_table
from shards.demo.item_images import image_table
from shards.demo.item_texts import item_table

FILES = ("sequences.parquet", "items.parquet", "images.parquet")
ORIGIN_KEY = b"fmrl_dist_demo"  # Parquet metadata: the arguments that the tables were generated with


def write_demo(root: Path, users: int, items: int, seed: int) -> None:
    """Write ``root/demo/{sequences,items,images}.parquet``, all or nothing; the same arguments give the same bytes.

    A folder that already holds exactly this demo data is left as it is.

    Raises:
        UserError: a number is out of range, ``root/demo`` holds something else, or another process writes it.
    """
    for name, value, least in (("users", users, 1), ("items", items, 2 * MIN_EVENTS), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"the demo's {name} is {value}; expected at least {least}")
    folder = root / "demo"
    origin = {"users": users, "items": items, "seed": seed}
    if folder.exists():
        _check_same(folder, FILES, origin)
        return
    try:
        with only_writer(folder):
            if folder.exists():  # another process has written it since
                _check_same(folder, FILES, origin)
            else:
                _write_folder(folder, _tables(users, items, seed), origin)
    except OSError as error:
        raise UserError(f"the demo data cannot be written to {folder}: {error}; choose another data.root") from None


def _tables(users: int, items: int, seed: int) -> dict[str, pa.Table]:
    attributes = make_attributes(items, seed)
    ids = [f"item-{row:06d}" for row in range(items)]
    tables = (
        sequence_table(make_histories(attributes, users, seed), ids),
        item_table(attributes, ids, seed),
        image_table(attributes, ids, seed),
    )
    return dict(zip(FILES, tables, strict=True))


def _write_folder(folder: Path, tables: dict[str, pa.Table], origin: dict[str, int]) -> None:
    """Write the tables beside ``folder``, then rename: it appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    aside.mkdir()
    try:
        for name, table in tables.items():
            pq.write_table(table.replace_schema_metadata({ORIGIN_KEY: json.dumps(origin)}), aside / name)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_same(folder: Path, files: Iterable[str], origin: dict[str, int]) -> None:
    """Refuse a folder whose files were not all generated with the arguments ``origin``."""
    for file in files:
        try:
            found = json.loads((pq.read_schema(folder / file).metadata or {})[ORIGIN_KEY])
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):
            found = "no demo data of ours"
        if found != origin:
            raise UserError(
                f"{folder} exists, but its {file} holds {found}; expected {origin}: remove {folder}, "
                "or choose another data.root"
            )
