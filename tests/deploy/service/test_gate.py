"""Who passes the gate, how many at a time; and clients that never read their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.service.answers import json_answer
from fmrl_dist.deploy.service.app import build_service_app
from fmrl_dist.deploy.service.gate import OPEN_PATHS, Gate, Message, Receive, Scope, Send
from fmrl_dist.deploy.service.metrics import ServiceMetrics
from fmrl_dist.deploy.service.server import GracefulServer, listen
from fmrl_dist.deploy.service.service import Service
from fmrl_dist.deploy.service.settings import ServiceSettings
from tests.fixtures.exports import ids_of, random_export, vocabulary_bytes

TOKEN = "0123456789abcdef"


def gate_of(app: Callable[[Scope, Receive, Send], Awaitable[None]], **limits: Any) -> Gate:
    return Gate(app, ServiceSettings(**limits), ServiceMetrics())


Answered = tuple[int, dict[bytes, bytes], bytes]  # status, headers, body


async def ask(gate: Gate, *parts: bytes, path: str = "/", method: str = "POST", **headers: str) -> Answered:
    """A request whose body comes in parts; each takes a turn of the event loop."""
    left, sent = list(parts), list[Message]()
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": left.pop(0) if left else b"", "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    if parts:
        named.append((b"transfer-encoding", b"chunked"))
    await gate({"type": "http", "method": method, "path": path, "headers": named, "query_string": b""}, receive, send)
    assert sent[0]["type"] == "http.response.start" and not sent[-1].get("more_body", False)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(each.get("body", b"") for each in sent[1:])


async def answer_ok(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await json_answer(body.decode())(scope, receive, send)


def test_requests_beyond_the_limit_are_asked_to_come_again() -> None:
    async def run() -> None:
        may_answer = asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> None:
            await may_answer.wait()
            await answer_ok(scope, receive, send)

        gate = gate_of(wait, max_in_flight=2)
        waiting = [asyncio.create_task(ask(gate)) for _ in range(2)]
        await asyncio.sleep(0.01)
        status, headers, body = await ask(gate)
        assert (status, headers[b"retry-after"]) == (503, b"1") and b"2 requests are in flight" in body
        open_paths = [asyncio.create_task(ask(gate, path=path)) for path in OPEN_PATHS]
        await asyncio.sleep(0.01)
        assert gate.in_flight == 2, "load balancers are answered beyond the limit"
        may_answer.set()
        assert [status for status, _, _ in await asyncio.gather(*waiting, *open_paths)] == [200] * 4
        assert (await ask(gate))[0] == 200 and gate.in_flight == 0

    asyncio.run(run())


def test_a_body_is_counted_while_it_comes() -> None:
    gate = gate_of(answer_ok, max_body_bytes=10)
    assert asyncio.run(ask(gate, b"12345", b"67890"))[::2] == (200, b'"1234567890"')
    assert asyncio.run(ask(gate, b"12345", b"67890", b"1"))[0] == 413
    assert asyncio.run(ask(gate, content_length="11"))[0] == 413
    assert asyncio.run(ask(gate, content_length="9" * 30))[0] == 413
    gate = gate_of(answer_ok, max_buffered_bytes=4)
    assert asyncio.run(ask(gate, b"123", b"45"))[0] == 503
    assert asyncio.run(ask(gate, b"12", b"34"))[0] == 200, "what was refused is counted no more"


def test_the_token() -> None:
    gate = gate_of(answer_ok, token=TOKEN)
    for given in (None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xff"):
        headers = {} if given is None else {"authorization": given}
        status, answered, body = asyncio.run(ask(gate, **headers))
        assert (status, answered[b"www-authenticate"]) == (401, b"Bearer") and TOKEN.encode() not in body
    assert asyncio.run(ask(gate, authorization=f"bearer {TOKEN}"))[0] == 200
    assert asyncio.run(ask(gate, path="/health"))[0] == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "LOCALHOST", "[::1]:80", "127.0.0.1"])
def test_names_of_this_host(host: str) -> None:
    gate = gate_of(answer_ok, hosts=frozenset({"localhost", "::1", "127.0.0.1"}))
    assert asyncio.run(ask(gate, host=host))[0] == 200
    assert asyncio.run(ask(gate, host=f"not-{host}"))[0] == 400
    assert asyncio.run(ask(gate))[0] == 400


def test_a_crash_is_answered_without_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    async def crash(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret")

    gate = gate_of(crash)
    status, _, body = asyncio.run(ask(gate))
    assert (status, body) == (500, b'{"error":"the service failed; its log says why"}')
    assert "KeyError: 'secret'" in capsys.readouterr().err and gate.in_flight == 0


def test_at_the_end_each_answer_closes_its_connection() -> None:
    gate = gate_of(answer_ok)
    assert b"connection" not in asyncio.run(ask(gate))[1]
    gate.is_draining = True
    status, headers, _ = asyncio.run(ask(gate))
    assert (status, headers[b"connection"]) == (200, b"close")


def test_who_is_cut_off_at_the_end_is_asked_to_come_again() -> None:
    async def run() -> None:
        async def never(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.Event().wait()

        waiting = asyncio.create_task(ask(gate_of(never)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        status, headers, body = await waiting
        assert (status, headers[b"retry-after"], body) == (503, b"1", b'{"error":"the service ends"}')

    asyncio.run(run())


def test_ready_turns_at_the_end() -> None:
    exported = random_export()
    vocabulary = ItemVocabulary(vocabulary_bytes(ids_of(len(exported.items))), "vocab.parquet")
    service = Service(exported, vocabulary, [8], ServiceSettings())
    gate = build_service_app(service)
    assert asyncio.run(ask(gate, path="/ready", method="GET"))[0] == 200
    gate.is_draining = True
    status, headers, _ = asyncio.run(ask(gate, path="/ready", method="GET"))
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert asyncio.run(ask(gate, path="/health", method="GET"))[0] == 200
    service.close()


def test_a_client_that_does_not_read_is_cut_off() -> None:
    """Its answer is larger than what the kernel takes."""

    async def answer_much(scope: Scope, receive: Receive, send: Send) -> None:
        await json_answer("x" * (32 << 20))(scope, receive, send)

    async def run() -> None:
        settings = ServiceSettings(write_timeout_s=0.3)
        listener = listen("127.0.0.1", 0, settings)
        server = GracefulServer(gate_of(answer_much), settings, lambda: None)
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup([listener])
        _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(30):
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            while server.server_state.connections:
                await asyncio.sleep(0.01)
        writer.close()
        await server.shutdown([listener])

    asyncio.run(run())
