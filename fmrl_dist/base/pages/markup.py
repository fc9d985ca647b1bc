"""HTML in which text from data cannot become markup: whatever is not :class:`Markup` is escaped where it is put in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from fmrl_dist.base.urls import hide_credentials

VOID = {"br", "circle", "col", "img", "line", "link", "meta", "path", "polyline", "rect"}  # elements without an end tag
LAYOUT = "\n\t"  # the only control characters that a page may hold


class Markup(str):
    """HTML that is safe to put into a page as it is."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text as HTML: no markup, no credentials of URLs, no control or bidirectional characters.

    >>> escaped('<b>"x"</b>')
    '&lt;b&gt;&quot;x&quot;&lt;/b&gt;'
    """
    shown = "".join(c if c.isprintable() or c in LAYOUT else ascii(c)[1:-1] for c in hide_credentials(text))
    return Markup(html.escape(shown, quote=True))


def element(tag: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """``<tag>`` with its children; ``class_`` is the attribute class, ``view_box`` is view-box, None is left out.

    >>> element("td", "a < b", class_="figure")
    '<td class="figure">a &lt; b</td>'
    """
    names = {name: NAMES.get(name, name.rstrip("_").replace("_", "-")) for name in attributes}
    shown = (f' {names[name]}="{escaped(_text(value))}"' for name, value in attributes.items() if value is not None)
    start = f"<{tag}{''.join(shown)}"
    if tag in VOID:
        assert not any(children), "an element without an end tag has no children"
        return Markup(f"{start}>" if tag in ("br", "col", "img", "link", "meta") else f"{start}/>")
    return Markup(f"{start}>{joined(children)}</{tag}>")


NAMES = {"viewBox": "viewBox"}  # attributes that are not lower case


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def joined(parts: Iterable[str | None], between: str = "") -> Markup:
    """Parts, each escaped unless it is markup."""
    safe = (part if isinstance(part, Markup) else escaped(part) for part in parts if part is not None)
    return Markup(escaped(between).join(safe))


def table(
    caption: str,
    head: Sequence[str | Markup],
    rows: Iterable[Sequence[str | Markup]],
    groups: Sequence[tuple[str, int]] = (),
) -> Markup:
    """A table that scrolls within the page where it is too wide; the first cell of a row is its heading.

    Args:
        caption: says what it shows; it stands above, where it does not scroll.
        head: names of the columns.
        rows: cells, as many as columns.
        groups: headings of runs of columns, each with how many it spans, after the first column.
    """
    columns = element("tr", *(element("th", cell, scope="col") for cell in head))
    if groups:
        above = (element("th", name, scope="colgroup", colspan=span) for name, span in groups)
        columns = joined((element("tr", element("td"), *above, class_="groups"), columns))
    body = (
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    )
    whole = element("table", element("thead", columns), element("tbody", *body), aria_label=caption)
    scrolls = element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return element("div", element("p", caption, class_="caption", aria_hidden="true"), scrolls, class_="table")


def facts(pairs: Iterable[tuple[str, str | Markup]]) -> Markup:
    """A list of names and values."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs), class_="facts"
    )


def paragraph(*parts: str | Markup, class_: str | None = None) -> Markup:
    return element("p", *parts, class_=class_)
