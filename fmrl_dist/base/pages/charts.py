"""Small charts as inline SVG: readable without scripts, with a title for those who cannot see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fmrl_dist.base.pages.markup import Markup, element, joined

WIDTH, HEIGHT = 400.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 36.0, 62.0, 12.0, 40.0
LABEL_GAP = 12.5  # between labels at the right end
MOST_POINTS = 240  # of a line
LABEL_CHARACTERS = 10

# From the smallest size to the largest, on light and on dark ground.
RAMP = ((0x1F, 0x96, 0x92), (0x2A, 0x1F, 0x8F)), ((0x2F, 0x8A, 0x8C), (0xCF, 0xCB, 0xFF))
NETWORK, VECTORS, BASELINE = ("#1f5fbf", "#7fb4ff"), ("#b3541e", "#ffa36b"), ("#6b7280", "#9aa3af")


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: tuple[str, str]  # on light and on dark ground
    style: str = ""  # "dashed", "dotted"
    marker: str = ""  # "circle", "diamond"; "" for none
    intervals: Sequence[tuple[float, float] | None] = ()  # of each point
    tips: Sequence[str] = ()  # of each point
    label: str = ""  # at its right end


@dataclass(frozen=True)
class Axis:
    """A horizontal or vertical axis; the vertical one has no label, as the chart's title says what it is."""

    label: str = ""
    ticks: Sequence[tuple[float, str]] = ()  # chosen if there are none
    is_log: bool = False
    from_zero: bool = False


@dataclass
class Scale:
    """From values to places in the picture."""

    low: float
    high: float
    begin: float  # of the picture
    end: float
    is_log: bool
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, at = (math.log2(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.begin + share * (self.end - self.begin)


def ramp(number: int, count: int) -> tuple[str, str]:
    """Colour of one of several sizes, on light and on dark ground."""
    share = number / max(count - 1, 1)
    shown = []
    for first, last in RAMP:
        mixed = (round(a + share * (b - a)) for a, b in zip(first, last, strict=True))
        shown.append("#" + "".join(f"{value:02x}" for value in mixed))
    return shown[0], shown[1]


def line_chart(
    name: str,
    title: str,
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    marked: tuple[float, str] | None = None,
) -> Markup:
    """A chart of lines.

    Args:
        name: unique on the page.
        title: of the chart.
        description: what is to be seen, for those who cannot.
        series: lines; of each at most ``MOST_POINTS`` points are drawn.
        x, y: axes.
        marked: a place of x, and its name.
    """
    series = [one for one in series if one.points]
    xs = [px for one in series for px, _ in one.points] or [0.0, 1.0]
    ys = [py for one in series for _, py in one.points] or [0.0, 1.0]
    ys += [end for one in series for pair in one.intervals if pair is not None for end in pair]
    across = fitted_scale(xs, x, LEFT, WIDTH - RIGHT)
    up = fitted_scale(ys, y, HEIGHT - BOTTOM, TOP)
    parts = [grid(across, up, x.label)]
    if marked is not None:
        at = across(marked[0])
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="marked"))
        parts.append(element("text", marked[1], x=at - 4, y=TOP + 9, class_="tick", text_anchor="end"))
    for one in series:
        parts.append(_line(one, across, up))
    parts.append(_labels(series, up))
    return picture(name, title, description, HEIGHT, parts)


def picture(name: str, title: str, description: str, height: float, parts: Sequence[Markup]) -> Markup:
    """A drawing as wide as its place, with what is read to those who cannot see it."""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-text"),
        *parts,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-text",
    )


def colours(colour: tuple[str, str]) -> str:
    """Colours on light and on dark ground, and of a text on each of them."""
    return f"--l:{colour[0]};--d:{colour[1]};--li:{ink_on(colour[0])};--di:{ink_on(colour[1])}"


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on a colour (WCAG's relative luminance).

    >>> ink_on("#2a1f8f"), ink_on("#cfcbff")
    ('#fff', '#000')
    """
    linear = []
    for begin in (1, 3, 5):
        value = int(colour[begin : begin + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000"


def fitted_scale(values: Sequence[float], axis: Axis, begin: float, end: float) -> Scale:
    """A scale for ``values``, from place ``begin`` to ``end``, with ticks at round numbers."""
    low, high = min(values), max(values)
    if axis.from_zero:
        low = min(low, 0.0)
    if high <= low and not axis.is_log:
        low, high = low - 0.5, high + 0.5
    if axis.ticks:
        return Scale(low, high, begin, end, axis.is_log, list(axis.ticks))
    if axis.is_log:
        powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return Scale(low, high, begin, end, True, [(10.0**power, short_count(10**power)) for power in powers])
    step = _nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(number * step, _number(number * step, step)) for number in range(first, last + 1)]
    return Scale(ticks[0][0], ticks[-1][0], begin, end, False, ticks)


def _nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _number(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if step >= 1000:
        return short_count(value)
    if step < 1e-2:
        digits, power = f"{value:e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    decimals = max(0, -math.floor(math.log10(step)) + (f"{step:e}"[:3] == "2.5"))
    return f"{value:.{decimals}f}"


def short_count(value: float) -> str:
    """A large round number in few characters.

    >>> short_count(100), short_count(2500), short_count(1e7)
    ('100', '2.5k', '10M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def grid(across: Scale, up: Scale, x_label: str) -> Markup:
    """Lines and names of the ticks of both axes."""
    left, right, base = across.begin, across.end, up.begin
    parts = []
    for value, text in up.ticks:
        y = up(value)
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(element("text", text, x=left - 6, y=y + 4, class_="tick", text_anchor="end"))
    for value, text in across.ticks:
        x = across(value)
        parts.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, class_="axis"))
        parts.append(element("text", text, x=x, y=base + 16, class_="tick", text_anchor="middle"))
    parts.append(element("line", x1=left, x2=right, y1=base, y2=base, class_="axis"))
    parts.append(element("text", x_label, x=(left + right) / 2, y=base + 34, class_="label", text_anchor="middle"))
    return joined(parts)


def _line(one: Series, across: Scale, up: Scale) -> Markup:
    points = thinned(one.points)
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    parts = [element("polyline", points=path, class_=f"line {one.style}".strip())]
    for number, pair in enumerate(one.intervals):
        if pair is not None:
            x = across(one.points[number][0])
            low, high = (up(end) for end in pair)
            bars = f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}"
            parts.append(element("path", d=bars, class_="interval"))
    for number, (x, y) in enumerate(one.points if one.marker else ()):
        tip = element("title", one.tips[number]) if one.tips else None
        parts.append(element("g", tip, _marker(one.marker, across(x), up(y)), class_="point"))
    return element("g", element("title", one.name), *parts, style=colours(one.colour), class_="series")


def _marker(kind: str, x: float, y: float) -> Markup:
    if kind == "diamond":
        return element("path", d=f"M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z")
    return element("circle", cx=round(x, 1), cy=round(y, 1), r=3.4)


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most ``MOST_POINTS`` points: means of runs of them; the last stays as it is."""
    if len(points) <= MOST_POINTS:
        return points
    run = -(-len(points) // (MOST_POINTS - 1))
    kept = []
    for begin in range(0, len(points) - 1, run):
        part = points[begin : min(begin + run, len(points) - 1)]
        kept.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*kept, points[-1]]


def _labels(series: Sequence[Series], up: Scale) -> Markup:
    """Names at the right ends, moved apart where they would overlap."""
    wanted = sorted(((up(one.points[-1][1]), one) for one in series if one.label), key=lambda pair: pair[0])
    places: list[float] = []
    for y, _ in wanted:
        places.append(max(y, places[-1] + LABEL_GAP) if places else y)
    lowest = HEIGHT - BOTTOM - 3
    for number in reversed(range(len(places))):
        places[number] = min(places[number], lowest)
        lowest = places[number] - LABEL_GAP
    return joined(
        element(
            "text",
            one.label if len(one.label) <= LABEL_CHARACTERS else f"{one.label[: LABEL_CHARACTERS - 1]}…",
            x=WIDTH - RIGHT + 7,
            y=place + 4,
            class_="name",
        )
        for place, (_, one) in zip(places, wanted, strict=True)
    )
