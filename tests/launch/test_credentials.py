"""Credentials reach no argument, file, log, pickle or traceback: launchers refuse them in URLs, and name other ways."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.credentials import refuse_credentials_in_config, warn_of_credentials
from fmrl_dist.config.loading import load_config
from launch import submit, sweep
from launch.slurm import training_facts
from launch.slurm.jobs import batch_script
from tests.fixtures.http_store import serve
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import contents, evaluation, make_shop, refusal, run_module, train_here

SECRET = "s3cret-token"
URLS = [f"https://me:{SECRET}@host/shop", f"https://host/shop?sig={SECRET}", f"s3://{SECRET}@bucket/shop"]
WAY = "leave them out of the URL, and give them by the environment or by a file (docs/cluster.md, Credentials)"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def config_with(folder: Path, **values: Any) -> Path:
    path = folder / "shop.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("action", [["--dry-run"], ["--cluster", "local"], ["--status"], []], ids=" ".join)
@pytest.mark.parametrize("url", URLS)
def test_a_chain(url: str, action: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = config_with(tmp_path, store={"path": url}), ["--run.dir", tmp_path / "run"]
    for words in (
        ["--store.path", url],
        [f"--store.path={url}"],
        ["--store.path", url, "--store.path", "stores/demo"],
        ["--config", config],
        ["--data.root", url],
        ["--sbatch", f"comment={url}"],
    ):
        line = refusal(submit.main, *words, *run, *action)
        assert "holds a URL with credentials" in line and WAY in line, words
        assert SECRET not in line + capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [config]


def test_what_the_batch_script_asks_about_a_config(tmp_path: Path) -> None:
    config = config_with(tmp_path, store={"path": URLS[1]})
    line = refusal(training_facts.main, "--config", config)
    assert line == (
        "error: store.path holds a URL with credentials, which SLURM, submitit and lists of processes would show; "
        + WAY
    )


@pytest.mark.parametrize("url", URLS)
def test_a_sweep(url: str, tmp_path: Path) -> None:
    base = config_with(tmp_path, store={"path": url})
    space: dict[str, Any] = {"base": "configs/demo.yaml", "study": "s", "trials": 1}
    space["parameters"] = {"train.lr": {"low": 1e-4, "high": 1e-2}}
    path = tmp_path / "space.yaml"
    for changes in (
        {"fixed": {"store.path": url}},
        {"base": str(base)},
        {"parameters": {"data.root": {"choices": ["data", url]}}},
    ):
        path.write_text(yaml.safe_dump(space | changes))
        for action in (["--dry-run"], ["--cluster", "local"]):
            line = refusal(sweep.main, path, "--folder", tmp_path / "sweep", *action)
            assert "holds a URL with credentials" in line and WAY in line and SECRET not in line, changes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop.yaml", "space.yaml"]


@pytest.mark.parametrize("url", URLS)
def test_a_batch_script_that_is_submitted_by_hand(url: str) -> None:
    """SLURM has recorded the arguments by then."""
    command = ["bash", "-euc", "source launch/environment.sh", "train.slurm", "--store.path", url]
    variables = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "7", "FMRL_VENV": sys.prefix}
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: an argument holds a URL with credentials, which SLURM has recorded: replace them, " + WAY + "\n"
    )


def test_a_pickle_of_a_job_holds_no_variable_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSSPEC_HTTP", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    script = batch_script("launch/train.slurm", "configs/demo.yaml")
    assert set(script.environment) == {"FMRL_VENV", "FMRL_ROOT", "FMRL_CHAIN"}
    assert SECRET.encode() not in pickle.dumps(script)


def test_text_templates_are_no_places(tmp_path: Path) -> None:
    text = ["See https://host/?item={title}"]
    config = load_config(config_with(tmp_path, data={"text": text}))
    refuse_credentials_in_config(config)
    assert config.to_dict()["data"]["text"] == text
    with pytest.raises(UserError, match=r"^data\.features\.t\.model holds"):
        feature = {"source": "transformers", "model": URLS[0]}
        refuse_credentials_in_config(load_config(config_with(tmp_path, data={"features": {"t": feature}})))


@pytest.mark.parametrize(("key", "value"), [("data.root", URLS[0]), ("train.init", URLS[1]), ("store.path", URLS[2])])
def test_no_key_of_a_config_is_recorded_with_them(key: str, value: str) -> None:
    config = load_config(None, ["--data.features", "{}", f"--{key}", value])
    assert SECRET not in config.to_yaml() and "***" in config.to_yaml()


@pytest.mark.parametrize(
    "text",
    [
        f"store: [https://me:{'x' * 90}{SECRET}{'x' * 90}@host/shop]",  # of another type, and shortened
        f"store: {{path: [https://me:{SECRET}@host]",  # not YAML, near the end of a URL
    ],
)
def test_a_complaint_about_a_config_shows_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    for part in (SECRET, "xxxx", "me:"):
        assert part not in str(caught.value)


def test_what_runs_says_so_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    warn_of_credentials(["--store.path", "https://host/shop"])
    assert capsys.readouterr().err == ""
    warn_of_credentials(["--store", URLS[0]])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: an argument holds a URL with credentials") and SECRET not in line
    monkeypatch.setenv("RANK", "1")
    warn_of_credentials(["--store", URLS[0]])
    assert capsys.readouterr().err == ""


def test_a_traceback_shows_none() -> None:
    program = f"from fmrl_dist.base.errors import run_command\nrun_command(lambda _: open('{URLS[0]}'))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 1 and SECRET not in result.stderr
    assert (
        result.stderr.splitlines()[-1]
        == "FileNotFoundError: [Errno 2] No such file or directory: 'https://***@host/shop'"
    )


@pytest.mark.parametrize("text", [f'["{SECRET}"', f'["{SECRET}"]', "3", '{"http": 3}', "[" * 100_000])
def test_a_damaged_file_of_credentials(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path))
    (tmp_path / "http.json").write_text(text)
    result = run_module("shards.verify", "http://127.0.0.1:9/shop")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: fsspec cannot read its settings (") and SECRET not in line


@pytest.mark.slow
def test_a_chain_with_credentials_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own, in the user's home: the chain reads the store by it, and nothing shows or records it."""
    pytest.importorskip("aiohttp", reason="stores at http:// need aiohttp (extra: remote)")
    config = make_shop(tmp_path / "shop")
    train_here(config, tmp_path / "local", "--train.max_steps", 4)
    credentials, written = tmp_path / "home" / ".config" / "fsspec", tmp_path / "written"
    credentials.mkdir(parents=True)
    (credentials / "http.json").write_text(json.dumps({"http": {"headers": {"Authorization": SECRET}}}))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    with serve(tmp_path / "shop" / "store") as server:
        server.authorization = SECRET
        words = ["--config", config, "--store.path", server.url, "--run.dir", written / "run", "--train.max_steps", 4]
        chain = ["--cluster", "local", "--stages", "train,evaluate,export", "--sizes", "4"]
        result = run_module("launch.submit", *words, *chain)
        (credentials / "http.json").unlink()
        without = run_module("launch.submit", *words, *chain[:2], "--stages", "evaluate")
    assert result.returncode == 0, result.stdout + result.stderr
    assert evaluation(written / "run") == evaluation(tmp_path / "local")
    assert without.returncode == 1 and "HTTP status 401; check the credentials" in without.stdout
    texts = [result.stdout, result.stderr, without.stdout, without.stderr]
    assert SECRET not in "".join(texts)
    assert not [name for name, data in contents(written).items() if SECRET.encode() in os.fsencode(data)]
