"""What is shown of a URL, and which URLs are valid for a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.urls import hide_credentials, is_url
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.store.remote import PROTOCOLS, checked_url
from shards.build import main as build_main

secrets = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1).map(
    lambda text: f"SECRET{text}SECRET"
)
plain = st.from_regex(r"[a-z0-9./-]{0,12}", fullmatch=True)


@given(st.sampled_from(PROTOCOLS), plain, plain, secrets, secrets, secrets, st.sampled_from("?#"))
def test_no_credentials_are_shown(
    protocol: str, host: str, path: str, user: str, password: str, query: str, mark: str
) -> None:
    """Whatever characters they contain, and wherever the URL is in a message."""
    for url in (
        f"{protocol}://{user}:{password}@{host}/{path}",
        f"{protocol}://{host}/{path}{mark}{query}",
        f"{protocol}://{user}@{host}/{path}{mark}{query}",
    ):
        for text in (url, f"store {url}: it is not there", f"store {url!r}", f"({url})"):
            shown = hide_credentials(text)
            assert "SECRET" not in shown, text
            assert hide_credentials(shown) == shown


@pytest.mark.parametrize(
    "text", ["stores/demo", "s3://bucket/shop", "store http://host:80/a/b: gone", "a@b, c?", "http://", "x::y"]
)
def test_text_without_credentials_is_unchanged(text: str) -> None:
    assert hide_credentials(text) == text


def test_the_rest_of_a_url_is_shown() -> None:
    assert hide_credentials("store https://me:x@host/a/b?sig=x: gone") == "store https://***@host/a/b?***: gone"
    assert hide_credentials("from s3://k@b/a to gs://b?c") == "from s3://***@b/a to gs://b?***"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("simplecache::http://host/shop", "chained URL"),
        ("zip://a::file:///tmp/x.zip", "chained URL"),
        ("pipe://touch pwned", "protocol 'pipe'"),
        ("ssh://host/shop", "protocol 'ssh'"),
        ("zip:///tmp/x.zip", "protocol 'zip'"),
        ("reference://x", "protocol 'reference'"),
        ("local:///tmp", "protocol 'local'"),
        ("://x", "protocol ''"),
        ("http://", "names no folder"),
        ("file://host/shop", "names no folder"),
        ("http://host/a b", "write it as %XX"),
        ("http://host/a\nb", "write it as %XX"),
        ("http://host/a@b", "write it as %40"),
        ("http://host/a?b@c", "write it as %40"),
        ("http://host/a#b", "write it as %23"),
        ("http://***@host/a", "without its credentials"),
        ("http://host/a?***", "without its credentials"),
    ],
)
def test_what_may_not_name_a_store(url: str, complaint: str) -> None:
    assert is_url(url)
    with pytest.raises(UserError, match=complaint.replace("*", r"\*")) as caught:
        Store.open(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://h/a", "HTTPS://u:p@h:1/a?b=c", "s3://b/k", "gs://b", "memory://a", "file:///a"]
)
def test_what_may_name_a_store(url: str) -> None:
    assert checked_url(url) == url


def test_a_config_is_recorded_without_credentials() -> None:
    config = load_config(None, ["--store.path", "https://me:secret@host/shop?sig=secret"])
    assert config.store.path == "https://me:secret@host/shop?sig=secret"
    assert "secret" not in config.to_yaml() + str(config.to_dict())
    other = dataclasses.replace(config, store=dataclasses.replace(config.store, path="https://host/shop?sig=other"))
    hidden = dataclasses.replace(config, store=dataclasses.replace(config.store, path="https://host/shop?***"))
    assert other.hash == hidden.hash  # nor can they be guessed from the start message


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"timeout_s": 0.0}, "store.timeout_s is 0.0"),
        ({"retries": -1}, "store.retries is -1"),
        ({"cache_gb": -0.1}, "store.cache_gb is -0.1"),
        ({"path": "http://me:a b@host"}, "write it as %20"),
    ],
)
def test_impossible_settings(values: dict[str, float], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        StoreConfig(**values)  # type: ignore[arg-type]


def test_a_store_is_not_built_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"store http://\*\*\*@host/shop is a URL; build into a folder"):
        build_main(["--store.path", "http://me:secret@host/shop"])
    assert list(tmp_path.iterdir()) == []
