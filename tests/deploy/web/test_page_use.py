"""Who uses the page: by keyboard, screen reader, phone, in the dark; and what hostile titles and scripts cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.page_acts import Page, choose_size, shown, wait_for_picked
from tests.fixtures.page_scripts import ACCESSIBILITY_PROBLEMS, CONTRASTS, OUTSIDE, violation_of
from tests.fixtures.web_exports import random_model, titles_of, write_shop_page


def test_the_start_of_the_page_tells_what_it_is(folder: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(folder)
    assert page.locator("#about").text_content().startswith("Catalogue: 2,000 items.")
    assert "300 users, masked" in page.locator("#conditions").text_content()
    page.wait_for_function("() => document.querySelector('#offline').textContent.includes('saved and works without')")


# People


def test_everything_works_by_the_keyboard(folder: Path, open_page: Callable[..., Page]) -> None:
    page, titles = open_page(folder), titles_of(2000)
    stops = []
    for _ in range(24):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert stops[:2] == ["size", "search"] and "Figures of every size" in stops
    page.locator("#search").focus()
    page.keyboard.type("creme 1004")
    assert page.locator("#found [role=option]").all_text_contents() == ["Crème Brûlée Torch number 1004"]
    page.keyboard.press("Enter")
    page.wait_for_selector("#picked li")
    assert page.locator("#picked .title").all_text_contents() == ["Crème Brûlée Torch number 1004"]
    page.wait_for_function("() => document.querySelector('#announcement').textContent.startsWith('Added Crème')")
    assert page.evaluate("document.activeElement.id") == "search" and page.locator("#search").input_value() == ""
    page.keyboard.type("bird")
    found = page.locator("#found [role=option]").all_text_contents()
    assert len(found) == 8 and page.locator("#search").get_attribute("aria-expanded") == "true"
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    assert page.locator("#search").get_attribute("aria-activedescendant") == "found-1"
    assert page.locator("[aria-selected=true]").text_content() == found[1]
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#picked li').length === 2")
    page.keyboard.type("bird")
    page.keyboard.press("Escape")
    assert not page.locator("#found").is_visible() and page.locator("#search").input_value() == "bird"
    page.locator("#chosen button").first.focus()
    for count in (3, 4):
        first = shown(page)[0]
        page.keyboard.press("Enter")
        wait_for_picked(page, count)
        assert page.locator("#picked .title").first.text_content() == first
        assert page.evaluate("document.activeElement === document.querySelector('#chosen button')")
    page.locator("#picked button").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#picked li').length === 3")
    assert page.evaluate("document.activeElement === document.querySelectorAll('#picked button')[1]")
    page.locator("#clear").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#picked li').length === 0")
    assert page.evaluate("document.activeElement.id") == "search"
    assert set(titles) >= set(shown(page))


def test_what_a_screen_reader_is_told(folder: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(folder)
    choose_size(page, 3)
    page.locator("#search").fill("bird")
    for role, name in (
        *(("heading", "One model, every size"), ("heading", "Model size"), ("heading", "History")),
        *(("slider", "Model size, in channels"), ("combobox", "Search and pick items"), ("listbox", "Items found")),
        *(("region", "History"), ("region", "Recommended at size 64"), ("region", "At size 128, the largest")),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    page.get_by_role("option").first.click()
    page.wait_for_selector("#picked li")
    page.locator("summary").click()
    assert page.get_by_role("button", name="Remove Birdhouse number 1", exact=True).count() == 1
    assert page.get_by_role("list", name="Picked items, latest first").get_by_role("listitem").count() == 1
    assert page.get_by_role("table", name="Quality, bytes and time of every size").get_by_role("row").count() == 6
    assert page.evaluate(ACCESSIBILITY_PROBLEMS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, folder: Path, open_page: Callable[..., Page]) -> None:
    """WCAG AA: 4.5 for text, 3 for the edges of controls."""
    page = open_page(folder, color_scheme=scheme, reduced_motion="reduce")
    for index in (1, 3):
        choose_size(page, index)
        page.locator("#chosen button").nth(2).click()
        wait_for_picked(page, index // 2 + 1)
    page.locator("summary").click()
    page.locator("#search").fill("bird")
    page.keyboard.press("ArrowDown")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) > 384) == (scheme == "light")


@pytest.mark.parametrize("width", [320, 360, 768])
def test_narrow_screens_do_not_scroll_sideways(width: int, open_page: Callable[..., Page], tmp_path: Path) -> None:
    titles: list[str | None] = ["W" * 300 if row % 2 else "very long words " * 20 for row in range(40)]
    write_shop_page(tmp_path / "web", random_model(num_items=40), titles)
    page = open_page(tmp_path / "web", viewport={"width": width, "height": 640}, is_mobile=True, has_touch=True)
    for count in (1, 2, 3):
        page.locator("#chosen button").first.tap()
        wait_for_picked(page, count)
    page.locator("summary").tap()
    page.locator("#search").fill("w")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    assert page.evaluate(OUTSIDE, width) == []
    page.locator("#search").fill("")
    page.evaluate("document.querySelector('#chosen li:last-child').scrollIntoView({ block: 'end' })")
    assert page.locator("#size").evaluate("slider => slider.getBoundingClientRect().top") >= 0  # it stays in sight


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_lists_move_only_for_those_who_like_it(motion: str, folder: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(folder, reduced_motion=motion)
    page.evaluate(
        "() => { const animate = Element.prototype.animate; globalThis.moved = 0;"
        " Element.prototype.animate = function (...words) { moved++; return animate.apply(this, words); }; }"
    )
    choose_size(page, 0)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert (page.evaluate("moved") == 0) == (motion == "reduce")


# What it must not do


HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\">",
    "</script><script>document.title='hacked'</script>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    "\u202egnirts desrever",
    "‏עברית",
    "&lt;b&gt; &amp;",
    " ",
    None,
    "line\nbreak\u0000and\u2028more",
    "__EXPORT__",
)


def test_titles_are_text_and_nothing_else(open_page: Callable[..., Page], tmp_path: Path) -> None:
    write_shop_page(tmp_path / "web", random_model(num_items=len(HOSTILE), sizes=(8, 16)), HOSTILE)
    page = open_page(tmp_path / "web")
    before = page.evaluate("document.querySelectorAll('img, script, svg, b').length")
    seen = set()
    for count in range(1, len(HOSTILE) + 1):
        seen |= set(shown(page))
        page.locator("#chosen button").first.click()
        wait_for_picked(page, count)
    assert page.locator("#chosen li").count() == 0 and "0 of 0" not in page.locator("#difference").text_content()
    page.locator("#search").fill("onerror=")
    page.keyboard.press("ArrowDown")
    assert page.locator("#found").text_content() == HOSTILE[0]
    titles = {title if title and title.strip() else f"i{row}" for row, title in enumerate(HOSTILE)}
    assert seen == titles == set(page.locator("#picked .title").all_text_contents())
    assert page.evaluate("document.querySelectorAll('img, script, svg, b').length") == before
    assert page.title() == "One model, every size" and page.seen["errors"] == []


def test_it_asks_nobody_but_its_own_server(folder: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(folder)
    page.locator("#chosen button").first.click()
    page.wait_for_function("() => document.querySelector('#offline').textContent.includes('saved')")
    root = page.evaluate("location.href")
    assert page.seen["urls"] and all(url.startswith(root) for url in page.seen["urls"])
    assert page.seen["errors"] == []


@pytest.mark.parametrize(
    ("code", "directive"),
    [
        ("eval('1')", "require-trusted-types-for"),
        ("document.body.innerHTML = '<b>1</b>'", "require-trusted-types-for"),
        ("document.head.append(Object.assign(document.createElement('script'), {src: 'a.js'}))", "require-trusted"),
        ("document.body.setAttribute('style', 'color: red')", "style-src"),
        ("fetch('http://127.0.0.1:9/')", "connect-src"),
        ("Object.assign(new Image(), {src: 'data:image/gif;base64,R0lGODlhAQABAAAAACw='})", "img-src"),
        ("document.body.append(Object.assign(document.createElement('iframe'), {src: 'data:,1'}))", "frame-src"),
    ],
)
def test_its_policy_refuses(code: str, directive: str, folder: Path, open_page: Callable[..., Page]) -> None:
    """Tried by a script of the page's own: what a debugger evaluates is not held to the policy."""
    page = open_page(folder)
    module = violation_of(code)
    page.route("**/probe.js", lambda route: route.fulfill(content_type="text/javascript", body=module))
    assert page.evaluate("import('./probe.js').then(({ run }) => run())").startswith(directive)
