"""The page of `unimodal app` in a real browser: words and Enter find pictures, a phone shows it whole, and nothing comes from outside."""

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toy import toy_model, toy_processor

from unimodal import app
from unimodal.data.scenes import Scenes
from unimodal.inference import Unimodal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = pytest.mark.skipif(
    find_spec("gradio") is None or find_spec("playwright") is None or CHROMIUM is None,
    reason="needs unimodal[demo], playwright, and chromium on the path",
)
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 375, "height": 740}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    scenes = Scenes("val", count=4)
    for i in range(4):
        scenes.image(i).resize((320, 240)).save(folder / f"a <b>{i} with a long name of its own.png")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(photos: Path) -> Iterator[Any]:
    """The page of a model with all four heads. This process may reach this machine alone: see conftest.py."""
    model = Unimodal(toy_model(), toy_processor())
    page = app.serve(model, model.index_folder(photos), port=None, wait=False)
    yield page
    page.close(verbose=False)


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page; afterwards nothing it asked for came from another address, and no script of it failed."""
    contexts, asked, faults = [], [], []

    def visit(address: str, viewport: dict[str, int]) -> Any:
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # another test may have the processor
        page.on("request", lambda request: asked.append((request.url, address)))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert asked and [url for url, address in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert faults == []


def too_wide(page: Any) -> list[str]:
    """What of a page lies beyond the right edge of its window: the page as a whole, where it scrolls, or parts that are cut off."""
    return page.evaluate(
        """() => [document.documentElement, ...document.querySelectorAll('main *, #content *')].filter(one =>
            one.checkVisibility() && (one.getBoundingClientRect().right > innerWidth + 1
                || one === document.documentElement && one.scrollWidth > innerWidth)).map(one => one.outerHTML.slice(0, 99))"""
    )


@BROWSER
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_words_and_enter_find_pictures_and_say_why(viewport, served, visit) -> None:
    page = visit(served.local_url, viewport)
    words = page.get_by_label("Search for")
    words.fill("a red circle")
    words.press("Enter")
    thumbnails = page.locator("#results button:has(img)")
    thumbnails.nth(3).wait_for()
    assert page.locator("#status").inner_text().startswith("4 of 4 pictures in ")
    assert re.fullmatch(
        r"1\. match [<>]?\d+\.\d%, cosine -?\d\.\d\d", thumbnails.first.locator("img").get_attribute("alt")
    )
    assert not page.locator("#why img").first.is_visible()

    thumbnails.first.focus()
    page.keyboard.press("Enter")
    reason = page.locator("#why")
    reason.locator("img").nth(1).wait_for()
    assert [one.get_attribute("alt").split(" ")[0] for one in reason.locator("img").all()] == ["the", "where"]
    assert (
        " with a long name of its own.png" in reason.inner_text() and "a <b>" in reason.inner_text()
    )  # as it is written
    assert "Caption:" in reason.inner_text() and reason.locator(".word").all_inner_texts() == ["a", "red", "circle"]
    assert too_wide(page) == []

    words.fill("   ")
    words.press("Enter")
    page.get_by_text("Write what the picture should show").wait_for()
    assert not reason.is_visible()


@BROWSER
def test_a_picture_finds_itself(served, visit, photos: Path) -> None:
    page = visit(served.local_url, PHONE)
    page.get_by_text("Search by a picture").click()
    path = sorted(photos.iterdir())[2]
    page.locator("input[type=file]").first.set_input_files(path)
    page.locator("#results button:has(img)").nth(3).wait_for()
    assert "in the order of their embeddings" in page.locator("#status").inner_text()
    page.locator("#results button:has(img)").first.click()
    page.get_by_text(f"1. {path.name} cosine 1.00").wait_for()
    assert page.locator("#why img").count() == 1 and page.locator(".word").count() == 0


@BROWSER
def test_a_slider_asks_again(served, visit) -> None:
    from playwright.sync_api import expect

    page = visit(served.local_url, DESKTOP)
    fewer = page.get_by_label("number input for Results")
    fewer.fill("3")
    fewer.press("Enter")
    expect(page.locator("#status")).to_have_text("")  # once gradio's clock of the question is gone
    assert page.locator("#results button:has(img)").count() == 0
    page.get_by_label("Search for").fill("a red circle")
    page.get_by_label("Search for").press("Enter")
    page.get_by_text("3 of 4 pictures in ").wait_for()
    depth = page.get_by_label("range slider for Rerank depth")
    depth.focus()
    page.keyboard.press("Home")
    page.wait_for_function("!document.querySelector('#results').innerText.includes('match')")
    assert page.locator("#results button:has(img)").count() == 3


@BROWSER
@pytest.mark.parametrize("where", ["Search", "Caption"])
def test_a_file_that_is_no_picture_is_named(where, served, visit, tmp_path: Path, capfd) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    page = visit(served.local_url, PHONE)
    page.get_by_role("tab", name=where).click()
    if where == "Search":
        page.get_by_text("Search by a picture").click()
    page.locator("input[type=file]").nth(0 if where == "Search" else -1).set_input_files(broken)
    page.get_by_text("broken.jpg' is no image; expected one of JPEG").wait_for()
    assert "/gradio/" not in page.locator("body").inner_text()
    assert "Traceback" not in capfd.readouterr().err


@BROWSER
def test_everything_is_reached_by_tab_and_shows_it(served, visit) -> None:
    page = visit(served.local_url, PHONE)
    page.get_by_role("button", name="Search", exact=True).wait_for()  # gradio mounts part after part
    page.get_by_label("range slider for Rerank depth").wait_for()
    page.get_by_label("Search for").focus()
    look = """() => { const one = document.activeElement; return [
        one.getAttribute('aria-label') || one.innerText || one.placeholder, getComputedStyle(one).outlineStyle] }"""
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(look))
        if seen[-1][0].startswith("range slider for Rerank depth"):
            break
    names = [name.split("\n")[0] for name, _ in seen]
    assert {"Search", "Search by a picture", "range slider for Results"} <= set(names), names
    assert names[-1].startswith("range slider for Rerank depth"), names
    assert {style for name, style in seen} == {"solid"}, seen


@BROWSER
def test_caption_and_drawing(served, visit, photos: Path) -> None:
    page = visit(served.local_url, PHONE)
    page.get_by_role("tab", name="Caption").click()
    page.locator("input[type=file]").last.set_input_files(sorted(photos.iterdir())[0])
    page.wait_for_function("document.querySelector('textarea[disabled]')?.value")
    page.get_by_role("tab", name="Draw").click()
    words = page.get_by_role("textbox", name="Draw")
    words.press("Enter")
    page.get_by_text("Write what to draw").wait_for()
    words.fill("a star")
    words.press("Enter")
    page.locator("#drawn img").wait_for()
    assert page.get_by_role("button", name="Share").count() == 0
    assert too_wide(page) == []


@BROWSER
def test_what_a_model_lacks_is_said(visit, photos: Path) -> None:
    model = Unimodal(toy_model(matching=None, captioning=None, generation=None), toy_processor())
    served = app.serve(model, model.index_folder(photos), port=None, wait=False)
    try:
        page = visit(served.local_url, DESKTOP)
        words = page.get_by_label("Search for")
        words.fill("a red circle")
        words.press("Enter")
        page.locator("#results button:has(img)").nth(3).wait_for()
        for lacking in ("no matching head", "no captioning head", "no generation head"):
            assert page.get_by_text(lacking).is_visible()
        assert [tab.inner_text() for tab in page.get_by_role("tab").all()] == ["Search"]
        assert not page.get_by_label("Rerank depth").first.is_visible()
        page.locator("#results button:has(img)").first.click()
        page.locator("#why img").wait_for()
        assert "Caption" not in page.locator("#why").inner_text()
    finally:
        served.close(verbose=False)


@BROWSER
def test_it_listens_here_alone_and_sends_its_policy(served, visit) -> None:
    assert served.local_url.startswith("http://127.0.0.1:") and served.server_name == "127.0.0.1"
    assert served.share is False and served.share_url is None and served.analytics_enabled is False
    with pytest.raises(OSError, match=f"port {served.server_port} of 127.0.0.1 is taken; give another one"):
        app.serve(Unimodal(toy_model(), toy_processor()), port=served.server_port, wait=False)
    page = visit(served.local_url, DESKTOP)
    refused = "() => fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.name)"
    page.on("console", lambda message: said.append(message.text))
    said: list[str] = []
    assert page.evaluate(refused) == "TypeError"
    assert any("Content Security Policy" in text for text in said), said


@BROWSER
def test_the_page_of_a_search_fits_a_phone(visit, photos: Path, tmp_path: Path) -> None:
    from unimodal.cli import main

    model, out = tmp_path / "model", tmp_path / "found.html"
    Unimodal(toy_model(), toy_processor()).save_pretrained(model)
    assert main(["search", str(photos), "a red circle", "--model", str(model), "--out", str(out)]) == 0
    for viewport in (DESKTOP, PHONE):
        page = visit(out.as_uri(), viewport)
        assert page.locator(".found").count() == 4 and page.locator(".found img").count() == 8
        assert too_wide(page) == []


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ImportError, match=r"the page needs gradio: pip install 'unimodal\[demo\]'"):
        app.serve(Unimodal(toy_model(), toy_processor()))
