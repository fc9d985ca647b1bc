"""The command: whom it serves, what it refuses before it listens, how it ends."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from tests.fixtures.commands import run_main
from tests.fixtures.exports import write_random_export
from tests.fixtures.services import running_service

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_export(tmp_path_factory.mktemp("command") / "export")


def refusal(*words: object) -> str:
    ended = run_main("fmrl_dist.serve", *words)
    assert (ended.code, ended.stderr.count("\n")) == (2, 1), ended
    return ended.stderr


@pytest.mark.timeout(60)
def test_refusals(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT", "secret")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, complaint in [
            (("--host", "0.0.0.0"), "--host 0.0.0.0 serves other machines: name an environment variable with a token"),
            (("--token-env", "SHORT"), "the environment variable SHORT of --token-env holds 6 characters; expected a"),
            (("--token-env", "NONE"), "the environment variable NONE of --token-env holds 0 characters; expected a"),
            (("--token-env", "SHORT", "--no-token"), "--token-env and --no-token contradict each other; choose one"),
            (("--max-k", 0), "--max-k is 0; expected 1 or more"),
            (("--timeout", "nan"), "--timeout is nan; expected 1 or more"),
            (("--retrieval", "funnel", "--recall", 2), "recall is 2.0; expected"),
            (("--sizes", 5), "size 5 is not one of this export; expected one of [4, 8, 16]"),
            (("--port", taken.getsockname()[1]), f"port {taken.getsockname()[1]} of 127.0.0.1 cannot be listened at"),
            (("--port", 70_000), "--port is 70000; expected at most 65535"),
            (("--host", "192.0.2.1", "--no-token"), "port 0 of 192.0.2.1 cannot be listened at"),
            (("--host", "no such host", "--no-token"), "--host no such host cannot be listened at"),
            (("--max-connections", 10**9), "too few for --max-connections 1000000000; raise ulimit -n"),
        ]:
            assert complaint in refusal(export, "--port", 0, *words)
    assert "is neither a folder nor the id of a repository" in refusal(tmp_path / "none", "--port", 0)


def test_the_extra_is_named(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fmrl_dist.deploy.service")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert refusal(export) == "error: the service needs fastapi, of the extra serve: pip install 'fmrl-dist[serve]'\n"


def test_one_size_for_others_with_a_token_until_an_interrupt(export: Path) -> None:
    words = ("--host", "0.0.0.0", "--token-env", "MY_TOKEN", "--sizes", 8)
    with running_service(export, *words, "--retrieval", "funnel", MY_TOKEN=TOKEN) as service:
        for path in ("/v1/model", "/docs", "/metrics", "/page/"):
            assert service.get(path).error == "a token is needed: send Authorization: Bearer TOKEN"
        assert service.get("/ready").status == 200
        given = {"Authorization": f"Bearer {TOKEN}", "Host": "any.example"}
        assert service.ask("GET", "/v1/model", **given).json["retrieval"] == "funnel"
        assert service.ask("GET", "/v1/model", **given).json["sizes"] == [8]
        assert service.ask("POST", "/v1/recommend", {"histories": [["i1"]]}, **given).json["size"] == 8
        assert TOKEN not in " ".join(Path(f"/proc/{service.process.pid}/cmdline").read_text().split("\0"))
        assert service.end(signal.SIGINT) == (130, "8 requests answered\n", "ended by SIGINT\n")


def test_the_end_waits_no_longer_than_it_may(export: Path) -> None:
    """A client that is still sending its request is told."""
    with running_service(export, "--grace", 1, "--timeout", 60) as service:
        assert service.get("/").url == f"{service.address}/page/"
        with socket.create_connection(("127.0.0.1", service.port), 30) as client:
            client.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            time.sleep(0.2)
            code, stdout, stderr = service.end()
            assert (code, stdout) == (143, "3 requests answered\n")
            cancelled, ended = stderr.splitlines()
            assert "Cancel 1 running task(s)" in cancelled and ended == "ended by SIGTERM"
            answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 ") and b'{"error":"the service ends"}' in answer
