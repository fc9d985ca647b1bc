"""Training, evaluation and export from a store at a URL: the figures of the local store, and no secret anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fmrl_dist import evaluate, export, train
from tests.fixtures.http_store import serve
from tests.fixtures.training import contents, evaluation, make_shop, refusal, run_here, run_module, train_here

pytest.importorskip("aiohttp", reason="stores at http:// need aiohttp (extra: remote)")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default cache is this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SECRET = "Bearer s3cret-token"
TRAIN = ("--train.max_steps", 4, "--train.log_every_steps", 1, "--store.timeout_s", 20)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The secret in the environment; fsspec reads it when it is imported, which was before this test."""
    monkeypatch.setenv("FSSPEC_HTTP", json.dumps({"headers": {"Authorization": SECRET}}))
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield
    del fsspec.config.conf["http"]


def test_train_evaluate_export_from_http(tmp_path: Path, token: None, capfd: pytest.CaptureFixture[str]) -> None:
    """By the commands, with a token from the environment and a signature in the URL: the figures of the local store,
    through a server that fails now and then, and no secret in anything that is printed or written."""
    config = make_shop(tmp_path / "shop")
    train_here(config, tmp_path / "local", *TRAIN)
    with serve(tmp_path / "shop" / "store") as server:
        server.authorization = SECRET
        server.faults = ["500", "flip", "half"]
        run, signed = tmp_path / "remote", f"{server.url}?sig=s3cret"
        words = ("--store.path", signed, *TRAIN)
        train_here(config, run, *words)
        assert server.faults == []
        train_here(config, run, *words, "--resume", "auto")
        run_here(evaluate.main, ["--checkpoint", run, "--store", signed])
        run_here(export.main, ["--checkpoint", run, "--size", 4, "--store", server.url])
        run_here(evaluate.main, ["--checkpoint", run / "export-4"])
        verified = run_module("shards.verify", signed)  # a process that starts with the token in its environment
        assert verified.returncode == 0, verified.stderr
        unsigned = refusal(evaluate.main, "--checkpoint", run)
    assert f"store {server.url}?*** was recorded without its credentials; give it again" in unsigned
    assert evaluation(run) == evaluation(tmp_path / "local")
    assert (run / "export-4" / "vocab.parquet").read_bytes() == (tmp_path / "shop/store/vocab.parquet").read_bytes()
    printed = "".join([*capfd.readouterr(), verified.stdout, verified.stderr, unsigned])
    assert "evaluate" in printed
    written = b"".join(data for data in contents(run).values() if isinstance(data, bytes))
    assert "s3cret" not in printed and b"s3cret" not in written


def test_train_at_a_source_that_stalls(tmp_path: Path) -> None:
    """Features are read first: no run folder is left, and the command ends with one line in time."""
    config = make_shop(tmp_path / "shop")
    with serve(tmp_path / "shop" / "store") as server:
        server.faults = ["forever", "stall"]
        words = ("--run.dir", tmp_path / "run", "--store.path", server.url, "--store.timeout_s", 2)
        line = refusal(train.main, "--config", config, *words)
    assert line.startswith("error: block at byte 0 of shard http://127.0.0.1") and "did not answer in time" in line
    assert not (tmp_path / "run").exists()
