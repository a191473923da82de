"""A real browser without a window: Chromium, steered over two pipes by its own protocol (CDP). Nothing to install
beside it: Debian's `chromium`, or Chrome. Tests skip where there is none."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--remote-debugging-pipe")  # fmt: skip
SECONDS = 120  # that anything may take


class Browser:
    """One page of a browser."""

    def __init__(self, sending: int, receiving: int):
        self._sending, self._receiving, self._rest = sending, receiving, b""
        self._numbers, self._session = itertools.count(1), None
        self.complaints: list[str] = []  # errors of scripts, and what the page's policy refused
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params):
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._sending, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["source"] != "network":
                self.complaints.append(answer["params"]["entry"]["text"])
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            assert select.select([self._receiving], [], [], SECONDS)[0], "the browser does not answer"
            self._rest += os.read(self._receiving, 1 << 16)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def do(self, script: str):
        """Return the value of an expression in the page; promises are waited for."""
        result = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str):
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.do(script)):
            assert time.monotonic() < end, f"{script} did not come true"
            time.sleep(0.02)
        return value

    def go(self, url: str, ready: str) -> None:
        """Open a page and wait until an expression is true there."""
        self.ask("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete' && ({ready})")

    def type(self, text: str) -> None:
        """Type into the element that has the focus."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **event)

    def look(self, width: int, height: int, dark: bool) -> None:
        """Take on a window's size and the system's colours."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile; skips the test where the machine has none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if not program:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    (its_input, sending), (receiving, its_output) = os.pipe(), os.pipe()
    script = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
    arguments = ["bash", "-c", script, program, *SWITCHES, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        arguments,
        env=os.environ | {"TMPDIR": str(profile)},
        pass_fds=(its_input, its_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(sending, receiving)
    finally:
        with contextlib.suppress(OSError):
            os.write(sending, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(sending)
        os.close(receiving)
