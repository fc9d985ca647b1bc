"""Columns stand where their numbers say."""

from __future__ import annotations

import re

from fmrl_dist.base.pages.bars import Column, column_chart
from fmrl_dist.base.pages.charts import BASELINE, BOTTOM, HEIGHT, NETWORK, TOP, Axis, Series, line_chart

RECT = re.compile(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"')


def test_parts_stand_upon_each_other() -> None:
    columns = [Column("a", [100, 50]), Column("b", [0, 200]), Column("c", [0, 0])]
    html = column_chart("x", "X", "Three.", columns, [NETWORK, BASELINE], "n", [(0, "first"), (2, "last")])
    boxes = [tuple(map(float, found)) for found in RECT.findall(html)]
    base, unit = HEIGHT - BOTTOM, (HEIGHT - BOTTOM - TOP) / 200
    (left, y1, width, h1), (also_left, y2, _, h2), (next_left, y3, _, h3) = boxes
    assert left == also_left and next_left > left + width
    assert abs(h1 - 100 * unit) < 0.01 and abs(y1 + h1 - base) < 0.01
    assert abs(h2 - 50 * unit) < 0.01 and abs(y2 + h2 - y1) < 0.01
    assert abs(h3 - 200 * unit) < 0.01 and abs(y3 - TOP) < 0.01
    assert "<title>b</title>" in html and ">first<" in html


def test_nothing_to_show_is_no_error() -> None:
    for columns in ([], [Column("a", [0])]):
        assert RECT.search(column_chart("x", "X", "None.", columns, [NETWORK], "n", [])) is None


def test_logarithmic_axes_have_their_decades() -> None:
    line = Series("events", [(1, 2314), (10, 300), (3400, 1)], NETWORK)
    html = line_chart("x", "X", "It falls.", [line], Axis("rank", is_log=True), Axis(is_log=True))
    assert re.findall(r'<text[^>]*text-anchor="end"[^>]*>([^<]*)<', html) == ["1", "10", "100", "1k"]
    assert re.findall(r'<text[^>]*text-anchor="middle"[^>]*>([^<]*)<', html) == ["1", "10", "100", "1k", "rank"]
