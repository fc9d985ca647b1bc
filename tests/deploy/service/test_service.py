"""The service as clients see it: the recommender's own lists, sessions of both kinds, items, one line for mistakes."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from prometheus_client.parser import text_string_to_metric_families

from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.service.item_search import ItemSearch
from tests.fixtures.exports import random_export, random_model, vocabulary_bytes, write_random_export
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.services import RunningService, running_service

SIZES = (4, 8, 16)
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_export(tmp_path_factory.mktemp("service") / "export")


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[RunningService]:
    limits = ("--max-k", 50, "--max-history", 40, "--max-histories", 8, "--max-answer-items", 200)
    with running_service(export, *limits, "--max-body", MAX_BODY, "--threads", 2) as running:
        yield running


@pytest.fixture(scope="module")
def recommenders(export: Path) -> dict[int, Recommender]:
    return {size: Recommender.from_pretrained(export, size) for size in SIZES}


def listed(found: list) -> list[dict[str, Any]]:
    return [item._asdict() for item in found]


@pytest.mark.parametrize("size", [*SIZES, None])
def test_recommend_is_the_recommenders(
    service: RunningService, recommenders: dict[int, Recommender], size: int | None
) -> None:
    """To the last digit: a request that nobody waits beside is a batch of its own."""
    expected = recommenders[size or 16]
    several = [["i3", "i14"], [], ["i5"] * 9, [f"i{item}" for item in range(20)]]
    cases: list[tuple[list[list[str]], dict[str, Any]]] = [
        ([["i3", "i14"]], {}),
        (several, {"k": 50, "exclude_seen": False}),
        (several, {"k": 3, "allow": ["i1", "i2", "i3", "i4"], "deny": ["i2"]}),
        (several, {"allow": [["i1"], None, [], ["i29", "i1"]], "deny": [None, ["i3"], None, ["i29"]]}),
        ([["gone", "i1"]], {"unknown": "skip", "deny": ["gone"]}),
        ([], {}),
    ]
    for histories, options in cases:
        answer = service.post("/v1/recommend", histories=histories, size=size, **options)
        assert answer.status == 200, answer.body
        lists = expected.recommend(histories, **options)
        assert answer.json == {"size": size or 16, "recommendations": [listed(found) for found in lists]}


@pytest.mark.parametrize("size", SIZES)
def test_sessions_of_the_service_and_of_the_client(
    service: RunningService, recommenders: dict[int, Recommender], size: int
) -> None:
    """Both are the recommender's, event by event, and each can go on as the other."""
    expected = recommenders[size].session(["i1"])
    opened = service.post("/v1/sessions", size=size, history=["i1"])
    path = f"/v1/sessions/{opened.json['session_id']}"
    kept: dict[str, Any] = service.post("/v1/state", size=size, observe=["i1"]).json
    for items in (["i2"], [f"i{item}" for item in range(30)], ["i2", "i7"]):
        for item in items:
            expected.observe(item)
        observed = service.post(f"{path}/observe", items=items)
        assert observed.json == {**opened.json, "num_events": expected.num_events}
        kept = service.post("/v1/state", state=kept["state"], observe=items, k=4, exclude_seen=False).json
        found = service.get(f"{path}/recommend?k=4&exclude_seen=false").json
        assert found["recommendations"] == kept["recommendations"] == listed(expected.recommend(4, exclude_seen=False))
        assert service.get(path).json["state"] == kept["state"]
        numbers = np.frombuffer(base64.b64decode(kept["state"]), "<f4")
        np.testing.assert_array_equal(numbers, expected.state())
    found = service.get(f"{path}/recommend?deny=i3&deny=i4&allow=i3&allow=i5&exclude_seen=0").json
    assert found["recommendations"] == listed(expected.recommend(10, False, ["i3", "i5"], ["i3", "i4"]))
    other = service.post("/v1/sessions", state=kept["state"], history=["i9"]).json
    expected.observe("i9")
    assert (other["size"], other["num_events"]) == (size, expected.num_events)
    assert service.ask("DELETE", path).status == 204
    for method, where in [("GET", path), ("DELETE", path), ("GET", f"{path}/recommend")]:
        gone = service.ask(method, where)
        assert gone.status == 404 and gone.error.startswith(f"there is no session '{opened.json['session_id']}'")


def test_a_session_before_its_first_event(service: RunningService, recommenders: dict[int, Recommender]) -> None:
    assert service.post("/v1/state").json["recommendations"] == listed(recommenders[16].session().recommend(10))
    assert service.post("/v1/state", k=0).json["recommendations"] == []


def test_nothing_is_observed_of_an_unknown_item(service: RunningService) -> None:
    path = f"/v1/sessions/{service.post('/v1/sessions').json['session_id']}"
    refused = service.post(f"{path}/observe", items=["i1", "gone"])
    assert refused.status == 422 and "'gone'" in refused.error
    assert service.get(path).json["num_events"] == 0
    assert service.post(f"{path}/observe", items=["i1", "gone"], unknown="skip").json["num_events"] == 1


def test_items(service: RunningService) -> None:
    found = service.get("/v1/items?query=TITLE%20i2&limit=3").json["items"]
    assert found == [{"item_id": f"i{item}", "title": f"title of i{item}"} for item in (2, 20, 21)], (
        "most popular first"
    )
    assert service.get("/v1/items?limit=1").json["items"][0]["item_id"] == "i0"
    assert service.get("/v1/items?query=nothing").json == {"items": []}
    assert service.get("/v1/items/i7").json == {"item_id": "i7", "title": "title of i7"}
    missing = service.get("/v1/items/..%2F..%2Fetc%2Fpasswd")
    assert missing.status == 404 and missing.error == "there is no item '../../etc/passwd'; ids are like 'i0'"


def test_removed_items_are_not_found() -> None:
    vocabulary = ItemVocabulary(vocabulary_bytes([7, 8, -9], titles=False), "vocab.parquet")
    vocabulary.removed = np.array([1])
    search = ItemSearch(vocabulary)
    assert search.rows("", 5) == [0, 2] and search.rows("8", 5) == [] and search.rows("9", 5) == [2]
    assert [search.id_of(text) for text in ("7", "-9", "07", "x", "1" * 30)] == [7, -9, "07", "x", "1" * 30]


ONE = b'{"histories": [["i1"]], '
WRONG: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/v1/recommend", {}, 422, "body.histories: Field required"),
    ("POST", "/v1/recommend", {"histories": [["x"], ["i1"]]}, 422, "1 of 1 ids are of no item, such as 'x'; ids are"),
    ("POST", "/v1/recommend", {"histories": [["i1"]], "k": 51}, 422, "k is 51; at most 50 items are answered"),
    (
        "POST",
        "/v1/recommend",
        {"histories": [[]] * 5, "k": 41},
        422,
        "k is 41 for 5 histories; at most 200 items are answered at once: send fewer histories or a smaller k",
    ),
    ("POST", "/v1/recommend", {"histories": [["i1"]], "k": 0}, 422, "body.k: Input should be greater than or equal to"),
    (
        "POST",
        "/v1/recommend",
        {"histories": [["i1"]], "k": True},
        422,
        "body.k: Input should be a valid integer, found",
    ),
    (
        "POST",
        "/v1/recommend",
        {"histories": [["i1"]], "size": 5},
        422,
        "size 5 is not served; expected one of [4, 8, 16",
    ),
    ("POST", "/v1/recommend", {"histories": [["i1"]], "K": 5}, 422, "body.K: Extra inputs are not permitted"),
    ("POST", "/v1/recommend", {"histories": ["i1"]}, 422, "body.histories.0: Input should be a valid list, found 'i1'"),
    ("POST", "/v1/recommend", {"histories": [["i1"] * 41]}, 422, "41 events of a history; expected at most 40"),
    ("POST", "/v1/recommend", {"histories": [[]] * 9}, 422, "9 histories; expected at most 8"),
    (
        "POST",
        "/v1/recommend",
        {"histories": [[]], "deny": [[], []]},
        422,
        "deny has 2 lists; expected one for each of 1",
    ),
    ("POST", "/v1/recommend", {"histories": [["\ud800"]]}, 422, "1 of 1 ids are of no item, such as '\\ud800'"),
    ("POST", "/v1/recommend", ONE + b'"k": NaN}', 400, "the body is not JSON: NaN is no number"),
    ("POST", "/v1/recommend", ONE + b'"k": -Infinity}', 400, "the body is not JSON: -Infinity is no number"),
    ("POST", "/v1/recommend", ONE + b'"k": 1e999}', 400, "the body is not JSON: 1e999 is no number"),
    ("POST", "/v1/recommend", ONE + b'"k": ' + b"9" * 5000 + b"}", 400, "the body is not JSON: Exceeds the limit"),
    ("POST", "/v1/recommend", ONE + b'"k": ' + b"9" * 4000 + b"}", 422, "k is 999"),
    ("POST", "/v1/recommend", b"[" * 15_000, 400, "the body is nested too deeply"),
    ("POST", "/v1/recommend", b"\xff\xfe", 400, "the body is not UTF-8 text"),
    ("POST", "/v1/recommend", b"{", 400, "the body is not JSON: Expecting property name"),
    ("POST", "/v1/recommend", b" " * (MAX_BODY + 1), 413, f"the body is larger than {MAX_BODY} bytes"),
    ("POST", "/v1/recommend", b" " * 5_000_000, 413, f"the body is larger than {MAX_BODY} bytes"),
    (
        "POST",
        "/v1/sessions",
        {"size": 8, "history": [1]},
        422,
        "1 of 1 ids are of no item, such as 1; ids are like 'i0'",
    ),
    ("POST", "/v1/sessions", {"state": "/etc/passwd"}, 422, "state is not base64 of little-endian float32 numbers"),
    ("POST", "/v1/state", {"state": "AAAA"}, 422, "state is not base64 of little-endian float32 numbers"),
    ("POST", "/v1/state", {"state": ""}, 422, "ndarray is no state of a session"),
    ("POST", "/v1/state", {"state": "A" * 400}, 422, "the array is no state of a session"),
    ("POST", "/v1/sessions/abc/observe", {"items": []}, 404, "there is no session 'abc': it never was"),
    ("GET", "/v1/sessions/abc/recommend?k=x", None, 422, "query.k: Input should be a valid integer"),
    ("GET", "/v1/items?limit=51", None, 422, "limit is 51; at most 50 items are answered"),
    ("GET", "/v1/items/gone", None, 404, "there is no item 'gone'; ids are like 'i0'"),
    ("GET", "/v1/nothing", None, 404, "there is no '/v1/nothing'; /docs lists what there is"),
    ("PUT", "/v1/recommend", {}, 405, "'/v1/recommend' does not take 'PUT'; /docs lists what there is"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "error"), WRONG)
def test_mistakes_get_one_line(
    service: RunningService, method: str, path: str, body: Any, status: int, error: str
) -> None:
    answer = service.ask(method, path, body)
    assert (answer.status, answer.error[: len(error)]) == (status, error)
    assert list(answer.json) == ["error"] and "\n" not in answer.error and len(answer.error) <= 500
    assert answer.headers["content-type"] == "application/json"


def test_every_status_is_documented(service: RunningService) -> None:
    assert service.ask("PUT", "/v1/recommend", {}).headers["allow"] == "POST"
    page = (REPOSITORY / "docs" / "serving.md").read_text("utf-8")
    described = set(service.get("/openapi.json").json["paths"]["/v1/recommend"]["post"]["responses"]) - {"200"}
    named = set(re.findall(r"\b[45]\d\d\b", page.partition("**Mistakes**")[2].partition("NaN and")[0]))
    assert named == described >= {str(status) for *_, status, _ in WRONG} | {"401", "408", "431", "503"}


def test_a_state_is_checked(service: RunningService, recommenders: dict[int, Recommender]) -> None:
    """As Session.restore does; numbers that overflow later are refused, too, and the next request is answered."""
    for change, error in [
        (lambda state: state[:-1], "it is cut or damaged"),
        (lambda state: np.append(state[:-1], np.nan), "the state is damaged"),
        (lambda state: np.append(state[:-1], 9), "the state is damaged"),
        (lambda state: np.concatenate((state[:1], [3.0], state[2:])), "the state has version 3"),
        (lambda state: np.concatenate((state[:30], np.full(len(state) - 32, 3e38), state[-2:])), ""),
    ]:
        state = change(recommenders[8].session(["i4"]).state()).astype("<f4")
        answer = service.post("/v1/state", state=base64.b64encode(state.tobytes()).decode(), observe=["i1"])
        assert answer.status == 422 and error in answer.error
    state = base64.b64encode(recommenders[8].session(["i4"]).state().astype("<f4").tobytes()).decode()
    assert service.post("/v1/state", state=state).status == 200
    assert "the state is of another model: size 8" in service.post("/v1/state", state=state, size=4).error


def test_a_body_must_say_that_it_is_json(service: RunningService) -> None:
    """So that a page of another site cannot post to a service on its visitor's machine without asking first."""
    body = json.dumps({"histories": [["i1"]]}).encode()
    assert service.ask("POST", "/v1/recommend", body, content_type="text/plain").status == 422
    asked = service.ask("OPTIONS", "/v1/recommend", Origin="http://elsewhere", Access_Control_Request_Method="POST")
    assert asked.status == 405 and not [name for name in asked.headers if name.lower().startswith("access-control")]


def test_another_name_for_this_host_is_refused(service: RunningService) -> None:
    answer = service.ask("GET", "/v1/model", Host="attacker.example")
    assert answer.status == 400 and answer.error.startswith("Host is 'attacker.example'; this service is")
    assert service.ask("GET", "/v1/model", Host=f"localhost:{service.port}").status == 200


def test_operation(service: RunningService) -> None:
    assert service.get("/health").json == {"status": "ok"}
    assert service.get("/ready").json == {"status": "ready"}
    model = service.get("/v1/model").json
    assert (model["sizes"], model["default_size"], model["num_items"], model["max_k"]) == ([4, 8, 16], 16, 30, 50)
    assert model["max_answer_items"] == 200
    service.post("/v1/recommend", histories=[["i1"]] * 3, size=4)
    service.ask("BREW", "/v1/recommend")
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(service.get("/metrics").body.decode())
        for sample in family.samples
    }
    names = {name for name, _ in samples}
    assert {"fmrl_sessions", "fmrl_batch_users_bucket", "process_resident_memory_bytes"} <= names

    def sample(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert sample("fmrl_in_flight") == 1, "this request"
    assert sample("fmrl_crashes_total") == 0
    assert sample("fmrl_batch_users_sum", size="4") >= 3
    assert sample("fmrl_requests_total", method="POST", route="/v1/recommend", status="200") >= 1
    assert sample("fmrl_request_seconds_count", route="/v1/recommend") >= 1
    routes = {value for _, labels in samples for name, value in labels if name == "route"}
    assert routes <= {"unknown", *service.get("/openapi.json").json["paths"], "/v1/items/{item_id:path}"}
    methods = {value for _, labels in samples for name, value in labels if name == "method"}
    assert "other" in methods and "BREW" not in methods


def test_no_page_loads_anything(service: RunningService) -> None:
    page = service.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = page.body.decode()
    assert "/v1/recommend" in text and not re.search(r"<script|<link|<img|@import|url\(|https?://", text)


def test_what_is_not_http(service: RunningService) -> None:
    for data in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"\x16\x03\x01" * 50):
        with socket.create_connection(("127.0.0.1", service.port), 20) as client:
            client.sendall(data)
            answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'{"error": "this is no HTTP request"}' in answer
    for data in (b"GET /" + b"x" * 20_000, b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"x" * 20_000):
        with socket.create_connection(("127.0.0.1", service.port), 20) as client:
            client.sendall(data)
            answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert b'{"error": "the request\'s first lines (address and headers) exceed 16384 bytes"}' in answer
    with socket.create_connection(("127.0.0.1", service.port), 20) as client:
        client.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert service.get("/health").status == 200


def test_a_websocket_is_not_spoken(service: RunningService) -> None:
    headers = {
        "Connection": "upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "AAAA",
        "Sec_WebSocket_Version": "13",
    }
    assert service.ask("GET", "/v1/nothing", **headers).status == 404


def test_schemathesis_finds_no_server_error(service: RunningService, tmp_path: Path) -> None:
    """Requests drawn from the service's own schema, within it and beyond; answers are as it says."""
    pytest.importorskip("schemathesis", reason="the dev extra is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = ("--max-examples", "25", "--max-time", "20", "--phases", "examples,coverage,fuzzing", "--seed", "1")
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{service.address}/openapi.json"]
    ended = subprocess.run(
        [*command, "--checks", checks, *words, "--no-color"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "fmrl_crashes_total 0.0" in service.get("/metrics").body.decode()


@pytest.mark.parametrize("mixer", ["attention", "bidirectional"])
def test_a_model_without_a_state_answers_as_it_does_for_whole_histories(mixer: str, tmp_path: Path) -> None:
    """Histories, sessions that the service keeps, and sessions that the client keeps."""
    exported = random_export(random_model(mixer=mixer))
    export = write_random_export(tmp_path / "export", exported)
    expected = Recommender.from_pretrained(export, 8).recommend([["i3", "i14"], []], 4)
    with running_service(export) as running:
        answer = running.post("/v1/recommend", histories=[["i3", "i14"], []], size=8, k=4)
        assert answer.status == 200 and answer.json["recommendations"] == [listed(found) for found in expected]
        kept = running.post("/v1/sessions", history=["i3"], size=8)
        assert kept.status == 201
        address = f"/v1/sessions/{kept.json['session_id']}"
        assert running.post(f"{address}/observe", items=["i14"]).json["num_events"] == 2
        state = running.post("/v1/state", observe=["i3"], size=8, k=0).json["state"]
        answers = (
            running.get(f"{address}/recommend?k=4"),
            running.post("/v1/state", state=state, observe=["i14"], k=4),
        )
        for answer in answers:
            found = answer.json["recommendations"]
            assert [item["item_id"] for item in found] == [item.item_id for item in expected[0]]
            assert [item["score"] for item in found] == pytest.approx([item.score for item in expected[0]], rel=1e-5)
