"""The page of `diffgen serve` in a real browser: make, watch, paint, search, compare, in two languages and themes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from serving import Served

Open = Callable[..., Any]
FIRST, SECOND = "a red strawberry", "a blue umbrella"  # in the gallery when the page opens
SECONDS = 60_000  # milliseconds that a slow machine may take


@pytest.fixture(scope="module", autouse=True)
def first_pictures(served: Served) -> None:
    for seed, prompt in enumerate([FIRST, SECOND]):
        served.job(prompt=prompt, seed=seed, steps=4)


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Open]:
    """Open the page; at the end there must be no message of the browser and no request elsewhere."""
    contexts, messages, requests = [], [], []
    expected: list[str] = []

    def open_(width: int = 1280, locale: str = "en", expects: str | None = None, **options: Any) -> Any:
        expected.extend([expects] if expects else [])
        key = {"username": "me", "password": served.key}
        context = browser.new_context(
            viewport={"width": width, "height": 900}, locale=locale, http_credentials=key, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(served.url)
        page.wait_for_selector("#pictures button img")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [message for message in messages if not any(text in message for text in expected)] == []
    assert [url for url in requests if not url.startswith((served.url, "data:", "blob:"))] == []


def newest(served: Served) -> dict[str, Any]:
    """The record of the newest picture."""
    entry = served.json("GET", "/api/pictures?limit=1")["pictures"][0]
    return served.json("GET", f"/api/pictures/{entry['id']}/record")


def test_a_picture_is_made_and_seen_while_it_forms(served: Served, open_page: Open) -> None:
    page, other = open_page(), open_page()
    for tab, prompt in ((page, "a penguin"), (other, "a rocket")):
        tab.fill("#prompt", prompt)
        tab.fill("#count", "1")
        tab.locator("#more summary").click()
        tab.fill("#steps", "24")
        tab.keyboard.press("Control+Enter")
    page.wait_for_selector("#preview-picture:visible")
    first = page.locator("#preview-picture").get_attribute("src")
    page.wait_for_function("first => document.querySelector('#preview-picture').src !== first", arg=first)
    assert "Step" in page.locator("#status").inner_text()
    for tab, prompt in ((page, "a penguin"), (other, "a rocket")):
        tab.wait_for_selector("#stage", state="hidden")
        assert tab.locator("#pictures span").first.inner_text() == prompt
        assert tab.locator("#error").inner_text() == ""
    page.reload()
    page.wait_for_selector("#pictures button img")
    assert set(page.locator("#pictures span").all_inner_texts()) >= {"a penguin", "a rocket"}
    loaded = "i => i.complete && i.naturalWidth === 64"
    page.wait_for_function(f"() => [...document.querySelectorAll('#pictures img')].slice(0, 2).every({loaded})")


def test_cancel_stops_a_job(served: Served, open_page: Open) -> None:
    page = open_page()
    page.fill("#prompt", "a cat")
    page.keyboard.press("Escape")  # closes the suggestions
    page.locator("#more summary").click()
    page.fill("#steps", "150")
    page.click("#create")
    page.wait_for_selector("#preview-picture:visible")
    page.click("#cancel")
    page.wait_for_selector("#stage", state="hidden")
    assert page.locator("#error").inner_text() == "Cancelled"
    assert served.wait_for("/health", "running", 0)


def test_the_models_words_and_what_was_written_before_are_suggested(open_page: Open) -> None:
    page = open_page()
    page.locator("#prompt").press_sequentially("penguin")
    page.wait_for_selector("#suggestions li")
    assert page.locator("#prompt").get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    assert page.locator("#suggestions li[aria-selected=true]").inner_text() == "a penguin"
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == "a penguin"
    assert page.locator("#suggestions").is_hidden()
    page.fill("#prompt", "")
    page.click("#surprise")
    assert page.input_value("#prompt").startswith(("a ", "an "))


def test_a_wrong_value_is_explained(open_page: Open, served: Served) -> None:
    page = open_page(expects="status of 400")
    page.click("#create")
    page.wait_for_function("() => document.querySelector('#error').textContent !== ''")
    assert "prompt" in page.locator("#error").inner_text()


def test_a_painted_mask_changes_only_what_it_covers(served: Served, open_page: Open) -> None:
    page = open_page()
    page.locator("#pictures button", has_text=FIRST).last.click()
    page.wait_for_selector("#viewer[open]")
    page.click("#begin-from")
    page.wait_for_selector("#mask:visible")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    for share in (0.7, 0.85):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 2)
        page.mouse.down()
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] - 2, steps=6)
        page.mouse.up()
    page.fill("#prompt", "a green apple")
    page.fill("#count", "1")
    page.click("#create")
    page.wait_for_function("() => document.querySelector('#pictures span').textContent === 'a green apple'")
    record = newest(served)
    assert record["prompt"] == "a green apple"
    assert {"image", "mask", "strength"} <= set(record)


def test_again_with_fills_the_form_from_the_record(served: Served, open_page: Open) -> None:
    page = open_page()
    page.locator("#pictures button", has_text=SECOND).last.click()
    page.wait_for_selector("#viewer[open]")
    assert SECOND in page.locator("#record").inner_text()
    page.click("#again")
    values = {name: page.input_value(f"#{name}") for name in ("prompt", "seed", "steps", "width", "scheduler")}
    assert values == {"prompt": SECOND, "seed": "1", "steps": "4", "width": "64", "scheduler": "dpmpp_2m"}
    page.click("#create")
    page.wait_for_function("text => document.querySelector('#pictures span').textContent === text", arg=SECOND)
    hashes = [one["pixels_sha256"] for one in served.json("GET", "/api/pictures?q=blue+umbrella")["pictures"]]
    assert len(hashes) == 2
    assert len(set(hashes)) == 1


def test_two_pictures_are_compared_with_a_wipe_and_their_records(open_page: Open) -> None:
    page = open_page()
    page.locator("#pictures button", has_text=FIRST).last.click()
    page.click("#compare")
    page.locator("#pictures button", has_text=SECOND).last.click()
    page.wait_for_selector("#comparison[open]")
    rows = dict(line.split("\t", 1) for line in page.locator("#differences tbody").inner_text().splitlines())
    assert rows["prompt"] == f"{FIRST}\t{SECOND}"
    assert rows["seed"] == "0\t1"
    assert "steps" not in rows
    page.locator("#wiper").focus()
    page.keyboard.press("Home")
    assert page.locator("#right").evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 0%)"
    page.keyboard.press("Escape")
    assert page.locator("#comparison").is_hidden()


def test_the_gallery_is_searched(open_page: Open) -> None:
    page = open_page()
    page.fill("#search", "BLUE umbrella")
    page.wait_for_function(
        "text => [...document.querySelectorAll('#pictures span')].every(s => s.textContent === text)", arg=SECOND
    )
    page.fill("#search", "no such words")
    page.wait_for_selector("#empty:visible")


def test_languages_and_themes_are_kept(open_page: Open) -> None:
    page = open_page(locale="zh-CN", color_scheme="dark")
    assert page.locator("#create").inner_text().startswith("生成")
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.click("#language")
    assert page.locator("#create").inner_text().startswith("Create")
    page.reload()
    page.wait_for_selector("#pictures button img")
    assert page.locator("#create").inner_text().startswith("Create")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_every_text_is_in_both_languages(open_page: Open) -> None:
    page = open_page()
    names = page.evaluate("import('./words.js').then(m => Object.values(m.WORDS).map(w => Object.keys(w).sort()))")
    assert names[0] == names[1]
    used = page.evaluate(
        "[...document.querySelectorAll('[data-word],[data-label],[data-placeholder]')]"
        ".flatMap(e => Object.values(e.dataset))"
    )
    assert {name for name in used if name.isidentifier()} - set(names[0]) - {"light", "dark"} == set()


def test_nothing_is_wider_than_a_phone(open_page: Open) -> None:
    page = open_page(width=390)
    for selector in ("#more summary", "#begin summary"):
        page.locator(selector).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#pictures button").first.click()
    page.wait_for_selector("#viewer[open]")
    assert page.locator("#viewer").evaluate(
        "e => e.scrollWidth <= e.clientWidth && e.getBoundingClientRect().right <= 390"
    )


@pytest.mark.parametrize(("scheme", "locale"), [("light", "en"), ("dark", "zh-CN")])
def test_axe_finds_nothing_serious(open_page: Open, scheme: str, locale: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(color_scheme=scheme, locale=locale)
    page.locator("#more summary").click()

    def serious() -> list[str]:
        violations = axe.run(page).response["violations"]
        return [
            f"{one['id']}: {one['nodes'][0]['html']}" for one in violations if one["impact"] in ("serious", "critical")
        ]

    page.fill("#prompt", "apple")
    page.wait_for_selector("#suggestions li")
    assert serious() == []
    page.locator("#pictures button").first.click()
    page.wait_for_selector("#viewer[open]")
    page.wait_for_selector("#record td")
    assert serious() == []
    page.click("#compare")
    page.locator("#pictures button").last.click()
    page.wait_for_selector("#comparison[open]")
    assert serious() == []


def test_the_page_is_whole_without_the_network() -> None:
    """No address of another site, no script or style inside the HTML, which the policy would refuse."""
    folder = Path(str(files("diffgen.serve") / "page"))
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    html = (folder / "page.html").read_text("utf-8")
    Parser().feed(html)
    assert "//" not in html
    assert [
        tag for tag, attrs in tags if tag == "style" or "style" in attrs or any(n.startswith("on") for n in attrs)
    ] == []
    assert all(attrs.get("src") for tag, attrs in tags if tag == "script")
    for name in ("page.css", "page.js", "words.js"):
        assert "http" not in (folder / name).read_text("utf-8"), name
