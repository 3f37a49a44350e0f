"""The page in a real browser, against a real server with the embedded model."""

from __future__ import annotations

import re
import shutil

import httpx
import numpy as np
import pytest
import running
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from diffulex_jax import Output, viz
from diffulex_jax.engine.results import TraceStep
from diffulex_jax.engine.tokenizer import Part


KEY = "open-sesame"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--window-size=1280,1400"]
SETTINGS = [*running.EMBEDDED, "--api-key", KEY]
QUESTION = "A farm has 40 cows and 12 sheep. 9 cows are sold. How many animals are left?"


@pytest.fixture(scope="module")
def server(compiled):
    with running.serving("embedded", "--strategy", "llada2", "--strategy", "dmax", *SETTINGS, cache=compiled) as server:
        server.client.headers["authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """The page as a user has it before their eyes."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition, seconds=60):
        return WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: condition())

    def write(self, selector, text):
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def sign_in(self, key=KEY):
        self.until(lambda: self.one("#key").is_displayed())
        self.write("#key", key + Keys.TAB)
        self.until(lambda: "llada2, dmax" in self.one("#server").text)
        return self

    def ask(self, prompt=QUESTION, *, form="chat"):
        self.write("#prompt", prompt)
        self.one(f"input[name=form][value={form}]").click()
        self.browser.execute_script("document.getElementById('speed').value = '30'")
        self.one("#start").click()

    def set(self, **settings):
        """Opens "More settings" and fills them in."""
        if not self.one("details").get_attribute("open"):
            self.one("summary").click()
        for name, value in settings.items():
            self.write(f"[name={name}]", value)

    def finished(self, lanes=1):
        self.until(lambda: len(self.all(".lane[data-state=finished]")) == lanes and self.one("#play").get_attribute("aria-label") == "Play")

    def cells(self, kind):
        return self.all(f".lane:first-child .cell[data-kind={kind}]:not(.past)")

    def scrub_to(self, step):
        slider = self.one("#scrubber")
        slider.send_keys(Keys.HOME + Keys.ARROW_RIGHT * step)
        assert slider.get_attribute("value") == str(step)


@pytest.fixture
def opened(browser, server):
    opened = Page(browser, server.url).sign_in()
    browser.get_log("browser")
    yield opened
    # A refused request shows in the console, as it should; a broken script or a blocked style must not.
    assert [entry for entry in browser.get_log("browser") if "server responded with a status of 4" not in entry["message"]] == []


def test_the_page_is_one_document_that_asks_no_other_host_for_anything(server):
    answer = httpx.get(server.url)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"].count("'sha256-") == answer.text.count("<script>") > 1 and "unsafe" not in str(policy)
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src|href=.(?!data:)|@import|url\(", answer.text)


def test_only_the_page_itself_is_open_to_those_without_a_key(server):
    assert {path: httpx.get(server.url + path).status_code for path in ("/", "/server_info", "/v1/models")} == {
        "/": 200,
        "/server_info": 401,
        "/v1/models": 401,
    }


def test_a_wrong_key_is_told_and_a_right_one_opens_the_page(browser, server):
    opened = Page(browser, server.url)
    opened.until(lambda: "wants an API key" in opened.one("#server").text)
    assert not opened.one("#error").is_displayed()
    opened.write("#key", "wrong" + Keys.TAB)
    opened.until(lambda: opened.one("#error").is_displayed())
    assert opened.one("#error").text.startswith("401: ") and opened.one("#key").get_attribute("aria-invalid") == "true"
    opened.sign_in()
    assert not opened.one("#error").is_displayed()
    assert [option.text for option in Select(opened.one("[name=strategy]")).options] == ["llada2", "dmax"]


def test_what_settles_is_the_answer_without_a_stream(opened, server):
    opened.ask()
    opened.finished()
    chat = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "accept_threshold": 0.9}
    whole = server.post("/v1/chat/completions", **chat, diffusion={"usage": True}).json()
    text, details = whole["choices"][0]["message"]["content"], whole["usage"]["completion_tokens_details"]
    assert opened.one(".answer").get_property("textContent") == text != ""
    assert opened.one("[data-figure=forwards]").text == str(details["nfe"])
    assert opened.one("[data-figure=rate]").text == f"{details['tokens_per_forward']:.2f}"
    assert len(opened.cells("settled")) == whole["usage"]["completion_tokens"] and not opened.cells("mask")
    roles = [part.text for part in opened.all(".asked i")]
    assert roles == ["<role>", "</role>", "<|role_end|>", "<role>", "</role>"]
    assert opened.one(".asked").text == f"<role>HUMAN</role>{QUESTION}<|role_end|><role>ASSISTANT</role>"


def test_plain_text_is_not_put_through_the_chat_template(opened, server):
    opened.ask(form="text")
    opened.finished()
    plain = server.post("/generate", prompt=QUESTION, accept_threshold=0.9).json()
    assert opened.one(".asked").text == QUESTION
    assert opened.one(".answer").get_property("textContent") == plain["text"]


def test_scrubbing_back_shows_the_canvas_of_every_step(opened):
    opened.ask()
    opened.finished()
    opened.scrub_to(1)
    after_one = len(opened.cells("mask"))
    assert after_one and opened.cells("filled") and not opened.cells("settled")
    assert {cell.get_attribute("data-event") for cell in opened.cells("filled")} == {"new"}
    opened.one("[data-go=back]").click()
    assert opened.one("#where").text.startswith("forward 0 of ")
    assert len(opened.cells("mask")) > after_one and not opened.cells("filled")
    opened.one("#play").click()
    opened.finished()
    assert not opened.cells("mask")


def test_edits_and_remasks_are_shown_in_the_step_that_made_them(opened, server):
    asked = {"accept_threshold": 0.05, "remask_threshold": 0.9}
    Select(opened.one("[name=strategy]")).select_by_visible_text("dmax")
    for name, value in asked.items():
        opened.write(f"[name={name}]", str(value))
    opened.ask(form="text")
    opened.finished()
    whole = server.post("/generate", prompt=QUESTION, strategy="dmax", **asked).json()
    seen = {"edited": 0, "remasked": 0}
    for step in range(1, whole["nfe"] + 1):
        opened.browser.execute_script("seek(arguments[0])", step)
        for event in seen:
            seen[event] += len(opened.all(f".lane .cell[data-event={event}]"))
    assert seen == {"edited": whole["revised_tokens"], "remasked": whole["remasked_tokens"]} and min(seen.values()) > 0
    assert opened.one("[data-figure=edits]").text == str(whole["revised_tokens"])


def test_a_cell_tells_its_probability_and_when_it_was_accepted(opened):
    opened.ask()
    opened.finished()
    opened.browser.execute_script("arguments[0].focus()", opened.one(".lane .cell"))
    tip = opened.one("#tip").text
    assert re.search(r"^“First”  token \d+\nprobability \d+\.\d %\nfirst accepted in forward \d+\nnever revised\nposition 0, settled$", tip)
    opened.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "position 1, settled" in opened.one("#tip").text
    opened.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not opened.one("#tip").is_displayed()


def cells_of(row):
    return row.find_elements(By.CSS_SELECTOR, "th, td")


def test_two_strategies_side_by_side(opened, server):
    opened.one("#both").click()
    opened.ask()
    opened.finished(lanes=2)
    opened.until(lambda: opened.one("#comparison").is_displayed())
    ids = server.post("/tokenize", messages=[{"role": "user", "content": QUESTION}]).json()["tokens"]
    alone = [
        server.post("/generate", prompt=ids, strategy=strategy, accept_threshold=threshold).json()
        for strategy, threshold in (("llada2", 0.9), ("dmax", 0.5))
    ]
    assert [answer.get_property("textContent") for answer in opened.all(".answer")] == [one["text"] for one in alone]
    rows = {label.text: [cell.text for cell in cells] for label, *cells in map(cells_of, opened.all("#comparison tr")[1:])}
    assert rows["forwards"] == [str(one["nfe"]) for one in alone]
    assert rows["tokens a forward"] == [f"{one['tokens_per_forward']:.2f}" for one in alone]
    assert alone[1]["nfe"] < alone[0]["nfe"] and opened.one(".verdict").text.startswith("dmax took ")


def test_canvases_side_by_side_are_seen_whole_without_scrolling(opened):
    opened.one("#both").click()
    size = {"width": 1280, "height": 957, "deviceScaleFactor": 1, "mobile": False}
    opened.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened.ask()
        opened.finished(lanes=2)
        where = "return [...document.querySelectorAll('.canvas, #transport')].map((x) => x.getBoundingClientRect())"
        *canvases, bar = opened.browser.execute_script(f"scrollTo(0, 0); {where}")
        assert len(canvases) == 2 and len(opened.all(".lane:first-child .cell")) >= 64
        assert all(canvas["top"] > 0 and canvas["bottom"] < bar["top"] for canvas in canvases) and bar["bottom"] <= 957
    finally:
        opened.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_empty_prompt_says_so_and_a_refusal_keeps_what_is_there(opened):
    assert "Ctrl+Enter" in opened.one("label[for=prompt]").text
    opened.ask()
    opened.finished()
    answer, where = opened.one(".answer").text, opened.one("#where").text
    for prompt, others, message in (
        ("  ", "", "the prompt is empty"),
        (QUESTION, '{"max_nfe": 0}', "400: max_nfe=0"),
        ("long " * 4000, "", "400: messages has 20000 characters"),
    ):
        opened.set(others=others)
        opened.browser.execute_script("document.getElementById('prompt').value = arguments[0]", prompt)
        opened.one("#prompt").send_keys(Keys.CONTROL + Keys.ENTER)
        opened.until(lambda message=message: opened.one("#error").text.startswith(message))
        assert (opened.one(".answer").text, opened.one("#where").text) == (answer, where) and answer
        opened.until(lambda: opened.one("#start").is_enabled())
    opened.set(others="")
    opened.ask()
    opened.finished()
    assert not opened.one("#error").is_displayed()


def test_a_narrow_screen_shows_it_all_without_scrolling_sideways(opened):
    opened.one("#both").click()
    opened.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        opened.ask()
        opened.finished(lanes=2)
        assert opened.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        lanes = opened.all(".lane")
        assert lanes[0].rect["x"] == lanes[1].rect["x"] and lanes[0].rect["y"] < lanes[1].rect["y"]
    finally:
        opened.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_and_light_show_the_same_canvas_in_colours_of_their_own(opened):
    opened.ask()
    opened.finished()
    shown = "return ['body', '.lane .cell'].map((x) => getComputedStyle(document.querySelector(x)).backgroundColor)"
    light = opened.browser.execute_script(shown)

    def dim(scheme):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]}
        opened.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    dim("dark")
    opened.until(lambda: not set(opened.browser.execute_script(shown)) & set(light))
    dim("light")
    opened.until(lambda: opened.browser.execute_script(shown) == light)
    opened.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_running_request_is_seen_live_and_aborted(opened, server):
    opened.set(max_tokens="440", others='{"ignore_eos": true}')
    opened.write("[name=accept_threshold]", "1")  # a token a forward
    opened.ask()
    opened.until(lambda: len(opened.cells("filled")) > 1)
    assert opened.all(".lane[data-state=denoising]")
    opened.one("#abort").click()
    opened.until(lambda: opened.all(".lane[data-state=aborted]"))
    opened.until(lambda: server.metric("kv_pages_used") == 0)
    assert not opened.one("#abort").is_enabled() and not opened.one("#error").is_displayed()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", "-1", "400: temperature=-1.0 must be finite and at least 0"),
        ("seed", "many", "400: seed: Input should be a valid integer"),
        ("others", '{"colour": "red"}', "400: the field 'colour' is unknown or not supported"),
        ("others", "red", "other settings must be a JSON object"),
    ],
)
def test_a_bad_setting_is_an_error_that_names_it(opened, field, value, message):
    opened.set(**{field: value})
    opened.ask()
    opened.until(lambda: opened.one("#error").is_displayed())
    assert opened.one("#error").text.startswith(message)
    blamed = [element.get_attribute("name") for element in opened.all("[aria-invalid=true]")]
    assert blamed == ([] if "colour" in value else [field])
    opened.until(lambda: opened.one("#start").is_enabled())  # and another try is possible


def test_a_server_that_is_gone_is_an_error(opened):
    opened.browser.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    opened.ask()
    opened.until(lambda: opened.one("#error").is_displayed())
    assert opened.one("#error").text == "the server cannot be reached"


class Words:
    """A tokenizer whose tokens are characters; one is an attack."""

    @staticmethod
    def piece(token):
        return {ord("!"): "</script><b>"}.get(token, chr(token))

    def decode(self, ids):
        return "".join(map(self.piece, ids))

    def spelled(self, ids):
        return [Part("<user>", True), Part(self.decode(ids), False)]


def recorded(*windows: str, answer: str) -> Output:
    """An output whose forwards left these windows of four behind a prompt of two tokens: letters, ``_`` masked, a capital edited."""
    steps = []
    for start, text in ((4 * int(window[0]), window[1:]) for window in windows):
        tokens, masked = np.array([ord(c.lower()) for c in text]), np.array([c == "_" for c in text])
        edited = np.array([c.isupper() for c in text])
        steps.append(TraceStep(start, tokens, masked, np.where(masked, 0, 0.5), edited, np.zeros(4, bool)))
    return Output(
        text=Words().decode(ids := list(map(ord, answer))),
        token_ids=ids,
        finish_reason="length",
        nfe=len(steps),
        revised_tokens=1,
        remasked_tokens=0,
        prompt_token_ids=[112, 33],
        seconds=1.5,
        queue_seconds=0.0,
        first_block_seconds=0.5,
        seed=0,
        trace=steps,
    )


@pytest.mark.sweep
def test_a_replay_is_a_file_with_the_same_canvases_that_reaches_no_host(browser, tmp_path):
    slow, fast = recorded("0ppa_", "0ppaX", "1c___", "1c!__", answer="axc!"), recorded("0ppab", "1c!__", answer="abc!")
    file = tmp_path / "race.html"
    file.write_text(viz.replay({"slow": slow, "fast": fast}, tokenizer=Words()), encoding="utf-8")
    browser.get_log("browser")
    page = Page(browser, file.as_uri())
    page.finished(lanes=2)  # it plays by itself
    assert [lane.text for lane in page.all("h2 b")] == ["slow", "fast"]
    assert [asked.text for asked in page.all(".asked")] == ["<user>p</script><b>"] * 2
    assert [part.text for part in page.all(".asked i")] == ["<user>"] * 2  # set apart
    assert [answer.get_property("textContent") for answer in page.all(".answer")] == ["axc</script><b>", "abc</script><b>"]
    assert "fast took 2 forwards where slow took 4: 2.0 times fewer." in page.one("#comparison").text
    assert [len(block.find_elements(By.CSS_SELECTOR, ".cell")) for block in page.all(".lane:first-child .block")] == [2, 2]
    assert page.one("[data-figure=seconds]").text == "1.50"
    page.scrub_to(2)
    assert [cell.text for cell in page.cells("filled")] == ["a", "x"] and len(page.all(".cell[data-event=edited]")) == 1
    assert page.one("[data-figure=seconds]").text == "–" and not page.all("form, #error, #server")
    assert page.browser.execute_script("return fetch('data:,x').then(() => 'open', () => 'closed')") == "closed"
    log = [entry["message"] for entry in browser.get_log("browser")]
    assert all("data:,x" in message for message in log), log
