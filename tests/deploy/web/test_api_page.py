"""The page of a service, in a real Chromium: its lists are the service's, and what fails is said."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.deploy.web.api_page import can_show, figures_beside
from tests.fixtures.exports import write_random_export
from tests.fixtures.page_acts import choose_size, shown, wait_for_picked
from tests.fixtures.services import RunningService, running_service
from tests.fixtures.web_exports import evaluation_of


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_export(tmp_path_factory.mktemp("service") / "export")


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[RunningService]:
    with running_service(export) as running:
        yield running


@pytest.fixture
def page(browser: Any, service: RunningService) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.seen = {"errors": [], "urls": []}
    page.on("pageerror", lambda error: page.seen["errors"].append(str(error)))
    page.on("request", lambda request: page.seen["urls"].append(request.url))
    page.goto(f"{service.address}/page")
    page.wait_for_selector("html[data-ready]")
    yield page
    context.close()
    assert page.seen["errors"] == []


def names(recommender: Recommender, history: list[Any]) -> list[str]:
    (found,) = recommender.recommend([history], 10)
    return [item.title or str(item.item_id) for item in found]


def test_its_lists_are_the_services(page: Any, export: Path, service: RunningService) -> None:
    largest = Recommender.from_pretrained(export)
    history: list[Any] = []
    for count in (1, 2):
        for index, size in enumerate(largest.sizes):
            choose_size(page, index)
            assert shown(page) == names(Recommender.from_pretrained(export, size), history)
            assert shown(page, "largest") == names(largest, history)
        (best,) = largest.recommend([history], 10)
        history.append(best[3].item_id)
        page.locator("#largest button").nth(3).click()
        wait_for_picked(page, count)
    found = str(largest.item_ids[7]) if largest.titles is None else str(largest.titles[7])
    page.locator("#search").fill(found)
    page.wait_for_selector("#found li")
    page.locator("#found li", has_text=found).first.click()
    wait_for_picked(page, 3)
    assert page.locator("#picked .title").first.text_content() == found
    assert shown(page, "largest") == names(largest, [*history, largest.item_ids[7]])
    assert "to nobody else" in page.locator("#offline").text_content()
    assert all(url.startswith(service.address) for url in page.seen["urls"])
    assert page.evaluate("navigator.serviceWorker.getRegistrations().then((all) => all.length)") == 0


def test_other_files_are_not_there(service: RunningService) -> None:
    assert service.get("/page/").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/page/service-worker.js", "/page/model.bin", "/page/..%2fconfig.json", "/page/config.json"):
        answer = service.get(path)
        assert answer.status == 404 and "error" in answer.json


def test_a_service_that_ends_is_told(browser: Any, export: Path) -> None:
    with running_service(export) as service:
        page = browser.new_page()
        page.goto(f"{service.address}/page/")
        page.wait_for_selector("html[data-ready]")
        service.end(signal.SIGTERM)
        page.locator("#chosen button").first.click()
        page.wait_for_selector("#notice", state="visible")
        assert page.locator("#notice").text_content() == "The service has not answered: it cannot be reached."
        assert page.locator("#page").is_visible()
        page.context.close()


def test_a_service_with_a_token_has_no_page(export: Path) -> None:
    with running_service(export, "--token-env", "SHOP", SHOP="a-token-of-the-shop") as service:
        answer = service.ask("GET", "/page/", authorization="Bearer a-token-of-the-shop")
        assert answer.status == 404 and service.get("/page/").status == 401


def test_integers_that_javascript_would_confuse_are_not_shown() -> None:
    assert can_show(["a", "b"]) and can_show([1, 2**53 - 1, -5])
    assert not can_show([2**53]) and not can_show([1, -(2**60)])


def test_quality_is_that_of_the_exports_evaluation(browser: Any, export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export, tmp_path / "export")
    exported = read_export(folder)
    evaluation = evaluation_of(exported.model.sizes, exported.origin.step)
    evaluation["manifest_sha256"] = exported.origin.manifest_sha256
    file = folder / "evaluation.json"
    for step, expected in ((exported.origin.step, "Quality: test split, 300 users"), (-1, "has not been measured")):
        file.write_text(json.dumps(evaluation | {"checkpoint": {"step": step}}))
        with running_service(folder) as service:
            page = browser.new_page()
            page.goto(f"{service.address}/page/")
            page.wait_for_selector("html[data-ready]")
            assert expected in page.locator("body").text_content()
            page.close()


def test_an_evaluation_that_cannot_serve_is_said(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(export, tmp_path / "export")
    exported = read_export(folder)
    assert figures_beside(folder, exported) is None and capsys.readouterr().out == ""
    (folder / "evaluation.json").write_text("[")
    assert figures_beside(folder, exported) is None
    assert "the page shows no quality: " in capsys.readouterr().out
