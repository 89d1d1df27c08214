"""The search page in a real browser, used by keyboard."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncembed.testing import EmbeddingServer, Fault, InvalidKey, script
from tests.examples.browser import CHROMIUM, DRIVER, Browser, chromium
from tests.examples.server import WebApp, web_app

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver")

DOCUMENT = """# Bread

Mix flour, water and salt, let the dough rest overnight, bake it hot.

# <b>Bold</b> claims

<img src=x onerror="document.title = 'broken in'"><script>document.title = 'broken in'</script> & other tricks.

# Bicycle

The rear wheel loses air: it needs a new inner tube.
"""
STATUS = "document.getElementById('status').textContent"
HITS = "[...document.querySelectorAll('#hits li')].map((hit) => hit.querySelector('.id').textContent)"
FOCUSED = "document.activeElement.querySelector('.id')?.textContent ?? document.activeElement.id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def app(tmp_path: Path) -> Iterator[WebApp]:
    with web_app(tmp_path) as app:
        yield app


@dataclass(frozen=True)
class Held(Fault):
    """The correct answer, sent when the gate is opened."""

    gate: threading.Event

    async def send(self, wire: Any, answer: Any) -> None:
        await asyncio.to_thread(self.gate.wait)
        await wire.send(answer)


def store(app: WebApp) -> None:
    httpx.put(f"{app.url}/documents/notes.md", content=DOCUMENT).raise_for_status()


def test_typing_a_question_shows_the_nearest_section_first(app: WebApp, browser: Browser) -> None:
    store(app)
    browser.open(app.url)
    browser.type("how do I make a loaf?")  # the question has the focus when the page opens
    browser.wait_for(f"{STATUS} === '3 sections, the nearest first'")
    assert browser.ask(HITS)[0] == "notes.md#bread-1"
    assert "let the dough rest" in browser.ask("document.querySelector('#hits li p').textContent")
    assert 0 < float(browser.ask("document.querySelector('#hits li .score').textContent")) <= 1
    assert browser.ask("document.title") == "how do I make a loaf? - Search"
    assert browser.ask("location.search") == "?q=how%20do%20I%20make%20a%20loaf%3F"


def test_a_link_to_a_search_shows_its_results(app: WebApp, browser: Browser) -> None:
    store(app)
    browser.open(f"{app.url}/?q=flat+tyre")
    browser.wait_for(f"{HITS}[0] === 'notes.md#bicycle-1'")
    assert browser.ask("document.getElementById('question').value") == "flat tyre"


def test_arrow_keys_move_through_the_results_and_slash_back_to_the_question(app: WebApp, browser: Browser) -> None:
    store(app)
    browser.open(f"{app.url}/?q=bread")
    first, second, _ = browser.wait_for(f"{HITS}.length === 3 && {HITS}")
    for key, focused in [
        ("ArrowDown", first),
        ("ArrowDown", second),
        ("ArrowUp", first),
        ("ArrowUp", "question"),
        ("ArrowUp", "question"),
        ("ArrowDown", first),
        ("/", "question"),
    ]:
        browser.type(key)
        assert browser.ask(FOCUSED) == focused
    assert browser.ask("document.getElementById('question').value") == "bread"  # the slash was not typed


def test_html_in_a_document_is_shown_as_text(app: WebApp, browser: Browser) -> None:
    store(app)
    browser.open(f"{app.url}/?q=tricks")
    browser.wait_for(f"{HITS}.length === 3")
    assert "<script>document.title = 'broken in'</script> & other" in browser.ask("document.body.innerText")
    assert browser.ask("document.querySelectorAll('#hits img, #hits b, #hits script').length") == 0
    assert browser.ask("document.title") == "tricks - Search"


def test_an_empty_store_shows_a_hint_and_a_document_can_be_added(app: WebApp, browser: Browser) -> None:
    browser.open(f"{app.url}/?q=bread")
    browser.wait_for(f"{STATUS}.startsWith('Nothing is stored yet')")
    browser.ask("document.getElementById('adding').open = true")
    browser.type("Mix flour, water and salt.", into="#text")
    browser.ask("document.getElementById('add').requestSubmit()")
    browser.wait_for(f"{HITS}[0] === 'notes.md#top-1'")
    added = browser.ask("document.getElementById('added').textContent")
    assert added == "1 section: 1 stored, 0 unchanged, 0 deleted."


def test_an_error_replaces_the_results(app: WebApp, browser: Browser) -> None:
    store(app)
    browser.open(f"{app.url}/?q=bread")
    browser.wait_for(f"{HITS}.length === 3")
    app.process.send_signal(signal.SIGTERM)
    app.wait()
    browser.type("Enter", into="#question")
    browser.wait_for(f"{STATUS} === 'The server cannot be reached.'")
    assert browser.ask(HITS) == []
    assert browser.ask("document.getElementById('status').className") == "bad"
    assert browser.ask("document.getElementById('hits').ariaBusy") == "false"


def test_the_page_shows_that_it_searches_and_what_failed(tmp_path: Path, browser: Browser) -> None:
    gate = threading.Event()
    environment = {"EMBEDDING_MODEL": "text-embedding-3-small", "OPENAI_API_KEY": "any"}
    with (
        EmbeddingServer().in_thread() as provider,
        web_app(tmp_path, OPENAI_BASE_URL=provider.base_url, **environment) as app,
        ExitStack() as stack,
    ):
        stack.callback(gate.set)  # a failed test must not leave a waiting thread
        store(app)
        provider.faults = script([Held(gate)], then=InvalidKey())
        browser.open(f"{app.url}/?q=bread")
        browser.wait_for(f"{STATUS} === 'Searching …' && document.getElementById('hits').ariaBusy === 'true'")
        gate.set()
        browser.wait_for(f"{HITS}.length === 3 && document.getElementById('hits').ariaBusy === 'false'")
        browser.type(" and butter", into="#question")
        browser.wait_for(f"{STATUS} === 'The embedding service has failed. Try again later.'")
        assert browser.ask(HITS) == []
