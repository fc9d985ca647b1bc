"""A real HTTP server on the loopback that serves a folder by byte ranges, and misbehaves when a test says so."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FAULTS = ("drop", "half", "short", "flip", "stall", "500", "429")  # those that another try may mend


class StoreServer(ThreadingHTTPServer):
    """Serves ``folder`` at ``url``.

    ``requests`` lists the path and query of every request so far. ``faults`` are used up, one by one, by GET requests
    of files whose name contains ``faulty``; "forever" at the front keeps the next one there.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}/shop"
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.faulty = ".tar"
        self.authorization: str | None = None  # that every request must carry
        self.latency_s = 0.0  # of every answer
        self.most_at_once = self._now = 0  # requests
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def answering(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.latency_s)
        yield
        with self._lock:
            self._now -= 1

    def next_fault(self, name: str) -> str:
        with self._lock:
            if not self.faults or self.faulty not in name:
                return ""
            return self.faults[1] if self.faults[0] == "forever" else self.faults.pop(0)


class Handler(BaseHTTPRequestHandler):
    server: StoreServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer("")

    def do_GET(self) -> None:
        with self.server.answering():
            self._answer(self.server.next_fault(self.path))

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on stderr."""

    def _answer(self, fault: str) -> None:
        self.server.requests.append(self.path)
        file = self.server.folder / Path(urlsplit(self.path).path).name
        if fault == "stall":
            self.server.closing.wait()
        if fault in ("drop", "stall"):
            self.close_connection = True
            return
        if self.server.authorization not in (None, self.headers.get("Authorization")):
            fault = "401"
        if fault.isdigit() or not file.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(file.read_bytes(), fault)

    def _send(self, data: bytes, fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and fault != "whole":
            data = data[int(asked[1]) : int(asked[2]) + 1]
        if fault == "flip":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(206 if asked and fault != "whole" else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        if fault == "half":
            self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[StoreServer]:
    """A server of ``folder``, running until the block ends."""
    server = StoreServer(folder)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
