"""The build report as tables: what was read, left out and noted, by cause."""

from __future__ import annotations

from collections.abc import Mapping

from fmrl_dist.base.pages.markup import Markup, element, facts, joined, paragraph, table
from shards.store.build_report import BUILD_REPORT_FILE, BuildReport, FeatureCounts

EFFECTS = {"remain": "remain", "removed": "taken away", "noted": "noted, kept"}


def dirt(report: BuildReport | None) -> Markup:
    """All tables of a report; a line where there is none."""
    if report is None:
        return paragraph(
            f"This store has no {BUILD_REPORT_FILE}: an older version built it, or it was not copied along. "
            "shards.build --overwrite builds the store again, with it.",
            class_="missing",
        )
    parts = [_tables(report), _funnel(report), _catalogue(report), _texts(report.features), _images(report.features)]
    seconds = ", ".join(f"{step} {took:,.1f}" for step, took in report.seconds.items())
    made_with = ", ".join(f"{name} {version}" for name, version in report.made_with.items())
    written = report.written.replace("T", " ").replace("+00:00", " UTC")
    origin = [("written", written), ("config", report.config), ("seconds", seconds), ("made with", made_with)]
    return joined([*parts, facts((name, words) for name, words in origin if words)])


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _causes(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in causes.items() if count) or "—"


def _tables(report: BuildReport) -> Markup | None:
    rows = [
        [name, f"{one.rows:,}", f"{sum(one.bad.values()):,}", _causes(one.bad)] for name, one in report.tables.items()
    ]
    return table("Rows of the raw tables", ["table", "rows read", "could not be used", "why"], rows) if rows else None


def _funnel(report: BuildReport) -> Markup | None:
    rows = [
        [
            element("span", one.step, class_="step"),
            EFFECTS[one.effect],
            _count(one.users),
            _count(one.items),
            _count(one.events),
        ]
        for one in report.funnel
    ]
    head = ["step", "effect", "users", "items", "events"]
    return table("From the events of the raw tables to those of the store", head, rows) if rows else None


def _catalogue(report: BuildReport) -> Markup:
    catalogue = report.catalogue
    lacking = dict(catalogue.without)
    if catalogue.untitled is not None:
        lacking = {"title": catalogue.untitled} | {f"{name}, in texts": count for name, count in lacking.items()}
    for name, feature in report.features.items():
        lacking[f"feature {name}"] = feature.absent
    share = {name: 100 * count / max(catalogue.items, 1) for name, count in lacking.items()}
    rows = [[name, f"{count:,}", f"{share[name]:.1f} %"] for name, count in lacking.items()]
    return table(f"What the {catalogue.items:,} items lack", ["of the item", "items without", "share"], rows)


def _texts(features: Mapping[str, FeatureCounts]) -> Markup | None:
    of_texts = {name: one.texts for name, one in features.items() if one.texts is not None}
    rows = [
        [name, f"{one.given:,}", f"{one.max_tokens:,}", f"{one.cut:,}", f"{100 * one.cut / max(one.given, 1):.1f} %"]
        for name, one in of_texts.items()
    ]
    head = ["feature", "items with a text", "tokens that are read", "longer texts", "share"]
    return table("Texts of which the encoder reads the first tokens only", head, rows) if rows else None


def _images(features: Mapping[str, FeatureCounts]) -> Markup | None:
    """A column for each cause that occurs."""
    of_images = {name: one.images for name, one in features.items() if one.images is not None}
    if not of_images:
        return None
    causes = dict.fromkeys(cause for one in of_images.values() for cause, count in one.bad.items() if count)
    rows = []
    for name, one in of_images.items():
        counts = [one.given, *(one.bad.get(cause, 0) for cause in causes), one.empty, one.unknown_items]
        rows.append([name, *map(_count, counts)])
    head = ["feature", "given", *causes, "empty cells", "of unknown items"]
    return table("Images, by why they cannot be used", head, rows)
