"""The page in a real browser, against a real server."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.helpers.server import ServerProcess, serving

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys

PROMPT = "春眠不觉晓"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get("about:blank")
        browser.get(url)

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def set(self, name: str, value: object) -> None:
        self.run(
            "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            str(value),
        )

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.find("#status").text
            time.sleep(0.02)
        return value

    def write(self, **settings: object) -> list[str]:
        for name, value in settings.items():
            self.set(name, value)
        self.find("#write").click()
        self.wait(lambda: self.find("#cancel").get_attribute("disabled"))
        return [body.text for body in self.all("article .body")]

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[Page]:
    browser.set_window_size(1200, 900)
    opened = Page(browser, f"{server.url}/#language=en")
    opened.wait(lambda: opened.find("#model").text == "demo")
    yield opened
    assert opened.problems() == []


def test_a_text_streams_in_and_several_stand_side_by_side(page: Page) -> None:
    texts = page.write(prompt=PROMPT, n=3, max_tokens=16, seed=1)
    assert len(texts) == 3
    assert all(text.startswith(PROMPT) and len(text) > len(PROMPT) for text in texts)
    assert page.find("#status").text == "Done."
    tops = {article.rect["y"] for article in page.all("article")}
    assert len(tops) == 1


def test_the_settings_reach_the_server(page: Page) -> None:
    first = page.write(prompt=PROMPT, n=1, max_tokens=24, seed=7, temperature=1.5, top_k=40)
    again = page.write()
    assert first == again
    (text,) = page.write(stop="。", seed=1, temperature=0)
    assert "。" not in text


def test_cancel_ends_the_text_and_frees_the_row(page: Page) -> None:
    page.set("prompt", PROMPT)
    page.set("max_tokens", 512)
    page.find("#write").click()
    page.wait(lambda: page.all("article .token"))
    page.find("#cancel").click()
    page.wait(lambda: page.find("#status").text == "Cancelled.")
    count = len(page.all("article .token"))
    time.sleep(0.3)
    assert len(page.all("article .token")) == count


def test_a_text_goes_on_from_any_token(page: Page) -> None:
    page.write(prompt=PROMPT, n=1, max_tokens=16, seed=1)
    third = page.all("article .token")[2]
    third.click()
    prompt = page.find("#prompt").get_attribute("value")
    assert prompt.startswith(PROMPT)
    assert len(prompt) == len(PROMPT) + 3
    (text,) = page.write()
    assert text.startswith(prompt)


def test_probabilities_are_shown_for_a_token_with_mouse_and_keyboard(page: Page) -> None:
    page.write(prompt=PROMPT, n=1, max_tokens=8, seed=1)
    page.run("arguments[0].focus()", page.all("article .token")[0])
    panel = page.wait(lambda: page.find("#probabilities").text)
    assert "%" in panel
    page.browser.switch_to.active_element.send_keys("\ue014")  # the right arrow
    assert page.find("#probabilities").text != panel


def test_a_link_holds_the_settings(browser: Any, server: ServerProcess) -> None:
    link = f"{server.url}/#prompt={quote('双十一')}&top_k=9&n=1&language=zh"
    page = Page(browser, link)
    assert page.find("#prompt").get_attribute("value") == "双十一"
    assert page.find("#top_k").get_attribute("value") == "9"
    assert page.find("#write").text == "续写"
    assert page.run("return document.documentElement.lang") == "zh-CN"
    assert page.run("return writeLink()").startswith(f"{server.url}/#prompt=")


def test_an_adapter_is_chosen_by_its_name_and_the_link_holds_it(
    browser: Any, adapted_server: ServerProcess
) -> None:
    page = Page(browser, f"{adapted_server.url}/#language=en")
    page.wait(lambda: page.all("#choice option"))
    assert [option.text for option in page.all("#choice option")] == ["demo", "poems", "news"]
    settings = {"prompt": PROMPT, "n": 1, "max_tokens": 16, "seed": 1}
    without = page.write(**settings)
    chosen = page.write(choice="news")
    assert chosen != without
    link = page.run("return writeLink()")
    assert link.endswith("model=news") or "model=news&" in link
    again = Page(browser, link)
    again.wait(lambda: again.all("#choice option"))
    assert again.write() == chosen
    assert again.problems() == []


def test_one_model_needs_no_choice(page: Page) -> None:
    assert not page.find("#choice").is_displayed()


def test_what_is_no_text_stays_text(page: Page) -> None:
    hostile = "<img src=x onerror=\"document.title='broken'\"><script>document.title='x'</script>"
    texts = page.write(prompt=hostile, n=1, max_tokens=8)
    assert texts[0].startswith("<img src=x onerror")
    assert not page.all("article img, article script")
    assert page.run("return document.title") == "GPT2_ML"


def test_scripts_from_elsewhere_are_forbidden(page: Page) -> None:
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.hit = 1';"
        "document.body.append(script)"
    )
    assert page.run("return window.hit") is None
    assert any("Content Security Policy" in problem for problem in page.problems())


def test_a_phone_needs_no_sideways_scrolling(browser: Any, server: ServerProcess) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        page = Page(browser, f"{server.url}/#language=zh&n=2")
        page.write(prompt=PROMPT, max_tokens=16)
        assert page.run("return document.documentElement.scrollWidth") <= 360
        assert not page.run("return document.getElementById('settings').open")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name_for_screen_readers(page: Page) -> None:
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter((node) =>"
        "!node.hidden && !node.textContent.trim() && !(node.labels && node.labels.length"
        "&& node.labels[0].textContent.trim()) && !node.getAttribute('aria-label'))"
        ".map((node) => node.id)"
    )
    assert unnamed == []


def test_an_empty_prompt_is_said_and_not_sent(page: Page) -> None:
    page.set("prompt", "  ")
    page.find("#write").click()
    assert page.find("#status").text == "Write or choose a prompt first."
    assert "error" in page.find("#status").get_attribute("class")


def test_the_language_changes_everything_that_is_shown(page: Page) -> None:
    page.write(prompt=PROMPT, n=2, max_tokens=8, seed=1)
    page.find("#language").click()
    assert [button.text for button in page.all("article button")] == ["复制", "接着写"] * 2
    assert page.find("#status").text == "写完了。"
    assert page.find("#probabilities").text.startswith("指向")
    labels = [article.get_attribute("aria-label") for article in page.all("article")]
    assert labels == ["第 1 篇", "第 2 篇"]


@pytest.mark.parametrize("name", ["__proto__", "constructor", "toString", "de", ""])
def test_a_link_with_a_language_that_is_none_shows_the_page(page: Page, name: str) -> None:
    opened = Page(page.browser, page.browser.current_url.partition("#")[0] + f"#language={name}")
    assert opened.find("#write").text in ("Write", "续写")


def test_the_keyboard_alone_writes_and_cancels_and_keeps_its_place(page: Page) -> None:
    def keys(*sent: str) -> None:
        page.browser.switch_to.active_element.send_keys(*sent)

    def focused() -> str:
        return str(page.run("return document.activeElement.id"))

    page.set("max_tokens", 512)
    page.run("document.getElementById('write').focus()")
    keys(Keys.ENTER)
    page.wait(lambda: page.all("article .token"))
    assert focused() == "cancel"
    keys(Keys.ESCAPE)
    page.wait(lambda: page.find("#status").text == "Cancelled.")
    assert focused() == "write"
    page.set("max_tokens", 8)
    page.find("#prompt").click()
    keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.find("#status").text == "Done.")
    assert focused() == "prompt"
    for _ in range(40):
        keys(Keys.TAB)
        if page.run("return document.activeElement.className") == "token":
            break
    else:
        raise AssertionError("no token was reached with Tab")
    outline = "const style = getComputedStyle(document.activeElement); return style.outlineStyle"
    assert page.run(outline) == "solid"
    keys(Keys.ENTER)
    assert page.find("#status").text == "The prompt now ends at the chosen token."


def test_a_field_that_is_wrong_is_shown_and_not_sent(page: Page) -> None:
    page.set("seed", "x7")
    page.run("document.getElementById('settings').open = false")
    page.find("#prompt").click()
    page.browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.run("return document.activeElement.id") == "seed")
    assert page.run("return document.getElementById('settings').open")
    assert not page.all("article")


def test_what_goes_wrong_is_said_in_the_readers_language(browser: Any, shipped_model: Path) -> None:
    name = "<img src=x onerror=\"document.title='broken'\">"
    options = ("--api-key", "secret", "--max-rows", "1", "--max-queue", "0", "--name", name)
    with serving(shipped_model, *options) as server:
        page = Page(browser, f"{server.url}/#language=zh&n=1&max_tokens=8")

        def outcome(**settings: object) -> str:
            page.write(**settings)
            assert "error" in page.find("#status").get_attribute("class")
            return str(page.find("#status").text)

        page.wait(lambda: page.find("#key").is_displayed())
        assert outcome() == "此服务器需要 API 密钥（在“设置”里填写）。"
        assert outcome(key="wrong") == "服务器不认识这个 API 密钥。"
        assert outcome(key="secret", n=2) == "服务器正忙，请稍后再试。"
        page.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.wait(lambda: page.find("#model").text == name)
        page.write(n=1)
        assert page.find("#status").text == "写完了。"
        assert page.run("return document.title") == "GPT2_ML"
        server.kill()
        assert outcome() == "连接中断。"
    page.problems()  # of refused requests, which the browser notes itself
