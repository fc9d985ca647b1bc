"""How many rows of a table may be of no use before it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fmrl_dist.base.errors import require

MEND_BAD_ROWS = "check the columns that the config names, or raise data.dirt.max_bad_rows"


def check_bad_rows(
    bad: Counter[str],
    num_rows: int,
    name: str,
    limit: float,
    examples: Mapping[str, str] | None = None,
    mend: str = MEND_BAD_ROWS,
) -> None:
    """Refuse a table of which too many rows cannot be used.

    Args:
        bad: rows that cannot be used, by cause.
        num_rows: all rows.
        name: of the table.
        limit: share of them: ``data.dirt.max_bad_rows``.
        examples: by cause, a value that is not understood.
        mend: what else can be done about it.

    Raises:
        UserError: there are more.
    """
    shown = {cause: f", such as {value!r}" for cause, value in (examples or {}).items()}
    causes = ", ".join(f"{cause}: {count:,}{shown.get(cause, '')}" for cause, count in bad.most_common())
    require(
        bad.total() <= limit * num_rows,
        f"table {name}: {bad.total():,} of {num_rows:,} rows cannot be used ({causes}), more than a share "
        f"of {limit}; mend the table, {mend}",
    )
