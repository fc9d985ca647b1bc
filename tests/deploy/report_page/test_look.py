"""The page in a real browser: nothing is cut off or asked for, on a desk and on a phone, by day, by night, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.deploy.report_page.page import write_page
from tests.fixtures.browser import open_browser
from tests.fixtures.page_looks import CONTRASTS, OVERFLOWS, opened
from tests.fixtures.training import make_shop, train_here


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("look")
    options = ("--model.sizes", "[4, 8, 16]", "--model.width", 16, "--eval.cut_vectors", "true")
    run = train_here(make_shop(root / "shop"), root / "a-run-whose-name-is-rather-long-for-a-phone", *options)
    return write_page(run, timing_s=0.1).path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_look(width: int, scheme: str, browser: Any, file: Path) -> None:
    page, events = opened(browser, file, width, scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert events == []
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERFLOWS) == []
    assert page.evaluate(CONTRASTS) == []
    grounds = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert grounds == {"light": "rgb(251, 251, 249)", "dark": "rgb(17, 21, 27)"}[scheme]
    page.close()


def test_names_for_those_who_cannot_see_it(browser: Any, file: Path) -> None:
    page, _ = opened(browser, file, 1280, "light")
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("img", name="ndcg@10, seen items masked").count() == 1
    links = page.get_by_role("navigation", name="Sections").get_by_role("link")
    assert links.count() == page.locator("section").count() == 8
    assert page.get_by_role("region", name="Which size do I need?").count() == 1
    assert page.get_by_role("rowheader", name="vectors 8").count() >= 2
    page.close()


def test_paper(browser: Any, file: Path, tmp_path: Path) -> None:
    """What is folded on the screen is there on paper."""
    page, _ = opened(browser, file, 1280, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRASTS) == []
    assert page.get_by_text("clip_norm: 5.0").is_visible()
    assert page.pdf().startswith(b"%PDF")
    page.close()
