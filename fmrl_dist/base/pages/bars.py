"""Bars as inline SVG: of parts side by side, and columns over an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fmrl_dist.base.pages.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    Scale,
    colours,
    fitted_scale,
    grid,
    picture,
)
from fmrl_dist.base.pages.markup import Markup, element

COLUMN_GAP = 0.12  # between columns, in their width


class Column(NamedTuple):
    """A column of parts, one upon another."""

    tip: str  # says what it shows
    heights: Sequence[float]  # of its parts, from below


def column_chart(
    name: str,
    title: str,
    description: str,
    columns: Sequence[Column],
    fills: Sequence[tuple[str, str]],
    x_label: str,
    ticks: Sequence[tuple[float, str]],
    highest: float = 0.0,
) -> Markup:
    """Columns side by side, all of one width.

    Args:
        name: unique on the page.
        title, description: as of :func:`fmrl_dist.base.pages.charts.line_chart`.
        columns: from left to right.
        fills: colour of each part, on light and on dark ground.
        x_label: what the columns stand for.
        ticks: places in columns, 0 for the left end of the first, and their names.
        highest: height that the axis reaches at least, so that several charts have the same.
    """
    across = Scale(0.0, max(len(columns), 1), LEFT, WIDTH - 4, False, list(ticks))
    highest = max(highest, *(sum(column.heights) for column in columns), 0.0) or 1.0
    up = fitted_scale([0.0, highest], Axis(from_zero=True), HEIGHT - BOTTOM, TOP)
    parts = [grid(across, up, x_label)]
    for number, column in enumerate(columns):
        left, right = across(number + COLUMN_GAP / 2), across(number + 1 - COLUMN_GAP / 2)
        below, boxes = 0.0, [element("title", column.tip)]
        for height, fill in zip(column.heights, fills, strict=True):
            if height:
                top, bottom = up(below + height), up(below)
                box = element(
                    "rect",
                    x=round(left, 1),
                    y=round(top, 1),
                    width=round(right - left, 1),
                    height=round(bottom - top, 1),
                )
                boxes.append(element("g", box, class_="fill", style=colours(fill)))
                below += height
        parts.append(element("g", *boxes))
    return picture(name, title, description, HEIGHT, parts)


def stacked_bars(
    name: str,
    title: str,
    description: str,
    bars: Sequence[tuple[str, Sequence[tuple[str, float, tuple[str, str]]]]],
    shown: Callable[[float], str],
    with_total: bool = True,
) -> Markup:
    """Horizontal bars of one scale, each in parts.

    Args:
        name: unique on the page.
        title, description: as of :func:`line_chart`.
        bars: name of each bar, and name, length and colour of its parts.
        shown: a length in words.
        with_total: whether the length of a bar stands behind its name.
    """
    longest = max(sum(value for _, value, _ in parts) for _, parts in bars) or 1.0
    pictures: list[Markup] = []
    top, height = 8.0, 30.0
    for bar, parts in bars:
        total, left = sum(value for _, value, _ in parts), 2.0
        pictures.append(
            element("text", f"{bar}: {shown(total)}" if with_total else bar, x=left, y=top + 11, class_="bar")
        )
        for part, value, colour in parts:
            length = (WIDTH - 4) * value / longest
            tip = element("title", f"{part}: {shown(value)}")
            box = element("rect", x=left, y=top + 18, width=max(length - 1, 0.5), height=height, rx=2)
            label = None
            if length > 7 * len(part) + 6:
                label = element("text", part, x=left + length / 2, y=top + 37, class_="inside", text_anchor="middle")
            pictures.append(element("g", tip, box, label, class_="fill", style=colours(colour)))
            left += length
        top += height + 34
    return picture(name, title, description, top, pictures)
