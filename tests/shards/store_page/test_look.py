"""The page in a real browser: nothing is cut off or asked for, and it can be heard and used by keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.store.builder import build_store
from shards.store_page.page import write_store_page
from tests.fixtures.browser import open_browser
from tests.fixtures.page_looks import CONTRASTS, OVERFLOWS, opened
from tests.fixtures.store_pages import write_page_shop


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("look")
    config = write_page_shop(root / "raw")
    store, _ = build_store(config)
    write_store_page(store, root / "store.html", config.data)
    return root / "store.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_look(width: int, scheme: str, browser: Any, file: Path) -> None:
    page, events = opened(browser, file, width, scheme)
    assert [event for event in events if not event.startswith("data:image/jpeg;base64,")] == []
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERFLOWS) == []
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate("() => [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.close()


def test_names_and_keys(browser: Any, file: Path) -> None:
    """Landmarks have names; Tab walks through the navigation and then through what scrolls; Enter follows a link."""
    page, _ = opened(browser, file, 1280, "light")
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    links = page.get_by_role("navigation", name="Sections").get_by_role("link")
    assert links.count() == page.locator("section").count() == 8
    assert page.get_by_role("region", name="What did the build leave out?").count() == 1
    assert page.get_by_role("img", name="Length of train histories").count() == 1
    assert page.get_by_role("rowheader", name="vector", exact=True).count() >= 2
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == links.first.text_content()
    page.keyboard.press("Enter")
    assert page.url.endswith("#splits")
    for _ in range(links.count()):
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.getAttribute('role')") == "region"
    page.close()


def test_paper(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, 1280, "dark")
    page.emulate_media(media="print")
    assert page.evaluate(CONTRASTS) == []
    assert page.pdf().startswith(b"%PDF")
    page.close()
