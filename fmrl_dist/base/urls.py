"""Recognise URLs, and show them without their credentials.

A URL can hold a password, a token or a signature. None of them may reach a terminal, a log, a checkpoint or an export,
so all code that prints or records a URL calls :func:`hide_credentials`. When in doubt it hides too much.
"""

from __future__ import annotations

import re

HIDDEN = "***"
URL = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*://)(\S*[^\s:;,.'\")])")


def is_url(path: str) -> bool:
    """Whether ``path`` is meant as a URL (``://``, or fsspec's chaining ``::``) rather than as a local path."""
    return "://" in path or "::" in path


def hide_credentials(text: str) -> str:
    """``text`` with user names, passwords, queries and fragments of all URLs in it replaced by ``***``.

    >>> hide_credentials("store https://me:secret@host/shop?sig=abc: gone")
    'store https://***@host/shop?***: gone'
    """
    return URL.sub(lambda match: match[1] + _shown(match[2]), text)


def holds_credentials(text: str) -> bool:
    """Whether :func:`hide_credentials` would hide something."""
    return hide_credentials(text) != text


def _shown(rest: str) -> str:
    """What may be shown of the part after ``://``. An @ after the host may end a password that contains a / or a ?, so
    nothing of such a URL is shown."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in rest[len(host) :]:
        return HIDDEN
    at, path = f"{HIDDEN}@" if "@" in host else "", rest.rpartition("@")[2]
    plain = re.split(r"[?#]", path, maxsplit=1)[0]
    return at + plain + (f"{path[len(plain)]}{HIDDEN}" if plain != path else "")
