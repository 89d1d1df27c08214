"""Controls Chromium through chromedriver with plain W3C WebDriver calls (w3.org/TR/webdriver2), without a library."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

_FLAGS = (
    "--headless",
    "--no-sandbox",  # so that it also runs as root; it opens only our own page
    "--disable-dev-shm-usage",  # containers often have a small /dev/shm, in which Chromium crashes
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=900,900",
)
# The timeout of `wait_for`.
_PATIENCE_MS = 20_000
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver's JSON
_KEYS = {"Enter": "\ue007", "ArrowDown": "\ue015", "ArrowUp": "\ue013"}

_WAIT = """
const [condition, patience, done] = arguments;
const test = new Function("return " + condition);
const end = Date.now() + patience;
(function look() {
  const found = test();
  if (found || Date.now() > end) done(found); else requestAnimationFrame(look);
})();
"""


class Browser:
    """One page in one window."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._client.request(method, f"/session/{self._session}/{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self.call("POST", "url", {"url": url})

    def ask(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.call("POST", "execute/sync", {"script": f"return {script}", "args": []})

    def wait_for(self, condition: str) -> Any:
        """Wait until a JavaScript expression is true; return its value."""
        found = self.call("POST", "execute/async", {"script": _WAIT, "args": [condition, _PATIENCE_MS]})
        assert found, f"{condition} did not become true; the page shows: {self.ask('document.body.innerText')}"
        return found

    def type(self, text: str, *, into: str | None = None) -> None:
        """Type a text, or a key by its name, into an element; None for the element with the focus."""
        target = (
            self.call("GET", "element/active")
            if into is None
            else self.call("POST", "element", {"using": "css selector", "value": into})
        )
        self.call("POST", f"element/{target[_ELEMENT]}/value", {"text": _KEYS.get(text, text)})

    def picture(self) -> bytes:
        """Return a screenshot of the window as PNG."""
        return base64.b64decode(self.call("GET", "screenshot"))


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start driver and browser with a new profile in the folder; stop both afterwards."""
    assert DRIVER is not None
    options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            with httpx.Client(base_url=_address(driver), timeout=60) as client:
                wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
                answer = client.post("/session", json=wanted).json()["value"]
                assert "sessionId" in answer, answer
                try:
                    browser = Browser(client, answer["sessionId"])
                    browser.call("POST", "timeouts", {"script": 2 * _PATIENCE_MS})
                    yield browser
                finally:
                    client.delete(f"/session/{answer['sessionId']}")
        finally:
            driver.terminate()


def _address(driver: subprocess.Popen[str]) -> str:
    assert driver.stdout is not None
    for line in driver.stdout:
        if found := re.search(r"started successfully on port (\d+)", line):
            return f"http://127.0.0.1:{found[1]}"
    raise AssertionError("chromedriver exited before it printed its port")
