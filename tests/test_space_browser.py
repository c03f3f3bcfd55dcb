"""The Space in a browser: every tab, both languages, desktop and phone, light and dark.

Screenshots go to the folder that KOCLIP_SCREENSHOTS names, if it does.
"""

import os
import shutil
from pathlib import Path

import pytest
from playwright import sync_api as playwright
from space_server import HOSTILE, QUERIES, running
from test_space import picture
from texts import _TEXTS, say

from koclip.encoders import load
from koclip.search import open_index

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TABS = ("classify", "search", "caption", "heatmap")
SIZES = {"desktop": (1_280, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    with running(tmp_path_factory.mktemp("space")) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(space, browser):
    """Return a function that opens the page; at the end nothing may have gone wrong in it."""
    contexts, faults = [], []

    def opened(size: str = "desktop", mode: str = "light", language: str = "ko"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=mode)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on("dialog", lambda dialog: dialog.dismiss())
        page.goto(space.url)
        page.get_by_role("heading", name=say("title", "ko")).wait_for()
        if language == "en":
            page.get_by_text("English", exact=True).click()
            page.get_by_role("heading", name=say("title", "en")).wait_for()
        first = page.get_by_role("tab", name=say(f"tab_{TABS[0]}", language), exact=True)
        first.filter(visible=True).first.wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def go_to(page, tab: str, language: str) -> None:
    """Open a tab, through the menu of those that a phone has no room for."""
    name = say(f"tab_{tab}", language)
    place = page.get_by_role("tab", name=name, exact=True).filter(visible=True)
    menu = page.locator(".overflow-menu > button").filter(visible=True)
    place.or_(menu).first.wait_for()  # tabs are drawn anew when the language changes
    if place.count():
        place.first.click()
        return
    menu.first.click()
    page.locator(".overflow-dropdown button", has_text=name).click()


def shoot(page, name: str) -> None:
    if folder := os.environ.get("KOCLIP_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def ink(page) -> float:
    """Return how bright the heading's letters are, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.querySelector('h1')).color")
    return sum(float(part) for part in colour.strip("rgba()").split(",")[:3]) / 3


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("language", ["ko", "en"])
def test_every_tabs_first_example_works_when_it_is_clicked(visit, language, size, mode):
    page = visit(size, mode, language)
    for tab in TABS:
        go_to(page, tab, language)
        page.locator(".examples:visible :is(tbody tr, button.gallery-item)").first.click()
        if tab == "classify":
            page.get_by_text("100%").or_(page.locator(".confidence-set:visible")).first.wait_for()
        elif tab == "heatmap":
            page.get_by_text("7×7").wait_for()
        else:
            page.locator(".gallery:visible .grid-container img").nth(11).wait_for()
        if tab == "search":
            page.get_by_role("button", name=say("next", language), exact=True).click()
            page.get_by_text("13–24").wait_for()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{tab} is {overflow} pixels too wide"
        assert page.locator(".toast-body").count() == 0
        shoot(page, f"{language}-{size}-{mode}-{tab}")
    assert (ink(page) < 128) == (mode == "light")


def test_every_word_changes_its_language_and_back(visit):
    page = visit()
    korean = {text[0] for text in _TEXTS.values()}
    for tab in TABS:
        go_to(page, tab, "ko")
    page.get_by_text("English", exact=True).click()
    page.get_by_role("heading", name=say("title", "en")).wait_for()
    for tab in TABS:
        go_to(page, tab, "en")
        page.wait_for_timeout(300)
        shown = page.locator(".gradio-container").inner_text()
        assert not [text for text in korean if text in shown.splitlines() and text != "English"], tab
    page.get_by_text("한국어", exact=True).click()
    page.get_by_role("heading", name=say("title", "ko")).wait_for()
    go_to(page, "classify", "ko")
    page.get_by_role("button", name=say("classify", "ko"), exact=True).wait_for()


@pytest.mark.parametrize(("language", "size"), [("ko", "desktop"), ("en", "phone")])
def test_only_real_matches_can_be_asked_for(visit, space, language, size):
    index, encoder = open_index(space.folder / "index"), load(str(space.folder / "runs" / "tiny" / "model"), "cpu")
    query = QUERIES[int(index.search(encoder.encode_texts(QUERIES), 1).scores[:, 0].argmin())]
    page = visit(size, language=language)
    go_to(page, "search", language)
    page.get_by_label(say("query", language)).filter(visible=True).fill(query)
    page.get_by_label("5 %", exact=True).check()
    page.get_by_role("button", name=say("search", language), exact=True).click()
    page.get_by_text(say("no_match", language)).wait_for()
    assert page.locator(".gallery:visible .grid-container img").count() == 0
    shoot(page, f"{language}-{size}-no-match")
    page.get_by_label(say("matches_off", language), exact=True).check()
    page.get_by_role("button", name=say("search", language), exact=True).click()
    page.locator(".gallery:visible .grid-container img").nth(11).wait_for()
    shoot(page, f"{language}-{size}-all")


@pytest.mark.parametrize("language", ["ko", "en"])
def test_a_mistake_is_told_in_the_visitors_language(visit, language):
    page = visit(language=language)
    page.get_by_role("button", name=say("classify", language), exact=True).click()
    page.get_by_text(say("no_image", language)).wait_for()
    page.wait_for_timeout(500)  # it slides in
    shoot(page, f"{language}-mistake")
    assert "Traceback" not in page.content()


def test_markup_is_shown_and_never_run(visit, tmp_path):
    picture().save(tmp_path / "photo.png")
    page = visit()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.locator(".image-frame img, [data-testid='image'] img").first.wait_for()
    page.get_by_label(say("labels", "ko")).fill(f"{HOSTILE}, <b>별</b>")
    page.get_by_role("button", name=say("classify", "ko"), exact=True).click()
    page.locator(".confidence-set").nth(1).wait_for()
    shown = page.locator(".confidence-set").all_inner_texts()
    assert any("<img src=x" in text for text in shown)
    go_to(page, "search", "ko")
    page.get_by_label(say("query", "ko")).fill(HOSTILE)
    page.get_by_role("button", name=say("search", "ko"), exact=True).click()
    page.locator(".gallery:visible .grid-container img").nth(11).wait_for()
    for _ in range(2):  # the hostile file names are somewhere on the three pages
        page.get_by_role("button", name=say("next", "ko"), exact=True).click()
        page.wait_for_timeout(700)
    go_to(page, "caption", "ko")
    page.locator("input[type=file]:not([disabled])").nth(1).set_input_files(tmp_path / "photo.png")
    page.get_by_role("textbox", name=say("captions", "ko")).fill(f"{HOSTILE}\n<h1>크게</h1>")
    page.get_by_role("button", name=say("caption", "ko"), exact=True).click()
    page.get_by_text("<h1>크게</h1>").last.wait_for()
    shoot(page, "ko-markup")
    assert page.evaluate("window.hacked") is None
    assert page.locator("table h1").count() == 0
