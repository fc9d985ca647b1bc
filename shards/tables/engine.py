"""The SQL engine (DuckDB) in this process, without network, extensions or a database file; and how values get into SQL.

Rows reach it as Arrow batches, so neither a file's nor a column's name is ever part of a statement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmrl_dist.base.errors import UserError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

OFFLINE = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}


def private_engine(**settings: Any) -> DuckDBPyConnection:
    """A connection of its own, in memory, whose times are UTC.

    Raises:
        UserError: the engine is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise UserError("reading these tables needs DuckDB; pip install 'fmrl-dist[shards]'") from None
    connection = duckdb.connect(":memory:", config=OFFLINE | settings)
    return quiet(connection)


def quiet(connection: DuckDBPyConnection) -> DuckDBPyConnection:
    """``connection`` with times in UTC and without a progress bar, which would be drawn into logs, too."""
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")
    return connection


def literal(text: str) -> str:
    """``text`` as a literal of SQL.

    Raises:
        UserError: it holds a zero byte, which no statement can.
    """
    if "\0" in text:
        raise UserError(f"the name {text!r} holds a zero byte; give the column another name")
    return "'" + text.replace("'", "''") + "'"
