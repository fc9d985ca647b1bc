"""A build report in words, for a terminal: each cause with its count, and nothing about what is in order."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from shards.store.build_report import BuildReport, FeatureCounts, FunnelStep

WIDTH, NAME_WIDTH = 100, 16
SIGNS = {"remain": "=", "removed": "-", "noted": "·"}


def report_lines(report: BuildReport) -> list[str]:
    """Lines of at most ``WIDTH`` characters."""
    lines: list[str] = []
    for name, table in report.tables.items():
        lines += _entry(f"table {name.removeprefix('data.')}", f"{table.rows:,} rows, {_bad(table.bad)}")
    lines += _funnel(report.funnel)
    catalogue = report.catalogue
    facts = [f"{catalogue.items:,}"]
    facts += [f"{catalogue.untitled:,} without a title"] if catalogue.untitled else []
    facts += [f"{count:,} without {column}" for column, count in catalogue.without.items() if count]
    lines += _entry("items", ", ".join(facts))
    for name, feature in report.features.items():
        lines += _entry(f"feature {name}", "; ".join(feature_facts(feature)))
    if report.seconds:
        took = (f"{step} {seconds:.1f}" for step, seconds in report.seconds.items())
        lines += _entry("seconds", ", ".join(took))
    return lines


def feature_facts(feature: FeatureCounts) -> Iterator[str]:
    """How many items have a feature, what was wrong with the images of the others, and which texts are too long."""
    yield f"{feature.present:,} items have it, {feature.absent:,} do not"
    texts = feature.texts
    if texts is not None:
        cut = f"{texts.cut:,}" if texts.cut else "none"
        share = f" ({100 * texts.cut / texts.given:.1f} %)" if texts.cut else ""
        yield f"{texts.given:,} texts, {cut} cut at {texts.max_tokens} tokens{share}"
    images = feature.images
    if images is not None:
        yield f"{images.given:,} images, {_bad(images.bad)}"
        if images.empty:
            yield f"{images.empty:,} cells empty"
        if images.unknown_items:
            yield f"{images.unknown_items:,} rows of unknown items"


def _bad(causes: Mapping[str, int]) -> str:
    total = sum(causes.values())
    shown = ", ".join(f"{count:,} {cause}" for cause, count in causes.items() if count)
    return f"{total:,} bad: {shown}" if total else "none bad"


def _funnel(steps: Iterable[FunnelStep]) -> Iterator[str]:
    """A small table; a sign says what a step does with what it counts; steps of nothing are no news."""
    steps = [step for step in steps if step.effect == "remain" or any((step.users, step.items, step.events))]
    if not steps:
        return
    yield f"{'events':<52}{'users':>14}{'items':>14}{'events':>18}"
    for step in steps:
        counts = ("" if count is None else f"{count:,}" for count in (step.users, step.items, step.events))
        users, items, events = counts
        yield f"  {SIGNS[step.effect]} {step.step[:47]:<48}{users:>14}{items:>14}{events:>18}".rstrip()


def _entry(name: str, text: str) -> list[str]:
    """``name`` and what is said about it, in lines that stand under each other."""
    first = f"{name:<{NAME_WIDTH}}" if len(name) < NAME_WIDTH else f"{name}  "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * NAME_WIDTH)
