"""One Chromium for each module, and its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.checkpoint.export.parts import ExportedModel
from tests.fixtures.browser import FolderServer, open_browser, serve
from tests.fixtures.web_exports import random_model, write_shop_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def shop() -> ExportedModel:
    """Of the demo's shape."""
    return random_model()


@pytest.fixture(scope="module")
def folder(shop: ExportedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its web export."""
    path = tmp_path_factory.mktemp("web") / "export"
    write_shop_page(path, shop)
    return path


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a folder; ``page.seen`` has the addresses that it asked for, and its errors."""
    opened: list[tuple[Any, FolderServer]] = []

    def open_folder(folder: Path, ready: bool = True, **options: Any) -> Any:
        server = serve(folder)
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        opened.append((context, server))
        page = context.new_page()
        page.seen = {"urls": [], "errors": []}
        context.on("request", lambda request: page.seen["urls"].append(request.url))
        page.on("pageerror", lambda error: page.seen["errors"].append(str(error)))
        page.on("console", lambda line: page.seen["errors"].append(line.text) if line.type == "error" else None)
        page.goto(server.url)
        if ready:
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_folder
    for context, server in opened:
        context.close()
        server.stop()
