"""uvicorn, made patient with nobody: clients that are slow to send or to read are cut off, and TERM loses no request.

At TERM or INT the service still accepts and answers for a moment, each answer closing its connection, while load
balancers see it is not ready; then it refuses new connections, finishes what is in flight and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from fmrl_dist.base.command_start import taken_signals
from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.service.gate import Gate
from fmrl_dist.deploy.service.settings import ServiceSettings

HEAD_BYTES = 16 << 10  # of a request's first lines
HEAD_TOO_LONG = 431  # as an HTTP status
BACKLOG = 2048
LAST_REQUESTS_S = 0.25  # at the end, for requests that are on their way
MAX_CONNECTIONS, FILES_BESIDE_CONNECTIONS = 4096, 64


class HurriedProtocol(H11Protocol):
    """A connection with time limits for a request's head and for reading an answer.

    A body's limit is the gate's.
    """

    def __init__(self, settings: ServiceSettings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self._refuse(503, "too many connections; try again", ((b"retry-after", b"1"),))
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching_head()
        self._stop_watching_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        is_waiting = self.cycle is None or self.cycle.response_complete
        if not is_waiting or self.transport.is_closing():
            self._stop_watching_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._settings.head_timeout_s, self._head_is_late)

    def _stop_watching_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the request did not come within {self._settings.head_timeout_s:g} s")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._settings.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching_reader()

    def _stop_watching_reader(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()  # that uvicorn answers
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == HEAD_TOO_LONG:
            self._refuse(HEAD_TOO_LONG, f"the request's first lines (address and headers) exceed {HEAD_BYTES} bytes")
        else:
            self._refuse(400, "this is no HTTP request")

    def _unsupported_upgrade_warning(self) -> None:
        """Answered as the plain request that it also is."""

    def _refuse(self, status: int, error: str, more: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *more,
        ]
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        with contextlib.suppress(h11.LocalProtocolError):  # in the middle of another answer
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


class GracefulServer(uvicorn.Server):
    """uvicorn, ending as commands of ours do: with the signal's exit code, after everything in flight.

    Args:
        gate: the service.
        settings: its limits.
        on_start: called once requests are accepted.
    """

    def __init__(self, gate: Gate, settings: ServiceSettings, on_start: Callable[[], None]) -> None:
        protocol = functools.partial(HurriedProtocol, settings)
        super().__init__(
            uvicorn.Config(
                gate,
                loop="asyncio",
                http=cast(type[asyncio.Protocol], protocol),
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=settings.grace_s,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self._gate, self._on_start = gate, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.is_draining = True
        await asyncio.sleep(LAST_REQUESTS_S)  # connections that are kept open end with an answer
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_REQUESTS_S)  # the last ones that were accepted send their request
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals of :func:`taken_signals` end the service in order; then the first has its usual effect."""
        before = {number: signal.signal(number, self.handle_exit) for number in taken_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._captured_signals:
            signal.raise_signal(self._captured_signals[0])


def listen(host: str, port: int, settings: ServiceSettings) -> socket.socket:
    """A listening socket.

    Args:
        host: name or address of this machine.
        port: 0 for any that is free.
        settings: how many connections to expect, and how long a client may not read.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host} cannot be listened at ({error.strerror}); choose an address of this machine"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the kernel's own limit, for what a connection's end leaves unsent
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.write_timeout_s))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"port {port} of {host} cannot be listened at ({error.strerror}); choose another with --port"
        ) from None
    return listener


def allowed_connections(wanted: int | None) -> int:
    """How many connections to allow; this process' limit of open files is raised to that.

    Args:
        wanted: so many; None for :data:`MAX_CONNECTIONS`, or fewer if the process may not open so many files.

    Raises:
        UserError: it may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(hard - FILES_BESIDE_CONNECTIONS, 1) if hard != resource.RLIM_INFINITY else MAX_CONNECTIONS
    connections = min(MAX_CONNECTIONS, most) if wanted is None else wanted
    if connections > most and hard != resource.RLIM_INFINITY:
        raise UserError(
            f"this process may open {hard} files, too few for --max-connections {wanted}; raise ulimit -n, or choose "
            f"--max-connections {most}"
        )
    files = connections + FILES_BESIDE_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return connections
