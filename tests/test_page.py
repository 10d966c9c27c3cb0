"""The page in a real browser: run where Playwright and Chromium are installed."""

from __future__ import annotations

import shutil

import pytest
from test_serve import running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def client():
    with running() as client:
        yield client


@pytest.fixture
def visit(browser):
    """Opens a page; at the end nothing may have gone wrong in it."""
    wrong, contexts = [], []

    def open_page(client, link="", width=1200, **context):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **context))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: outside(request.url))
        page.goto(f"http://127.0.0.1:{client.port}/{link}")
        playwright.expect(page.locator("#model")).to_have_text("demo")
        return page

    def outside(url):
        if not url.startswith(("http://127.0.0.1:", "data:")):
            wrong.append(url)

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def status(page, text):
    playwright.expect(page.locator("#status")).to_contain_text(text, timeout=20_000)


def test_answers_stream_side_by_side_with_their_numbers(client, visit):
    page = visit(client)
    page.fill("#prompt", "Tell me a story about a small dog.")
    page.click("#add")
    page.keyboard.type("integrator=naive loops=4")
    page.click("#run")
    status(page, "4 answers are finished")
    plain, *_, naive = page.locator("article").all()
    assert plain.locator(".text").inner_text().startswith("Once upon a time")
    assert naive.locator("mark").inner_text() not in ("", plain.locator(".text").inner_text())
    for words in ("departs at token", "tokens/s", "+100% layer passes", "KL ", "drift: "):
        assert words in naive.inner_text()
    assert page.locator("#plot g").count() == 3


def test_a_comparison_can_be_stopped_and_another_one_begun(client, visit):
    page = visit(client, "#prompt=Tell+me+a+story&setting=loops%3D60&max_tokens=1500")
    page.click("#run")
    page.locator(".text", has_text="Once").wait_for()
    page.keyboard.press("Escape")
    status(page, "Stopped")
    assert page.locator(".running").count() == 0
    page.fill("#max_tokens", "3")
    page.click("#run")
    status(page, "finished")


def test_the_keyboard_is_enough(client, visit):
    page = visit(client)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("What is 3 + 4?")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Remove setting 1; its neighbour takes the focus.
    assert page.locator("#columns li").count() == 2
    assert page.evaluate_handle("document.activeElement").get_attribute("value") == "loops=3"
    page.keyboard.press("Control+Enter")
    status(page, "2 answers are finished")


def test_every_control_has_a_name(client, visit):
    page = visit(client)
    names = [
        control.evaluate(
            "c => (c.labels?.[0]?.innerText ?? '') + (c.ariaLabel ?? '') + c.innerText"
        )
        for control in page.locator("input, textarea, button").all()
    ]
    assert all(names), names
    assert page.locator("html").get_attribute("lang") == "en"


def test_a_link_carries_prompt_and_settings(client, visit):
    page = visit(client)
    page.fill("#prompt", "Say & hello # ü")
    page.locator("#columns input").nth(1).fill("loops=2 cache=own")
    page.fill("#max_tokens", "5")
    page.click("#run")
    status(page, "finished")
    other = visit(client, "#" + page.url.partition("#")[2])
    assert other.input_value("#prompt") == "Say & hello # ü"
    assert [i.input_value() for i in other.locator("#columns input").all()] == [
        "loops=1",
        "loops=2 cache=own",
        "loops=6",
    ]
    assert other.input_value("#max_tokens") == "5"


def test_a_setting_that_cannot_be_understood_is_told(client, visit):
    page = visit(client, "#setting=speed%3D3")
    page.click("#run")
    status(page, "unknown loop setting 'speed'")
    page.locator("#columns input").fill("loops=2")
    page.click("#run")
    status(page, "finished")


def test_markup_in_a_prompt_stays_text(client, visit):
    page = visit(client)
    page.locator("#columns input").first.fill("<img/src=x>=1")
    page.fill("#prompt", "<b>Hello</b>")
    page.click("#run")
    status(page, "unknown loop setting '<img/src'")
    assert page.locator("main img, main b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_on_a_phone(client, visit, scheme):
    page = visit(client, width=360, color_scheme=scheme)
    page.click("#run")
    status(page, "finished")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    text, back = (
        int(page.evaluate(f"getComputedStyle(document.body).{name}").split("(")[1].split(",")[0])
        for name in ("color", "backgroundColor")
    )
    assert (text < back) == (scheme == "light")


def test_a_server_that_goes_and_comes_back_is_noticed(visit):
    with running() as client:
        page = visit(client, "#prompt=Tell+me+a+story&setting=loops%3D2")
    page.click("#run")
    status(page, "The server has gone")
    with running("--port", str(client.port)):
        status(page, "The server is back")
        page.click("#run")
        status(page, "finished")


def test_a_key_is_asked_for(browser):
    with running("--api-key", "secret") as client:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        playwright.expect(page.locator("#model")).to_have_text("demo")
        page.click("#run")
        status(page, "finished")
        page.close()
