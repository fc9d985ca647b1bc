"""Many HTTP clients in one process, each on a connection of its own that it keeps: what they were answered, and when.

A client sends its next request when it has the answer to the one before. It is written on sockets, because a client
library would be slower than the service that it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import REPOSITORY

MAX_SECONDS = 120.0


@dataclass
class LoadReport:
    """What came of the requests."""

    seconds: float = 0.0
    milliseconds: list[float] = field(default_factory=list)  # of answered requests, in the order of their answers
    statuses: dict[str, int] = field(default_factory=dict)
    refused: int = 0  # connections that the service did not accept, or closed before their first answer
    lost: int = 0  # requests on a connection that had answered before, and then closed without an answer
    bodies: list[str] = field(default_factory=list)  # of the first ``keep`` requests, in their order

    @property
    def answered(self) -> int:
        return len(self.milliseconds)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.milliseconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class _Clients:
    def __init__(self, host: str, port: int, requests: Sequence[bytes], count: int, keep: int) -> None:
        self._address, self._requests, self._count = (host, port), requests, count
        self._numbers: Iterator[int] = itertools.count()
        self._kept: dict[int, str] = {}
        self._keep = keep
        self._statuses: Counter[str] = Counter()
        self.report = LoadReport()

    async def run(self, clients: int) -> LoadReport:
        began = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_SECONDS):
                await asyncio.gather(*(self._client() for _ in range(clients)))
        self.report.seconds = time.perf_counter() - began
        self.report.statuses = dict(self._statuses)
        self.report.bodies = [self._kept.get(number, "") for number in range(self._keep)]
        return self.report

    async def _client(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
            except OSError:
                self.report.refused += 1
                return
            try:
                if not await self._connection(reader, writer):
                    return
            finally:
                writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Requests on one connection until it closes; whether there are more to send."""
        for sent in itertools.count():
            number = next(self._numbers)
            if number >= self._count:
                return False
            began = time.perf_counter()
            try:
                writer.write(self._requests[number % len(self._requests)])
                status, closes, body = await _answer(reader)
            except (OSError, asyncio.IncompleteReadError):
                if sent:
                    self.report.lost += 1
                else:
                    self.report.refused += 1
                return False
            self.report.milliseconds.append(1000 * (time.perf_counter() - began))
            self._statuses[status] += 1
            if number < self._keep:
                self._kept[number] = body.decode()
            if closes:
                return True
        return True


async def _answer(reader: asyncio.StreamReader) -> tuple[str, bool, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return head[0].split(" ")[1], headers.get("connection", "") == "close", body


def request_bytes(method: str, path: str, body: Any = None) -> bytes:
    """A request as it is sent."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


def start_load(address: str, requests: Sequence[tuple[str, str, Any]], clients: int, count: int, keep: int = 0) -> Any:
    """A process whose clients send ``count`` of the requests, in turn; :func:`load_report` waits for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.clients.http_load", address, str(clients), str(count), str(keep)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(list(requests)))
    process.stdin.close()
    process.stdin = None
    return process


def load_report(process: Any) -> LoadReport:
    """What the clients of :func:`start_load` were answered."""
    output, _ = process.communicate(timeout=MAX_SECONDS + 30)
    return LoadReport(**json.loads(output))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="http://HOST:PORT")
    parser.add_argument("clients", type=int)
    parser.add_argument("count", type=int, help="requests of all clients together")
    parser.add_argument("keep", type=int, help="answers to report, of the first requests")
    arguments = parser.parse_args(argv)
    requests = [request_bytes(*words) for words in json.load(sys.stdin)]
    host, _, port = arguments.address.removeprefix("http://").rpartition(":")
    clients = _Clients(host, int(port), requests, arguments.count, arguments.keep)
    print(json.dumps(asdict(asyncio.run(clients.run(arguments.clients)))))


if __name__ == "__main__":
    main(sys.argv[1:])
