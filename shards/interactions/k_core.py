"""The k-core: users and items with too few events are left out until none is left (paper section 5.1).

Whoever is out lowers the counts of the others, so it takes rounds. In one, the users that have become too few go, then
the items. Only their own events are looked at: a round reads two columns and joins them with a short list.
"""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa

TRAIN = 0


def k_core(
    connection: duckdb.DuckDBPyConnection, events: str, least_events: dict[str, int], num_codes: dict[str, int]
) -> dict[str, np.ndarray]:
    """Who is in the core of the training events.

    Args:
        connection: to the engine.
        events: table with columns ``u``, ``i`` (codes of users and items from 0) and ``p`` (0: training).
        least_events: for ``u`` and for ``i``, how many training events one must have; at most 1 asks for nothing.
        num_codes: of ``u`` and of ``i``.

    Returns:
        For ``u`` and for ``i``, whether each code is in the core, bool. One without a training event is in it only if
        nothing is asked for.
    """
    degree = {side: _degrees(connection, events, side, num_codes[side]) for side in ("u", "i")}
    alive = {side: np.ones(num_codes[side], np.bool_) for side in ("u", "i")}
    moved = True
    while moved:
        moved = False
        for side, other in (("u", "i"), ("i", "u")):
            gone = np.flatnonzero(alive[side] & (degree[side] < least_events[side]))
            if least_events[side] > 1 and len(gone):
                alive[side][gone] = False
                degree[other] -= _degrees(connection, events, other, num_codes[other], (side, gone))
                moved = True
    return alive


def _degrees(
    connection: duckdb.DuckDBPyConnection,
    events: str,
    side: str,
    num_codes: int,
    only: tuple[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Training events of each code of ``side``, int64 [codes]; ``only`` those of some codes of the other side.

    An event is taken from a code that is in the core once, when its other code goes; counts of codes that are out
    mean nothing.
    """
    where = f"p = {TRAIN}"
    if only is not None:
        other, codes = only
        connection.register("only_codes", pa.table({"code": codes.astype(np.int32)}))
        where += f" AND {other} IN (SELECT code FROM only_codes)"
    found = connection.sql(f"SELECT {side} AS code, count(*) AS n FROM {events} WHERE {where} GROUP BY 1")
    counts = np.zeros(num_codes, np.int64)
    for batch in found.to_arrow_reader():
        counts[batch.column(0).to_numpy()] = batch.column(1).to_numpy()
    return counts
