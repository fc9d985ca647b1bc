"""Bytes of text files as the CSV parser wants them: unpacked, in UTF-8, with a delimiter of one character.

A plain or compressed UTF-8 file with such a delimiter is read by the parser itself. What it cannot do, other encodings
and delimiters of several characters, is done here to pieces of the stream, so no file is held in memory.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from fmrl_dist.base.errors import UserError

CHUNK_BYTES = 1 << 20
STAND_IN = "\x1f"  # ASCII's unit separator, for a delimiter of several characters
CODECS = {".gz": "gzip", ".zst": "zstd"}


def codec_of(encoding: str) -> str:
    """Python's name of an encoding.

    Raises:
        UserError: it has none of that name, or one that is no encoding of text.
    """
    try:
        found = codecs.lookup(encoding)
    except (LookupError, ValueError):
        raise UserError(f"csv.encoding is {encoding!r}, which Python does not know; try latin-1 or cp1252") from None
    if not found._is_text_encoding:
        raise UserError(f"csv.encoding is {encoding!r}, which is no encoding of text; try latin-1 or cp1252")
    return found.name


@contextmanager
def opened_text(file: Path, encoding: str, delimiter: str) -> Iterator[pa.NativeFile]:
    """The file's bytes, unpacked, in UTF-8, with :data:`STAND_IN` for a delimiter of several characters.

    Raises:
        OSError: it cannot be opened; also while reading, where what is compressed is damaged.
        UnicodeDecodeError: while reading: bytes that are not of this encoding.
        UserError: while reading: the file holds the stand-in itself.
    """
    codec = codec_of(encoding)
    with pa.input_stream(str(file), compression=CODECS.get(file.suffix.lower()), buffer_size=CHUNK_BYTES) as stream:
        if codec in ("utf-8", "ascii") and len(delimiter) == 1:
            yield stream
            return
        with pa.PythonFile(_Recoded(stream, codec, delimiter, file), mode="r") as recoded:
            yield recoded


class _Recoded(io.RawIOBase):
    """A stream of bytes in UTF-8 made of one in another encoding."""

    def __init__(self, source: pa.NativeFile, codec: str, delimiter: str, file: Path) -> None:
        super().__init__()
        # utf-8-sig, utf-16 and utf-32 take away their byte-order mark
        self._decoder = codecs.getincrementaldecoder("utf-8-sig" if codec in ("utf-8", "ascii") else codec)("strict")
        self._source, self._delimiter, self._file = source, delimiter, file
        self._held = ""  # the last characters, which may begin a delimiter
        self._ready = b""
        self._is_over = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._is_over and (size < 0 or len(self._ready) < size):
            self._ready += self._next_piece()
        taken = self._ready if size < 0 else self._ready[:size]
        self._ready = self._ready[len(taken) :]
        return taken

    def _next_piece(self) -> bytes:
        data = self._source.read(CHUNK_BYTES)
        self._is_over = not data
        text = self._decoder.decode(data, final=self._is_over)
        if len(self._delimiter) == 1:
            return text.encode()
        if STAND_IN in text:
            raise UserError(f"table {self._file} holds the character U+001F; give it a delimiter of one character")
        text = self._held + text
        *parts, rest = text.split(self._delimiter)
        kept = 0 if self._is_over else _overlap(rest, self._delimiter)
        self._held = rest[len(rest) - kept :]
        return STAND_IN.join([*parts, rest[: len(rest) - kept]]).encode()


def _overlap(text: str, delimiter: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of a delimiter."""
    return next((n for n in range(min(len(delimiter) - 1, len(text)), 0, -1) if text.endswith(delimiter[:n])), 0)


def lines_of(file: Path, encoding: str = "utf-8", most_bytes: int = 1 << 24) -> Iterator[str | None]:
    """Lines of a text file, unpacked, without their ends and without blank ones; None for one that is too long.

    Raises:
        UserError: it cannot be read, or is not of its encoding.
    """
    rest, is_skipping = b"", False
    try:
        with opened_text(file, encoding, ",") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                if is_skipping and lines:
                    lines, is_skipping = lines[1:], False
                for line in lines:
                    yield from _line(line, most_bytes)
                if len(rest) > most_bytes and not is_skipping:
                    yield None
                    is_skipping = True
                rest = b"" if is_skipping else rest
        yield from _line(rest, most_bytes)
    except UnicodeDecodeError as error:
        raise UserError(f"table {file} is not {encoding} text ({error}); is it as its publisher wrote it?") from None
    except (OSError, pa.ArrowException) as error:
        what = " ".join(str(error).split())
        raise UserError(f"table {file} cannot be read: {what}; is the file complete, and in that format?") from None


def _line(line: bytes, most_bytes: int) -> Iterator[str | None]:
    if len(line) > most_bytes:
        yield None
    elif line.strip():
        yield line.decode().rstrip("\r")
