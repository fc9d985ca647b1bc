"""Encodings and delimiters of several characters, wherever the stream is cut into pieces."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from shards.tables import text_streams
from shards.tables.text_streams import STAND_IN, lines_of, opened_text

FILES = itertools.count()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from(":;ab\nü日"), max_size=30),
    delimiter=st.sampled_from(["::", ":;:", ":::", ";"]),
    encoding=st.sampled_from(["utf-8", "utf-16-le", "gb18030"]),
    chunk=st.integers(1, 7),
)
def test_pieces_make_the_whole(tmp_path: Path, text: str, delimiter: str, encoding: str, chunk: int) -> None:
    path = tmp_path / str(next(FILES))
    path.write_bytes(text.encode(encoding))
    with patch.object(text_streams, "CHUNK_BYTES", chunk), opened_text(path, encoding, delimiter) as stream:
        found = stream.read(1 << 20).decode()
    assert found == (text if len(delimiter) == 1 else text.replace(delimiter, STAND_IN))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_lines(chunk: int, tmp_path: Path) -> None:
    """Blank ones are none; one that is too long is None, once, and nothing after it is lost."""
    path = tmp_path / "t.gz"
    path.write_bytes(gzip.compress(b"one\r\n\n  \n" + b"x" * 50 + b"\ntwo\n" + b"y" * 50))
    with patch.object(text_streams, "CHUNK_BYTES", chunk):
        assert list(lines_of(path, most_bytes=10)) == ["one", None, "two", None]


def test_the_stand_in_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a\x1fb")
    with (
        pytest.raises(UserError, match=r"holds the character U\+001F; give it a delimiter of one character"),
        opened_text(tmp_path / "t", "utf-8", "::") as stream,
    ):
        stream.read(1 << 20)
