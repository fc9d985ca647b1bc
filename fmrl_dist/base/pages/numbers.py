"""Numbers as pages show them."""

from __future__ import annotations


def number_of_bytes(count: float) -> str:
    """Bytes in a unit that suits them.

    >>> number_of_bytes(68_000), number_of_bytes(2_100_000)
    ('68.0 kB', '2.10 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def three_digits(value: float) -> str:
    """A positive number with three digits, or all of those before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
