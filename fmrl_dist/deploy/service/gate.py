"""What stands before the app, as ASGI: who may ask, how much may come and for how long, how many at a time.

A body is received whole, within its limit and its time, before the request counts as in flight: a slow client keeps
nobody waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fmrl_dist.deploy.service.answers import error_answer
from fmrl_dist.deploy.service.metrics import ServiceMetrics
from fmrl_dist.deploy.service.settings import ServiceSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # each is a time series; others are one
OPEN_PATHS = ("/health", "/ready")  # without a token: load balancers have none; and however many are in flight
READ_AFTER_S, READ_AFTER_BYTES = 2.0, 64 << 20  # of a body that is refused, so that its sender reads the answer


class RefusedError(Exception):
    """A request that does not pass."""

    def __init__(self, status: int, error: str, drains: bool = False, **headers: str) -> None:
        super().__init__(error)
        self.status, self.error, self.drains, self.headers = status, error, drains, headers


class Gate:
    """The service as an ASGI app.

    Args:
        app: what answers requests that pass.
        settings: limits, token, names of this host.
        metrics: told of every request.
    """

    def __init__(self, app: App, settings: ServiceSettings, metrics: ServiceMetrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self.in_flight = self.num_answered = 0
        self.is_draining = False  # the service ends: each answer closes its connection
        self._buffered_bytes = 0  # of bodies that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.is_draining:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            await self._pass(scope, receive, send_noted)
        except RefusedError as refusal:
            answer = error_answer(refusal.status, refusal.error, connection="close", **refusal.headers)
            await answer(scope, receive, send_noted if not refusal.drains else _unfinished(receive, send_noted))
        except asyncio.CancelledError:  # the service ends, and its time for requests in flight is over
            if not status:
                answer = error_answer(503, "the service ends", connection="close", retry_after="1")
                await answer(scope, receive, send_noted)
        except Exception as error:  # the app has answered 500 already
            self._metrics.note_crash()
            sys.stderr.write("".join(traceback.format_exception(error)))
            if not status:
                await error_answer(500, "the service failed; its log says why")(scope, receive, send_noted)
        finally:
            if status:
                route = getattr(scope.get("route"), "path", "unknown")
                method = scope["method"] if scope["method"] in METHODS else "other"
                self.num_answered += 1
                self._metrics.note_request(method, route, status, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_host(headers)
        if scope["path"] not in OPEN_PATHS:
            self._check_token(headers)
        body = await self._body(headers, receive)
        if body is None:
            return
        if scope["path"] in OPEN_PATHS:  # a busy process lives, and is not to be restarted for it
            await self._app(scope, _received(body, receive), send)
            return
        if self.in_flight >= self._settings.max_in_flight:
            raise RefusedError(
                503, f"{self.in_flight} requests are in flight, the most that are; try again", retry_after="1"
            )
        self.in_flight += 1
        try:
            await self._app(scope, _received(body, receive), send)
        finally:
            self.in_flight -= 1

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site whose name leads here (DNS rebinding) must not use a service without a token."""
        hosts = self._settings.hosts
        name = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if hosts is not None and name not in hosts:
            raise RefusedError(
                400, f"Host is {name!r:.80}; this service is {', '.join(sorted(hosts))} (see --allow-host)", True
            )

    def _check_token(self, headers: dict[bytes, bytes]) -> None:
        token = self._settings.token
        if token is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        is_right = hmac.compare_digest(given.strip(), token.encode())
        if scheme.lower() != b"bearer" or not is_right:
            raise RefusedError(
                401, "a token is needed: send Authorization: Bearer TOKEN", True, www_authenticate="Bearer"
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """A request's body; None if its client has gone."""
        limit = self._settings.max_body_bytes
        announced = headers.get(b"content-length", b"0")  # digits, or the server has refused it
        if len(announced) > 18 or int(announced) > limit:
            raise self._too_large()
        if not int(announced) and b"transfer-encoding" not in headers:
            return b""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._buffered_bytes += len(parts[-1])
                    if size > limit:
                        raise self._too_large()
                    if self._buffered_bytes > self._settings.max_buffered_bytes:
                        raise RefusedError(503, "too much is being received; try again", True, retry_after="1")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RefusedError(408, f"the body did not come within {self._settings.body_timeout_s:g} s") from None
        finally:
            self._buffered_bytes -= size

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the body is larger than {self._settings.max_body_bytes} bytes", drains=True)


def _received(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that hands out a body, once."""
    is_read = False

    async def receive_once() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_once


def _unfinished(receive: Receive, send: Send) -> Send:
    """A ``send`` that reads on before it ends the answer.

    A connection that is closed with unread data is reset, and its client may never see what was answered.
    """

    async def send_and_read(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        left = READ_AFTER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READ_AFTER_S):
                while left > 0:
                    part = await receive()
                    left -= len(part.get("body", b""))
                    if part["type"] == "http.disconnect" or not part.get("more_body", False):
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return send_and_read


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.partition(":")[0].lower()
