"""The embedded engine, DuckDB, within limits of memory and threads; what does not fit goes to a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.tables import InteractionsConfig
from shards.tables.engine import OFFLINE, quiet


@contextmanager
def open_engine(settings: InteractionsConfig, folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection in memory; what exceeds its limit goes to ``folder``, which is for this alone.

    Nothing is fetched or loaded at run time: the engine has all that it needs.

    Raises:
        UserError: the memory or the disk does not suffice for a statement.
    """
    options: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{settings.memory_gb * 1000:.0f}MB",
        "threads": str(os.cpu_count() if settings.threads == "auto" else settings.threads),
        "temp_directory": str(folder),
        **OFFLINE,
    }
    try:
        with duckdb.connect(":memory:", config=options) as connection:
            yield quiet(connection)
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"the events do not fit into data.interactions.memory_gb {settings.memory_gb:g} and the free space of "
            f"{folder} ({_first_line(error)}); raise it, or make room"
        ) from None
    except duckdb.IOException as error:
        raise UserError(f"the engine cannot read or write ({_first_line(error)}); has {folder} free space?") from None


def count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    """The number that a query gives."""
    [(number,)] = connection.execute(query).fetchall()
    return int(number or 0)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
