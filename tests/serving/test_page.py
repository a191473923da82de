"""The chat page in a real browser, against a server that answers by a script. Skipped where there is no Chromium."""

import asyncio
import json
import threading
from pathlib import Path

import pytest

from deepseek_jax.serving.page import FOLDER, page_files
from tests.support.browser import open_browser
from tests.support.http_script import Reply, reply_events, reply_json, serving

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ANSWER = f"""Some **bold** text with `code` and {HOSTILE}

1. first
2. second
   - nested [link](https://example.org) and [bad](javascript:document.title='owned')

```python
def f(x):
    return "{HOSTILE}"
```

| a | b |
|---|---|
| 1 | 2 |
"""
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 42,
    "completion_tokens_details": {"accepted_prediction_tokens": 15, "rejected_prediction_tokens": 5},
}
ALONE = "document.querySelector('#send').hidden === false"
LAST = "document.querySelector('#messages > li:last-child')"


class Script:
    """What the server does, and what it was asked."""

    def __init__(self):
        self.key, self.chat, self.asked, self.left = None, True, [], threading.Event()

    async def __call__(self, asked):
        if asked.path in (files := page_files()):
            return Reply(200, files[asked.path].headers, files[asked.path].body)
        if self.key and asked.headers.get("authorization") != f"Bearer {self.key}":
            return reply_json({"error": {"message": "Give the API key of this server."}}, 401)
        if asked.path == "/v1/models":
            return reply_json({"data": [{"id": "tiny", "max_model_len": 256}]})
        body = json.loads(asked.body)
        self.asked.append(body)
        if asked.path == "/v1/completions":
            return reply_events(self.texts(["x = ", "<b>1</b>\n"]))
        if not self.chat:
            error = {"message": "This model has no chat template.", "code": "no_chat_template"}
            return reply_json({"error": error}, 400)
        said = body["messages"][-1]["content"]
        if said == "refuse":
            return reply_json({"error": {"message": "max_tokens=<b>0</b> is too small"}}, 400)
        return reply_events({"break": self.broken, "wait": self.endless}.get(said, self.whole)())

    @staticmethod
    def event(**choice):
        return b"data: %b\n\n" % json.dumps({"choices": [choice] if choice else [], "usage": None}).encode()

    async def texts(self, texts):
        for text in texts:
            yield self.event(text=text)
            await asyncio.sleep(0.01)
        yield self.event(finish_reason="length")
        yield b"data: [DONE]\n\n"

    async def whole(self):
        yield b": ping\n\n"
        for word in ("Let me ", "think."):
            yield self.event(delta={"reasoning_content": word})
            await asyncio.sleep(0.02)
        for start in range(0, len(ANSWER), 16):
            yield self.event(delta={"content": ANSWER[start : start + 16]})
            await asyncio.sleep(0.002)
        yield self.event(delta={}, finish_reason="stop")
        yield b"data: %b\n\n" % json.dumps({"choices": [], "usage": USAGE}).encode()
        yield b"data: [DONE]\n\n"

    async def broken(self):
        yield self.event(delta={"content": "Half an"})
        yield b'data: {"error": {"message": "The cache is full."}}\n\n'

    async def endless(self):
        try:
            while True:
                yield self.event(delta={"content": "on and "})
                await asyncio.sleep(0.01)
        finally:
            self.left.set()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def page(browser, script):
    browser.complaints.clear()
    with serving(script) as url:
        browser.go(url, "document.title !== 'Chat' || !document.querySelector('#error').hidden")
        yield browser
        browser.ask("Page.navigate", url="about:blank")


def say(page, text):
    """Type a message, send it by the keyboard, and wait until the answer is there."""
    page.do("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.wait(ALONE)


def test_an_answer_is_shown_as_text_with_its_speed(page, script):
    say(page, "first line")
    assert page.do("document.title") == "tiny"  # nothing of the answer has run
    assert page.do(f"{LAST}.querySelectorAll('img, script').length") == 0
    assert page.do(f"{LAST}.querySelector('strong').textContent") == "bold"
    assert HOSTILE in page.do(f"{LAST}.querySelector('p').textContent")
    assert HOSTILE in page.do(f"{LAST}.querySelector('pre').textContent")
    assert page.do(f"[...{LAST}.querySelectorAll('a')].map((a) => a.href)") == ["https://example.org/"]
    assert page.do(f"[...{LAST}.querySelectorAll('li')].map((li) => li.dataset.marker)") == ["1.", "2.", "•"]
    assert page.do(f"{LAST}.querySelectorAll('td').length") == 2
    assert page.do(f"{LAST}.querySelector('details').open") is False
    assert page.do(f"{LAST}.querySelector('details > div').textContent") == "Let me think."
    assert page.do(f"{LAST}.querySelector('summary').textContent").startswith("Thought for")
    speed = page.do(f"{LAST}.querySelector('.speed').textContent")
    assert speed.startswith("42 tokens · first after") and "tokens/s · 75 % of 20 drafts accepted" in speed
    assert script.asked[-1] == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "messages": [{"role": "user", "content": "first line"}],
    }
    assert page.complaints == []


def test_the_conversation_goes_on_with_the_settings(page, script):
    page.do("document.querySelector('#show-settings').click()")
    for name, value in [("system", "Be brief."), ("temperature", "0.5"), ("top_p", "0.9"), ("max_tokens", "7")]:
        page.do(f"document.querySelector('[name={name}]').focus()")
        page.type(value)
    page.do("document.querySelector('#prompt').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    say(page, "two")
    page.do("document.querySelector('#again').click()")
    page.wait(ALONE)
    first, second = script.asked
    assert first == second  # made once more, from the same
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.5, 0.9, 7)
    assert [m["content"] for m in first["messages"]] == ["Be brief.", "one\ntwo"]
    assert page.do("document.querySelectorAll('#messages > li').length") == 2
    say(page, "three")
    assert [m["role"] for m in script.asked[-1]["messages"]] == ["system", "user", "assistant", "user"]
    assert script.asked[-1]["messages"][2]["content"] == ANSWER  # without its reasoning
    page.do("document.querySelector('#new-chat').click()")
    assert page.do("document.querySelectorAll('#messages > li').length") == 0
    page.ask("Page.reload")
    page.wait("document.title === 'tiny'")
    assert page.do("document.querySelector('[name=system]').value") == "Be brief."
    page.do("sessionStorage.clear()")


def test_escape_and_the_button_stop_an_answer_at_the_server_too(page, script):
    for stop in (lambda: page.press("Escape"), lambda: page.do("document.querySelector('#stop').click()")):
        script.left.clear()
        page.do("document.querySelector('#prompt').focus()")
        page.type("wait")
        page.press("Enter")
        page.wait(f"{LAST}.textContent.includes('on and on and')")
        stop()
        page.wait(ALONE)
        assert script.left.wait(120)  # the server saw the connection close
        assert "on and on" in page.do(f"{LAST}.textContent")  # what came stays
        assert page.do("document.querySelector('#error').hidden")


def test_errors_are_shown_and_nothing_is_lost(page, script):
    say(page, "refuse")
    assert page.do("document.querySelector('#error').textContent") == "max_tokens=<b>0</b> is too small"
    assert page.do("document.querySelectorAll('#messages > li').length") == 1
    say(page, "break")
    assert page.do("document.querySelector('#error').textContent") == "The cache is full."
    assert "Half an" in page.do(f"{LAST}.textContent")
    say(page, "fine")
    assert page.do("document.querySelector('#error').hidden")


def test_a_server_with_a_key(browser, script):
    script.key = "sesame"
    with serving(script) as url:
        browser.go(url, "!document.querySelector('#error').hidden")
        assert browser.do("document.querySelector('#error').textContent") == "Give the API key of this server."
        browser.wait("document.activeElement === document.querySelector('[name=key]')")
        browser.type("sesame")
        browser.press("Tab")
        browser.wait("document.title === 'tiny' && document.querySelector('#error').hidden")
        say(browser, "hello")
        assert "bold" in browser.do(f"{LAST}.textContent")
        assert browser.do("localStorage.length") == 0 and "sesame" in browser.do("sessionStorage.getItem('settings')")
        browser.do("sessionStorage.clear()")


def test_a_base_model_continues_the_text(page, script):
    script.chat = False
    say(page, "def f():\n    ")
    assert page.do(f"{LAST}.querySelector('.text').textContent") == "x = <b>1</b>\n"
    assert "continues your text" in page.do("document.querySelector('#notice').textContent")
    say(page, "y")
    assert script.asked[-1]["max_tokens"] == 64  # of 256 positions
    assert script.asked[-1]["prompt"] == "def f():\n    x = <b>1</b>\ny"


@pytest.mark.parametrize("width", [320, 400, 1000])
def test_nothing_is_cut_off_at_any_width(page, width):
    page.look(width, 640, dark=False)
    page.do("document.querySelector('#show-settings').click()")
    say(page, "a" * 200)
    assert page.do("document.documentElement.scrollWidth <= innerWidth")
    assert page.do("document.querySelector('#composer').getBoundingClientRect().bottom <= innerHeight")
    page.look(1000, 800, dark=False)


def test_everything_has_a_name(page):
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter((field) =>
        !(field.labels?.length || field.ariaLabel || field.textContent.trim())).map((field) => field.outerHTML)"""
    assert page.do(unnamed) == []
    assert page.do("document.documentElement.lang") == "en"


def test_the_page_needs_nothing_from_elsewhere():
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert not [part for part in ("http://", "//cdn", "innerHTML", "eval(") if part in text], path.name
    policy = page_files()["/"].headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert set(page_files()) == {"/", "/page.css", "/page.js", "/markdown.js", "/stream.js", "/view.js"}


if __name__ == "__main__":  # pictures to look at: python tests/serving/test_page.py FOLDER
    import sys
    import tempfile

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open_browser(Path(profile)) as shown,
        serving(Script()) as address,
    ):
        for name, size in {"wide": (1000, 800), "phone": (390, 800)}.items():
            for dark in (False, True):
                shown.look(*size, dark=dark)
                shown.go(address, "document.title === 'tiny'")
                say(shown, "Write me a *function* that does it, and say why.")
                shown.screenshot(Path(sys.argv[1]) / f"{name}_{'dark' if dark else 'light'}.png")
                shown.do("document.querySelector('#show-settings').click()")
                say(shown, "refuse")
                shown.screenshot(Path(sys.argv[1]) / f"{name}_{'dark' if dark else 'light'}_settings.png")
