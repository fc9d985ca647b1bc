"""A whole page: head, header, navigation and sections. It asks nobody for anything, and a browser holds it to that."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from fmrl_dist.base.pages.markup import Markup, element, facts, joined

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Section(NamedTuple):
    """A part of a page."""

    key: str  # its anchor
    title: str
    content: Markup


class Heading(NamedTuple):
    """What stands above the sections."""

    eyebrow: str  # what kind of page it is
    name: str
    state: Markup  # one line
    tiles: Sequence[tuple[str, str | Markup]]  # the most important figures


def document(title: str, heading: Heading, sections: Sequence[Section], style: str = "") -> Markup:
    """The HTML of a page.

    Args:
        title: in the browser's tab.
        heading: above all.
        sections: in order; the navigation lists them.
        style: rules of this page, beside those of all pages.
    """
    navigation = element(
        "nav", *(element("a", one.title, href=f"#{one.key}") for one in sections), aria_label="Sections"
    )
    whole = (
        element(
            "section",
            element("h2", one.title, id=f"{one.key}-head"),
            one.content,
            id=one.key,
            aria_labelledby=f"{one.key}-head",
        )
        for one in sections
    )
    rules = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(rules + style)),
    )
    header = element(
        "header",
        element("p", heading.eyebrow, class_="eyebrow"),
        element("h1", heading.name),
        heading.state,
        facts(heading.tiles),
    )
    body = element("body", header, navigation, element("main", *whole))
    return joined((Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), Markup("\n")))
