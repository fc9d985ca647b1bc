"""Fetching checked byte ranges from a URL, through a local cache.

The protocols are http, https, s3, gs, and memory (of this process, for tests); fsspec moves the bytes (``file:`` is a
folder and needs none of this). The list is closed on purpose. fsspec has other protocols, which unpack archives, open
local files or start remote shells, and its chained URLs (``simplecache::…``, ``zip://…::…``) nest any of them: whoever
chooses the store must not thereby choose what runs.

Credentials belong into the environment or a file: those that the protocol's own library reads (AWS_…,
GOOGLE_APPLICATION_CREDENTIALS), or fsspec's settings, such as ``FSSPEC_HTTP='{"headers": {"Authorization": "…"}}'`` or
``~/.config/fsspec/http.json`` (docs/cluster.md, Credentials). A URL with credentials works, but they are neither shown
nor recorded. The text of a library's error may quote them, so only its kind is shown.

All tries for a file or range share one time limit. Each try gets an even share of the time that remains, so a source
that stalls once is asked again. Pauses between tries double, with jitter, so that many ranks do not retry in step.
Cost: one request per range that the cache does not hold. Processes that want the same range at once each fetch it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import home_folder
from fmrl_dist.base.urls import HIDDEN, hide_credentials
from fmrl_dist.data.store.cache import RangeCache
from fmrl_dist.data.store.files import CHUNK_BYTES, FinalError, SourceError, checked_name, checked_range

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
PROTOCOLS = ("file", *PACKAGES)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
TEMPORARY_STATUSES = (408, 429)  # the 4xx that are worth another try

T = TypeVar("T")
Fetch = Callable[[float], T]  # its argument: the seconds that it may take


class RemoteFiles:
    """A store at a URL.

    Args:
        url: of the store's folder, as :func:`checked_url` accepts it.
        timeout_s: for one file or range, all tries and pauses included.
        retries: tries after the first one.
        cache: of ranges, or None.
    """

    def __init__(self, url: str, timeout_s: float, retries: int, cache: RangeCache | None) -> None:
        self.location = hide_credentials(url)
        self._url, self._protocol = url, url.partition("://")[0].lower()
        self._timeout_s, self._retries, self._cache = timeout_s, retries, cache
        self._file_system()  # reports a missing package at once

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        return self._retry(name, f"{name}: ", lambda limit_s: parse(self._fetch(name, limit_s)))

    def read_range(self, name: str, offset: int, num_bytes: int, sha256: str) -> bytes:
        held = self._cache.get(sha256, num_bytes) if self._cache else None
        if held is not None:
            return held
        check = partial(checked_range, num_bytes=num_bytes, sha256=sha256)
        data = self._retry(name, "", lambda limit_s: check(self._fetch(name, limit_s, offset, offset + num_bytes)))
        if self._cache:
            self._cache.put(sha256, data)
        return data

    def size(self, name: str) -> int:
        def ask(limit_s: float) -> int:
            size = self._call("info", name, limit_s).get("size")
            if not isinstance(size, int):
                raise FinalError("has an unknown length: the source does not report it")
            return size

        return self._retry(name, f"{name}: ", ask)

    def stream(self, name: str, num_bytes: int) -> Iterator[bytes]:
        for offset in range(0, num_bytes, CHUNK_BYTES):
            yield self._retry(
                name, f"{name}: ", partial(self._piece, name, offset, min(offset + CHUNK_BYTES, num_bytes))
            )

    def names(self) -> None:
        return None

    def _piece(self, name: str, begin: int, end: int, limit_s: float) -> bytes:
        data = self._fetch(name, limit_s, begin, end)
        require(len(data) == end - begin, f"is truncated: {len(data)} of {end - begin} bytes from byte {begin}")
        return data

    def _fetch(self, name: str, limit_s: float, begin: int | None = None, end: int | None = None) -> bytes:
        data: bytes = self._call(
            "cat_file", name, limit_s, start=begin, end=end
        )  # by keyword: s3fs orders them differently
        if begin is not None and end is not None and len(data) > end - begin:
            raise FinalError(
                f"cannot be fetched: {len(data)} bytes came for a range of {end - begin}; the server must serve ranges"
            )
        return data

    def _call(self, method: str, name: str, limit_s: float, **arguments: Any) -> Any:
        """Call a method of fsspec's file system on one file of the store, for at most ``limit_s`` seconds."""
        file_system = self._file_system()
        limit = {"timeout": limit_s} if file_system.async_impl else {}
        folder, mark, query = self._url.partition("?")  # such as a signature, which is for all files of the folder
        url = f"{folder.rstrip('/')}/{name}{mark}{query}"
        return getattr(file_system, method)(url, **arguments, **limit)

    def _file_system(self) -> Any:
        """fsspec's own, which keeps one for each process: none may be carried over a fork."""
        fsspec = import_fsspec()
        try:
            options: dict[str, Any] = {}
            if self._protocol in ("http", "https"):
                from fmrl_dist.data.store.bounded_client import bounded_client  # needs aiohttp

                options = {"encoded": True, "get_client": bounded_client}  # a signature covers the URL as it is
            return fsspec.filesystem(self._protocol, **options)
        except ImportError:
            package = PACKAGES[self._protocol]
            raise UserError(
                f"a store at {self._protocol}:// needs the package {package}; pip install {package}"
            ) from None

    def _retry(self, name: str, subject: str, fetch: Fetch[T]) -> T:
        """The result of ``fetch``, tried until it succeeds, a retry cannot help, or the time is over.

        ``subject`` begins the message of the error.
        """
        checked_name(name)
        begin = time.monotonic()
        deadline, problem, tries = begin + self._timeout_s, "", 0
        kind: type[UserError] = SourceError
        while tries <= self._retries and (left_s := deadline - time.monotonic()) > 0:
            if tries:
                longest_s = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S, left_s / 2)
                pause_s = random.SystemRandom().uniform(0, longest_s)
                time.sleep(pause_s)
                left_s -= pause_s
            tries += 1
            try:
                return fetch(left_s / (self._retries + 2 - tries))
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.location}: {name}") from None
            except Exception as error:  # each protocol's library has its own errors
                problem = _describe(error)
                # The bytes are not those that were written, or none came; the latter says nothing about the store.
                kind = UserError if isinstance(error, UserError) and not isinstance(error, FinalError) else SourceError
                if _is_final(error):
                    break
        raise kind(
            f"{subject}{problem} ({tries} of {self._retries + 1} tries in {time.monotonic() - begin:.1f} s; "
            "see store.retries, store.timeout_s)"
        )


def import_fsspec() -> Any:
    """fsspec, which reads its user's settings when it is first imported: only where there is a URL.

    Raises:
        UserError: it is not installed, or its settings are damaged; the message shows none of them.
    """
    try:
        import fsspec
    except ImportError:
        raise UserError("a store at a URL needs the package fsspec; pip install fsspec") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"fsspec cannot read its settings ({type(error).__name__}); expect each .json file in ~/.config/fsspec, or "
            'in FSSPEC_CONFIG_DIR, to be like {"http": {"headers": {…}}}'
        ) from None
    return fsspec


def checked_url(url: str) -> str:
    """``url`` if it may name a store.

    Raises:
        UserError: it is chained, has another protocol, or is not written as a URL.
    """
    shown = hide_credentials(url)
    require("::" not in url, f"store {shown} is a chained URL; give the URL of the store itself")
    protocol, _, rest = url.partition("://")
    require(
        protocol.lower() in PROTOCOLS,
        f"store {shown} has protocol {protocol!r}; expected a folder or one of {', '.join(PROTOCOLS)}",
    )
    require(
        HIDDEN not in rest,
        f"store {shown} was recorded without its credentials; give it again with --store or --store.path, "
        "or put them into the environment",
    )
    require(
        url.isascii() and url.isprintable() and " " not in url,
        f"store {protocol}://… holds a character that a URL cannot hold; write it as %XX",
    )
    host, behind = re.fullmatch(r"([^/?#]*)(.*)", rest).groups()  # type: ignore[union-attr]
    require("@" not in behind, f"store {shown} has an @ after its host; write it as %40")
    require("#" not in behind, f"store {shown} has a #; write it as %23")
    require(
        (host == "" and behind.startswith("/")) if protocol.lower() == "file" else (host + behind).strip("/") != "",
        f"store {shown} names no folder; expected a URL such as http://host/folder, s3://bucket/folder or file:///folder",
    )
    return url


def default_cache_folder(environment: dict[str, str]) -> Path:
    """Where ranges are kept if ``store.cache_dir`` is empty: in the user's cache.

    Raises:
        UserError: the user has none.
    """
    home = home_folder()
    cache = environment.get("XDG_CACHE_HOME") or (home and home / ".cache")
    if cache is None:
        raise UserError("there is no home folder to keep a cache in; set store.cache_dir, or HOME")
    return Path(cache) / "fmrl-dist"


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in TEMPORARY_STATUSES
    return refused or isinstance(error, PermissionError | FinalError)


def _describe(error: Exception) -> str:
    """What may be shown of an error: never a library's own text, which may quote the URL."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "cannot be fetched: the source did not answer in time"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        hint = "; check the credentials" if status in (401, 403) else ""
        return f"cannot be fetched: the source answered with HTTP status {status}{hint}"
    strerror = getattr(error, "strerror", None)
    return f"cannot be fetched: {type(error).__name__}" + (f" ({strerror})" if strerror else "")
