"""HTTP answers that are read up to what was asked for: a server may send more than a range, or never end a file."""

from __future__ import annotations

import re
from typing import Any

import aiohttp

from fmrl_dist.base.parquet import memory_bytes
from fmrl_dist.data.store.files import FinalError

RANGE = re.compile(r"bytes=(\d+)-(\d+)", re.ASCII)


class BoundedResponse(aiohttp.ClientResponse):
    """An answer whose body is no longer than the range of its request; a whole file, than half of the memory."""

    async def read(self) -> bytes:
        """The body.

        Raises:
            FinalError: there is more; nothing further is read.
        """
        if self._body is None:
            asked = RANGE.fullmatch(self.request_info.headers.get("Range", ""))
            limit = int(asked[2]) - int(asked[1]) + 1 if asked else memory_bytes() // 2
            pieces, left = [], limit
            async for piece in self.content.iter_any():
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    self.close()
                    what = f"a range of {limit:,}; the server must serve ranges" if asked else f"at most {limit:,}"
                    raise FinalError(f"cannot be fetched: more bytes came than {what}")
            self._body = b"".join(pieces)
        return self._body


async def bounded_client(**settings: Any) -> aiohttp.ClientSession:
    """A session with such answers, for fsspec's ``get_client``."""
    return aiohttp.ClientSession(response_class=BoundedResponse, **settings)
