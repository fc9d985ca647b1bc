"""How many rows of a table may be of no use before it is refused."""

from __future__ import annotations

from collections import Counter

from fmrl_dist.base.errors import require


def check_bad_rows(bad: Counter[str], num_rows: int, name: str, limit: float) -> None:
    """Refuse a table of which too many rows cannot be used.

    Args:
        bad: rows that cannot be used, by cause.
        num_rows: all rows.
        name: of the table.
        limit: share of them: ``data.dirt.max_bad_rows``.

    Raises:
        UserError: there are more.
    """
    causes = ", ".join(f"{cause}: {count:,}" for cause, count in bad.most_common())
    require(
        bad.total() <= limit * num_rows,
        f"table {name}: {bad.total():,} of {num_rows:,} rows cannot be used ({causes}), more than the share "
        f"{limit} of data.dirt.max_bad_rows; mend the table, check the columns that the config names, or raise it",
    )
