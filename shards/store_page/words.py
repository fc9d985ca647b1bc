"""Items and times as the page shows them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa

from fmrl_dist.base.pages.markup import Markup, element

LONGEST_TITLE = 160  # characters
UNIX_SECONDS = (300_000_000, 10_000_000_000)  # a latest time between these is read as Unix seconds: 1979 to 2286
DAY_S = 86_400


@dataclass(frozen=True)
class ShownItems:
    """Titles of all items, and small pictures of some."""

    vocabulary: pa.Table  # the store's, row = item
    pictures: Mapping[int, bytes] = field(default_factory=dict)  # JPEG files

    def title(self, item: int) -> str:
        """Its title; its external id where it has none."""
        title = self.vocabulary["title"][item].as_py() if "title" in self.vocabulary.column_names else None
        title = " ".join(str(title).split()) if title is not None else ""
        title = title or f"item {self.vocabulary['external_id'][item].as_py()}"
        return title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 1]}…"

    def picture(self, item: int) -> Markup | None:
        """Its picture; an empty frame where it has none; None where no item has one."""
        if not self.pictures:
            return None
        if item not in self.pictures:
            return element("span", class_="picture none", role="img", aria_label="no picture")
        data = base64.b64encode(self.pictures[item]).decode("ascii")
        return element(
            "img", src=f"data:image/jpeg;base64,{data}", alt=f"Picture of {self.title(item)}", class_="picture"
        )


def is_unix(latest: int) -> bool:
    """Whether times up to ``latest`` look like Unix seconds."""
    return UNIX_SECONDS[0] <= latest < UNIX_SECONDS[1]


def shown_time(time: int, latest: int, span: int = DAY_S * 366) -> str:
    """A time as a date, where such times look like Unix seconds, as fine as a span of so many seconds asks for.

    >>> shown_time(978_300_760, 1_046_454_590), shown_time(17, 40)
    ('2000-12', '17')
    """
    if not is_unix(latest):
        return f"{time:,}"
    form = "%Y-%m" if span > 300 * DAY_S else "%Y-%m-%d" if span > 3 * DAY_S else "%m-%d %H:%M"
    try:
        return datetime.fromtimestamp(time, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):  # a year before 1 or after 9999
        return f"{time:,}"
