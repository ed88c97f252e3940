"""The page of `unimodal app` in a real browser: words and Enter find pictures, a phone shows it whole, and nothing comes from outside."""

import http.client
import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toy import toy_model, toy_processor

from unimodal import app
from unimodal.app import door, page
from unimodal.data.scenes import Scenes
from unimodal.inference import Unimodal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = pytest.mark.skipif(
    find_spec("gradio") is None or find_spec("playwright") is None or CHROMIUM is None,
    reason="needs unimodal[demo], playwright, and chromium on the path",
)
GRADIO = pytest.mark.skipif(find_spec("gradio") is None, reason="needs unimodal[demo]")
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
        r"1\. match [<>]?\d+\.\d+%, cosine -?\d\.\d\d+", thumbnails.first.locator("img").get_attribute("alt")
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


# Who may ask it for what.


def ask(
    served: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer. `headers` may name another Host; a body of pieces is sent without its length."""
    link = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=60)
    try:
        link.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = link.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    finally:
        link.close()


def form(content: bytes, name: str = "a.png") -> tuple[bytes, dict[str, str]]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def held() -> list[Path]:
    """The files that were uploaded and are still there."""
    return [path for path in Path(page.upload_folder().name).rglob("*") if path.is_file()]


def joined(served: Any, name: str, *data: Any) -> tuple[int, dict[str, str], bytes]:
    """Asks for the work behind a button, by gradio's API."""
    return ask(served, "POST", f"/gradio_api/run/{name}", json.dumps({"data": data, "session_hash": "s"}))


@GRADIO
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "LocalHost"])
@pytest.mark.parametrize("port", ["", ":7860", "here"])
def test_it_answers_to_the_names_of_this_machine(host, port, served) -> None:
    port = f":{served.server_port}" if port == "here" else port
    status, headers, _ = ask(served, "GET", "/config", headers={"Host": host + port})
    assert status == 200 and headers["content-security-policy"] == door.POLICY


@GRADIO
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:80",
        "localhost.",
        "127.0.0.2",
        "0.0.0.0",
        "[::2]",
        "",
        "localhost:x",
        "a@localhost",
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/upload")])
def test_it_answers_to_no_other_name(host, method, path, served) -> None:
    status, headers, body = ask(served, method, path, b"{}", {"Host": host, "Origin": f"http://{host}"})
    assert status == 403 and b"on this machine alone" in body and "access-control-allow-origin" not in headers


@GRADIO
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:{port}", "file://"]
)
@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/by_words"])
def test_another_origin_changes_nothing(origin, path, served) -> None:
    before = held()
    body, headers = form(b"0" * 1000)
    own = {"Host": f"127.0.0.1:{served.server_port}", "Origin": origin.format(port=served.server_port)}
    status, _, told = ask(served, "POST", path, body, headers | own)
    assert status == 403 and b"from itself alone" in told and held() == before
    status, headers, _ = ask(served, "OPTIONS", path, None, own | {"Access-Control-Request-Method": "POST"})
    assert status == 403 and "access-control-allow-origin" not in headers


@GRADIO
def test_two_hosts_are_refused(served) -> None:
    with socket.create_connection(("127.0.0.1", served.server_port), timeout=60) as link:
        link.sendall(b"GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert link.recv(100).split(b" ")[1] in (b"400", b"403")


@GRADIO
@pytest.mark.parametrize("lengthless", [False, True])
def test_an_upload_has_a_bound_and_leaves_nothing(lengthless: bool, served, monkeypatch) -> None:
    monkeypatch.setattr(door, "UPLOAD", 100_000)
    before = held()
    body, headers = form(b"0" * 1_000_000)
    pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    with suppress(ConnectionError):  # refused before all of it was sent
        status, _, told = ask(served, "POST", "/gradio_api/upload", pieces if lengthless else body, headers)
        assert status == 413 and b"maximum allowed size" in told
    assert held() == before


@GRADIO
def test_a_long_request_is_refused(served) -> None:
    with suppress(ConnectionError):  # refused before all of it was sent
        assert joined(served, "by_words", "x" * (2 << 20), 1, 0)[0] == 413


@GRADIO
def test_an_upload_is_deleted_once_it_was_read(served, photos: Path) -> None:
    before = held()
    body, headers = form(sorted(photos.iterdir())[0].read_bytes())
    origin = {"Origin": f"http://127.0.0.1:{served.server_port}"}
    status, _, answer = ask(served, "POST", "/gradio_api/upload", body, headers | origin)
    (path,) = json.loads(answer)
    assert status == 200 and Path(path).is_relative_to(page.upload_folder().name)
    assert Path(page.upload_folder().name).stat().st_mode & 0o77 == 0
    sent = {"path": path, "meta": {"_type": "gradio.FileData"}}
    status, _, answer = joined(served, "write", sent)
    assert status == 200 and isinstance(json.loads(answer)["data"][0], str)
    assert held() == before


@GRADIO
@pytest.mark.parametrize(
    "file",
    [
        {"path": "http://name-that-is-not.example/a.png"},
        {"path": "HTTPS://name-that-is-not.example/a.png"},
        {"path": "//name-that-is-not.example/a.png"},
        {"path": "ftp://name-that-is-not.example/a.png"},
        {"path": "a.png", "url": "http://name-that-is-not.example/a.png"},
    ],
)
@pytest.mark.parametrize("work", ["write", "by_picture", "by_words"])
def test_no_address_is_looked_up(file, work, served, monkeypatch) -> None:
    asked: list[object] = []
    look = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or look(host, *rest, **more)
    )
    status, _, told = joined(served, work, {**file, "meta": {"_type": "gradio.FileData"}}, 1, 0)
    assert status == 403 and b"nothing is fetched from an address" in told
    assert set(asked) <= {"127.0.0.1"}


@GRADIO
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://name-that-is-not.example/a.png",
        "/gradio_api/file=http%3A%2F%2Fname-that-is-not.example/a.png",
        "/gradio_api/file/https://name-that-is-not.example/a.png",
        "/gradio_api/proxy=http://name-that-is-not.example/a.png",
        "/gradio_api/proxy=name-that-is-not.hf.space/a.png",
    ],
)
def test_nothing_is_fetched_for_the_browser(path, served) -> None:
    status, _, told = ask(served, "GET", path)
    assert status == 403 and b"fetches nothing from other addresses" in told


@GRADIO
def test_files_of_this_machine_stay_here(served, photos: Path) -> None:
    secret = photos.parent / "secret.png"
    shutil.copy(sorted(photos.iterdir())[0], secret)
    for path in (secret, Path("/etc/passwd"), Path(__file__), Path(page.upload_folder().name, "../../etc/passwd")):
        assert ask(served, "GET", f"/gradio_api/file={path}")[0] in (403, 404), path
        status, _, answer = joined(served, "write", {"path": str(path), "meta": {"_type": "gradio.FileData"}})
        assert status >= 400, answer


@GRADIO
@pytest.mark.parametrize(
    "path", ["/gradio_api/process_recording", "/gradio_api/vibe-edit", "/gradio_api/component_server", "/login"]
)
def test_what_the_page_has_no_use_for_is_not_there(path, served) -> None:
    assert ask(served, "POST", path, b"{}")[0] == 404


@GRADIO
def test_words_that_the_model_does_not_know_are_said(served) -> None:
    _, _, answer = joined(served, "by_words", "zxqv flurb", 2, 2)
    assert b"The model knows none of the words of 'zxqv flurb'" in answer and b"match" not in answer


@GRADIO
def test_words_are_searched_by_the_api_too(served) -> None:
    status, _, answer = joined(served, "by_words", "http://a.example is a text here", 2, 0)
    assert status == 200 and "2 of 4 pictures" in str(json.loads(answer)["data"]), answer


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
