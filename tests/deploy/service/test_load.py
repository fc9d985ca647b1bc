"""One service under hundreds of clients, slow ones, too many, and at its end. The tests are in order."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.clients.http_load import load_report, start_load
from fmrl_dist.deploy.recommender import Recommender
from tests.fixtures.exports import random_export, write_random_export
from tests.fixtures.services import RunningService, running_service

pytestmark = pytest.mark.alone
CLIENTS = 200
TIMEOUT_S = 2
MAX_CONNECTIONS = 300
MAX_SESSIONS = 20
GROWTH_BYTES = 12 << 20  # of 5,000 requests


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_export(tmp_path_factory.mktemp("load") / "export", random_export(num_items=500))


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[RunningService]:
    limits = ("--timeout", TIMEOUT_S, "--max-connections", MAX_CONNECTIONS, "--max-sessions", MAX_SESSIONS)
    with running_service(export, *limits, "--threads", 2) as running:
        yield running


def request(number: int) -> tuple[str, str, Any]:
    """One of many different ones: of each size, of one history to three, with and without filters."""
    histories = [[f"i{(number * 7 + 3 * place) % 500}" for place in range(number % 9)]] * (1 + number % 3)
    body = {"histories": histories, "size": (4, 8, 16)[number % 3], "k": 1 + number % 12}
    return "POST", "/v1/recommend", body | ({"deny": ["i1", f"i{number % 500}"]} if number % 2 else {})


def samples(service: RunningService) -> dict[str, float]:
    """Sums over labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(service.get("/metrics").body.decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_hundreds_of_clients(service: RunningService, export: Path) -> None:
    """All are answered, in batches, with what the recommender says to each alone."""
    requests = [request(number) for number in range(CLIENTS)]
    report = load_report(start_load(service.address, requests, CLIENTS, 5 * CLIENTS, keep=CLIENTS))
    assert (report.statuses, report.lost, report.refused) == ({"200": 5 * CLIENTS}, 0, 0)
    recommenders = {size: Recommender.from_pretrained(export, size) for size in (4, 8, 16)}
    for (_, _, body), text in zip(requests, report.bodies, strict=True):
        options = {name: value for name, value in body.items() if name in ("k", "deny")}
        expected = recommenders[body["size"]].recommend(body["histories"], **options)
        for found, of_user in zip(json.loads(text)["recommendations"], expected, strict=True):
            assert [item["item_id"] for item in found] == [item.item_id for item in of_user]
            assert [item["score"] for item in found] == pytest.approx([item.score for item in of_user], 1e-5, 1e-5)
    figures = samples(service)
    users = sum(len(body["histories"]) for _, _, body in requests) * 5
    assert figures["fmrl_batch_users_sum"] == users
    assert figures["fmrl_batch_users_count"] < 5 * CLIENTS / 2, "they were answered together"


def test_memory_stays(service: RunningService) -> None:
    """Over requests of all kinds, among them mistakes, and more sessions than are kept."""
    requests = [request(number) for number in range(40)]
    requests += [("POST", "/v1/sessions", {"history": [f"i{number}"] * 9}) for number in range(20)]
    requests += [("POST", "/v1/state", {"observe": ["i1", "i2"]}), ("GET", "/v1/items?query=9", None)] * 5
    requests += [("POST", "/v1/recommend", {"histories": [["gone"]]}), ("GET", "/nowhere/12", None)] * 5
    process = psutil.Process(service.process.pid)
    assert load_report(start_load(service.address, requests, 16, 1000)).answered == 1000
    before = process.memory_info().rss
    report = load_report(start_load(service.address, requests, 16, 5000))
    assert report.answered == 5000 and set(report.statuses) == {"200", "201", "404", "422"}
    assert process.memory_info().rss - before < GROWTH_BYTES
    figures = samples(service)
    assert figures["fmrl_sessions"] == MAX_SESSIONS and figures["fmrl_crashes_total"] == 0
    assert figures["fmrl_sessions_ended_total"] >= 1000


HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"


def test_slow_clients_are_cut_off_and_keep_nobody_waiting(service: RunningService) -> None:
    """A head and a body that come byte by byte, and connections that send nothing at all."""
    parts = {b"GET /": b"a", HEAD + b"\r\n": b" ", b"": b""}  # what is sent at first, and then again and again
    with contextlib.ExitStack() as stack:
        slow = []
        for first, again in list(parts.items()) * 30:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 30))
            client.sendall(first)
            slow.append((client, again))
        began = time.monotonic()
        while time.monotonic() - began < TIMEOUT_S / 2:
            for client, again in slow:
                client.sendall(again)
            asked = time.monotonic()
            assert service.post("/v1/recommend", histories=[["i1"]]).status == 200
            assert time.monotonic() - asked < TIMEOUT_S
        for client, _ in slow:
            answer = b"".join(iter(lambda client=client: client.recv(65536), b""))  # type: ignore[misc]
            assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within 2 s" in answer
    assert samples(service)["fmrl_in_flight"] == 1


def test_too_many_connections(service: RunningService) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 30))
        last = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 30))
        answer = last.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in answer and b'{"error": "too many' in answer
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # until the service has noticed that they are gone
        with contextlib.suppress(OSError):
            if service.get("/health").status == 200:
                return
        time.sleep(0.05)
    pytest.fail("the service does not answer any more")


def test_term_loses_no_request(service: RunningService) -> None:
    """Every request that was read was answered, and its client has the answer; the exit code is a shell's for TERM."""
    before = samples(service)["fmrl_requests_total"]
    load = start_load(service.address, [request(number) for number in range(50)], 64, 10**6)
    asked = 1  # requests of this test itself
    deadline = time.monotonic() + 60
    while samples(service)["fmrl_requests_total"] < before + 500 and time.monotonic() < deadline:
        asked += 1
    code, stdout, stderr = service.end(signal.SIGTERM)
    report = load_report(load)
    assert (code, stderr) == (143, "ended by SIGTERM\n")
    assert report.lost == 0 and set(report.statuses) == {"200"} and report.answered >= 500
    assert report.refused == 64, "each client went on until nobody accepted it"
    assert stdout == f"{int(before) + asked + 1 + report.answered:,} requests answered\n"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", service.port), 5)
