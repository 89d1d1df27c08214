"""`tokens`: exact counters agree with each other, bytes bound them, and loading a vocabulary is bounded in time."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncembed.batching import tokens
from asyncembed.batching.tokens import (
    MAX_BYTES_PER_TOKEN,
    ByteBound,
    TiktokenCounter,
    TokenCounter,
    ToktokCounter,
    load_counter,
)

ENCODING = "cl100k_base"

TEXTS = [
    "a",
    "The quick brown fox jumps over the lazy dog, didn't it?",
    "naïve café, Ünïcödé — “quotes”…",
    "日本語のテキストと中文文本以及한국어。",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 and 😀" * 5,
    "مرحبا בעולם नमस्ते",
    " " * 500 + "x" + "\n" * 300 + "\t\t\r\n \u00a0\u2003",
    "0123456789" * 50,
    "<|endoftext|> <|fim_prefix|>",
    "e\u0301" * 200,
    "\x00\x01\x7f\ufeff\U0010ffff",
    "def f(x):\n    return {'k': [x**2 for x in range(10)]}\n" * 20,
    "a" * 3_000,
]

some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@pytest.fixture
def tiktoken_folder(tiktoken_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache))
    return tiktoken_cache


@pytest.fixture
def fresh_vocabularies() -> Iterator[None]:
    """Clear the vocabularies that the module has loaded, before and after a test."""
    for cache in (tokens._loading, tokens._no_vocabulary):
        cache.cache_clear()
    yield
    for cache in (tokens._loading, tokens._no_vocabulary):
        cache.cache_clear()


@pytest.fixture(params=["toktok", "tiktoken", "bytes"])
def counter(request: pytest.FixtureRequest, tiktoken_folder: Path) -> TokenCounter:
    if request.param == "bytes":
        return ByteBound()
    return ToktokCounter(ENCODING) if request.param == "toktok" else TiktokenCounter(ENCODING)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(some_text, min_size=1, max_size=5))
def test_the_fast_counter_and_tiktoken_agree(tiktoken_folder: Path, texts: list[str]) -> None:
    exact = TiktokenCounter(ENCODING).count(texts + TEXTS)
    assert ToktokCounter(ENCODING).count(texts + TEXTS) == exact
    assert all(n <= bound for n, bound in zip(exact, ByteBound().count(texts + TEXTS), strict=True))
    assert all(n * MAX_BYTES_PER_TOKEN >= len(text.encode()) for n, text in zip(exact, texts + TEXTS, strict=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=some_text | st.sampled_from(TEXTS), most=st.integers(1, 60))
def test_a_cut_is_the_longest_beginning_within_the_token_limit(counter: TokenCounter, text: str, most: int) -> None:
    beginning = counter.cut(text, most)

    assert text.startswith(beginning)
    assert beginning
    assert len(beginning) == 1 or counter.count([beginning])[0] <= most
    if counter.count([text])[0] <= most:
        assert beginning == text
    else:
        # no token too few: the rest begins with a character that did not fit, or the cut has split a token
        assert counter.count([beginning])[0] >= min(most, len(beginning)) - 8


def test_special_tokens_are_ordinary_text(counter: TokenCounter) -> None:
    assert counter.count(["<|endoftext|>"])[0] > 1


def test_a_million_spaces_are_counted_by_both_counters(counter: TokenCounter) -> None:
    text = " " * 1_000_000 + "x"  # tiktoken's regex overflows on it

    (count,) = counter.count([text])

    assert count == (1_000_001 if not counter.exact else pytest.approx(7_814, abs=1))
    assert counter.count([counter.cut(text, 100)])[0] <= 100


async def test_for_a_model_without_a_known_tokenizer_bytes_are_counted() -> None:
    assert isinstance(await load_counter(None), ByteBound)


async def test_the_fast_counter_is_preferred(fresh_vocabularies: None) -> None:
    assert isinstance(await load_counter(ENCODING), ToktokCounter)


async def test_tiktoken_is_used_where_the_fast_counter_is_not_installed(
    fresh_vocabularies: None, tiktoken_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "toktok", None)
    counter = await load_counter(ENCODING)
    assert isinstance(counter, TiktokenCounter)
    assert counter.count(["hello world"]) == [2]


def test_without_vocabulary_and_network_bytes_are_counted_and_one_warning_is_logged(tmp_path: Path) -> None:
    program = """
import asyncio, json, logging, sys, time
sys.modules["toktok"] = None
from asyncembed.batching.tokens import load_counter
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("asyncembed").addHandler(handler)
async def main():
    counters = [await load_counter("cl100k_base"), await load_counter("cl100k_base")]
    return [type(counter).__name__ for counter in counters]
print(json.dumps([asyncio.run(main()), asyncio.run(main()), lines]))
"""
    nowhere = "http://127.0.0.1:9"  # port 9 is discard: no server listens there
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={
            **os.environ,
            "TIKTOKEN_CACHE_DIR": str(tmp_path / "missing"),
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), nowhere),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    first, second, lines = json.loads(done.stdout)
    assert first == second == ["ByteBound", "ByteBound"]
    assert len(lines) == 1
    assert "no vocabulary for cl100k_base" in lines[0]


class SlowLoad:
    """A loader that returns when `may_return` is set."""

    def __init__(self) -> None:
        self.may_return = threading.Event()
        self.loads = 0

    def __call__(self, encoding: str) -> TokenCounter:
        self.loads += 1
        self.may_return.wait()
        return ToktokCounter(encoding)


@pytest.fixture
def slow_load(fresh_vocabularies: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowLoad]:
    load = SlowLoad()
    monkeypatch.setattr(tokens, "_load", load)
    yield load
    load.may_return.set()


async def test_a_cancelled_waiter_does_not_cancel_the_others(slow_load: SlowLoad) -> None:
    leaving, staying = (asyncio.create_task(load_counter(ENCODING)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving

    slow_load.may_return.set()

    assert isinstance(await staying, ToktokCounter)
    assert isinstance(await load_counter(ENCODING), ToktokCounter)
    assert slow_load.loads == 1


async def test_a_hanging_download_is_waited_for_once(
    slow_load: SlowLoad, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokens, "LOAD_TIMEOUT_S", 0.0)
    counters = [await load_counter(ENCODING) for _ in range(3)]
    assert [type(counter) for counter in counters] == [ByteBound] * 3
    assert len(caplog.records) == 1

    slow_load.may_return.set()  # a vocabulary that is loaded late is used
    await asyncio.to_thread(tokens._loading(ENCODING)[0].result, 30)
    assert isinstance(await load_counter(ENCODING), ToktokCounter)


async def test_loading_a_vocabulary_does_not_block_the_event_loop(slow_load: SlowLoad) -> None:
    loading = asyncio.create_task(load_counter(ENCODING))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not loading.done()
    slow_load.may_return.set()
    await loading
