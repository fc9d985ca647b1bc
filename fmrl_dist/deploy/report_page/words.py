"""Numbers as the page shows them."""

from __future__ import annotations

from fmrl_dist.base.pages.markup import Markup, element, joined
from fmrl_dist.base.pages.numbers import three_digits
from fmrl_dist.deploy.report_page.measures import Worth


def fine_digits(value: float) -> str:
    """A positive number with two digits behind the point, three below 0.1."""
    return three_digits(value) if value >= 0.1 else f"{value:.3f}"


def milliseconds(value: float) -> str:
    return f"{fine_digits(value)} ms"


def figure(worth: Worth) -> Markup:
    """A figure with four digits, and its interval."""
    if worth.estimate is None:
        return element("span", f"{worth.value:.4f}")
    low, high = worth.estimate.low, worth.estimate.high
    return joined((element("span", f"{worth.value:.4f}"), " ", element("small", f"[{low:.4f}, {high:.4f}]")))


def difference(worth: Worth) -> Markup | str:
    """Difference to the whole network, and its interval."""
    if worth.difference is None:
        return "—"
    ends = worth.difference.mean, worth.difference.low, worth.difference.high
    mean, low, high = (f"{value:+.4f}".replace("-", "−") for value in ends)
    return joined((element("span", mean), " ", element("small", f"[{low}, {high}]")))


def tip(name: str, worth: Worth) -> str:
    """A figure in one line of text."""
    interval = f" [{worth.estimate.low:.4f}, {worth.estimate.high:.4f}]" if worth.estimate is not None else ""
    return f"{name}: {worth.value:.4f}{interval}"


def short(sha256: str) -> Markup:
    """A hash, its first digits shown large."""
    return element("code", sha256, class_="hash")
