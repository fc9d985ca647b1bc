"""Charts: the ticks of an axis are round numbers, written as such."""

from __future__ import annotations

import re

import pytest

from fmrl_dist.base.pages.charts import Axis, Series, line_chart


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (100, ["0", "25", "50", "75", "100"]),
        (1000, ["0", "250", "500", "750", "1000"]),
        (10, ["0", "2.5", "5.0", "7.5", "10.0"]),
        (1, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (4, ["0", "1", "2", "3", "4"]),
    ],
)
def test_ticks_are_as_exact_as_their_step(highest: float, ticks: list[str]) -> None:
    line = Series("loss", [(1, 0), (2, highest)], ("#000000", "#ffffff"))
    html = str(line_chart("loss", "Loss", "It rises.", [line], Axis("step"), Axis(from_zero=True)))
    assert re.findall(r'<text[^>]*text-anchor="end"[^>]*>([^<]*)<', html) == ticks
