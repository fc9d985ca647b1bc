"""The service worker: the page works without a network, and a new export replaces the old one as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.deploy.web.web_format import MODEL_BIN, MODEL_JSON
from tests.fixtures.browser import FolderServer, serve
from tests.fixtures.web_exports import random_model, write_shop_page

SIZES = (4, 8, 16)
NUM_ITEMS = 30
SAVED = "() => document.querySelector('#offline').textContent.includes('saved and works without')"
READY = "html[data-ready]"
# What becomes of the service worker that the server has now. A reload asks for it, too: its try may be under way, or
# take ours in without an event of its own, so the question is put again until a try is seen from its start.
END_OF_UPDATE = """async () => {
    const registration = await navigator.serviceWorker.getRegistration();
    let worker = registration.installing;
    while (!worker) {
        const found = new Promise((resolve) => {
            registration.addEventListener("updatefound", resolve, { once: true });
            setTimeout(resolve, 1000);
        });
        registration.update().catch(() => {});
        await found;
        worker = registration.installing;
    }
    while (!["redundant", "activated"].includes(worker.state))
        await new Promise((resolve) => worker.addEventListener("statechange", resolve, { once: true }));
    return worker.state;
}"""


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.seen = []
    page.on("pageerror", lambda error: page.seen.append(str(error)))
    yield page
    context.close()
    assert page.seen == []


def write(folder: Path, name: str, seed: int = 0) -> None:
    """An export whose titles tell which it is."""
    titles = [f"{name} {row}" for row in range(NUM_ITEMS)]
    write_shop_page(folder, random_model(SIZES, NUM_ITEMS, seed=seed), titles)


def open_saved(page: Any, server: FolderServer) -> None:
    page.goto(server.url)
    page.wait_for_selector(READY)
    page.wait_for_function(SAVED)


def export_of(page: Any) -> str:
    return str(page.evaluate("document.querySelector('meta[name=export]').content"))


def titles(page: Any) -> list[str]:
    page.wait_for_selector(READY)
    return list(page.locator("#chosen .title").all_text_contents())


def caches_of(page: Any) -> list[str]:
    return [name.rpartition("#")[2] for name in page.evaluate("caches.keys()")]


@pytest.mark.parametrize("path", ["", "index.html", "?from=home"])
def test_it_works_after_the_server_has_gone(path: str, page: Any, tmp_path: Path) -> None:
    write(tmp_path / "web", "old")
    server = serve(tmp_path / "web")
    open_saved(page, server)
    online = titles(page)
    server.stop()
    page.goto(server.url + path)
    assert titles(page) == online
    page.locator("#chosen button").first.click()
    page.wait_for_selector("#picked li")
    picked = titles(page)
    page.reload()
    assert titles(page) == online != picked
    assert not page.locator("#newer").is_visible()


def test_a_new_export_replaces_the_old_one_as_a_whole(page: Any, tmp_path: Path) -> None:
    """Though the server lets browsers keep every file for an hour, under the same names."""
    write(tmp_path / "web", "old")
    server = serve(tmp_path / "web", max_age_s=3600)
    open_saved(page, server)
    old = export_of(page)
    assert caches_of(page) == [old]
    write(tmp_path / "web", "new", seed=1)
    page.reload()
    assert export_of(page) == old and all(title.startswith("old") for title in titles(page))
    page.wait_for_selector("#newer", state="visible")
    page.locator("#reload").click()
    page.wait_for_function("old => document.querySelector('meta[name=export]').content !== old", arg=old)
    assert all(title.startswith("new") for title in titles(page))
    assert caches_of(page) == [export_of(page)] != [old]
    page.wait_for_function(SAVED)
    server.stop()
    page.reload()
    assert all(title.startswith("new") for title in titles(page))


def test_half_an_export_is_never_saved(page: Any, tmp_path: Path) -> None:
    """While a folder is being copied, the old export goes on."""
    write(tmp_path / "web", "old")
    server = serve(tmp_path / "web")
    open_saved(page, server)
    old = export_of(page)
    write(tmp_path / "next", "new", seed=1)
    for name in ("service-worker.js", "index.html", MODEL_JSON):
        shutil.copy(tmp_path / "next" / name, tmp_path / "web")
    page.reload()
    found = titles(page)
    assert all(title.startswith("old") for title in found)
    assert page.evaluate(END_OF_UPDATE) == "redundant" and caches_of(page) == [old]
    server.stop()
    page.reload()
    assert titles(page) == found and export_of(page) == old


def test_two_exports_of_one_server_do_not_meet(page: Any, tmp_path: Path) -> None:
    write(tmp_path / "both" / "a", "one")
    write(tmp_path / "both" / "b", "two", seed=1)
    server = serve(tmp_path / "both")
    exports = []
    for name in ("a", "b"):
        page.goto(f"{server.url}{name}/")
        page.wait_for_selector(READY)
        page.wait_for_function(SAVED)
        exports.append(export_of(page))
    assert set(caches_of(page)) == set(exports)
    server.stop()
    for name, title in (("a", "one"), ("b", "two"), ("a", "one")):
        page.goto(f"{server.url}{name}/")
        assert all(found.startswith(title) for found in titles(page))


def test_what_is_saved_is_checked_again(page: Any, tmp_path: Path) -> None:
    """A browser's store can be damaged, too."""
    write(tmp_path / "web", "old")
    server = serve(tmp_path / "web")
    open_saved(page, server)
    page.evaluate(
        """async () => {
            const cache = await caches.open((await caches.keys())[0]);
            const request = (await cache.keys()).find((key) => key.url.includes("model.bin"));
            const bytes = new Uint8Array(await (await cache.match(request)).arrayBuffer());
            bytes[3] ^= 1;
            await cache.put(request, new Response(bytes));
        }"""
    )
    page.reload()
    page.wait_for_selector("#notice.failed")
    assert f"the part of {MODEL_BIN} for size 4" in page.locator("#notice").text_content()
    assert not page.locator("#page").is_visible()
    page.wait_for_function("() => caches.keys().then((names) => names.length === 0)")
    page.reload()
    assert titles(page) and not page.locator("#notice").is_visible(), "it came from the server again"
    page.wait_for_function(SAVED)
    server.stop()
    page.reload()
    assert titles(page)
