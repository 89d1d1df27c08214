"""Canary keys, texts and passwords are sent through failures, and then searched for in everything that is shown."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from asyncembed import Embedder, open_sink
from asyncembed.errors import AsyncEmbedError
from asyncembed.providers.openai import OpenAIProvider
from asyncembed.testing import (
    Disconnect,
    EmbeddingServer,
    ErrorBody200,
    Fault,
    Garbage,
    Hang,
    Redirect,
    Reset,
    Status,
    WrongCount,
)

KEY = "sk-canary0123456789abcdefghijklmnopqrstuvwxyz"


TEXT = "the canary, a yellow bird, is called Joséphine\nand lives at 7 Cage Street"


PASSWORD = "canary-of-the-database"


# Parts of key, text and password, none of which may be shown. Nothing else here holds them.
CANARIES = ("canary", "0123456789", "abcdefgh", "uvwxyz", "Joséphine", "Jos\\u00e9phine", "Cage Street", "yellow bird")


class Seen:
    """Everything that was shown, and where."""

    def __init__(self) -> None:
        self.things: list[tuple[str, str]] = []

    def add(self, where: str, thing: object) -> None:
        self.things.append((where, str(thing)))

    def add_error(self, error: BaseException) -> None:
        """Add an error with its causes, contexts, group and result: as text, in full, and pickled."""
        todo, known = [error], set()
        while todo:
            one = todo.pop()
            if id(one) in known:
                continue
            known.add(id(one))
            self.add("str", str(one))
            self.add("repr", repr(one))
            self.add("fields", vars(one))
            todo.extend(other for other in (one.__cause__, one.__context__) if other is not None)
            todo.extend(one.exceptions if isinstance(one, BaseExceptionGroup) else ())
            todo.extend(failure.error for failure in getattr(getattr(one, "result", None), "failures", ()))
            if isinstance(one, AsyncEmbedError):
                self.add("pickle", pickle.dumps(one).decode("latin-1"))
        self.add("traceback", "".join(traceback.format_exception(error)))

    def assert_no_canary(self) -> None:
        assert self.things
        assert [
            (where, canary)
            for where, thing in self.things
            for canary in CANARIES
            if canary in thing.replace("Ã©", "é")  # UTF-8 in a pickle that is read as Latin-1
        ] == []


@pytest.fixture
def seen(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Seen]:
    """Collect output, warnings and the records of all loggers, the SDK's and httpx's too, while the test runs."""
    seen = Seen()
    caplog.set_level(logging.DEBUG)
    for name in ("asyncembed", "openai", "httpx2", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield seen
    for warning in caught:
        seen.add("warning", warning.message)
    for record in caplog.records:
        seen.add(f"log of {record.name}", record.getMessage())
        # httpcore masks the headers in its DEBUG messages; the arguments of its records are not ours to check
        if record.name.startswith("asyncembed"):
            seen.add(f"log arguments of {record.name}", record.args)
    for name, output in zip(("stdout", "stderr"), capfd.readouterr(), strict=True):
        seen.add(name, output)
    seen.assert_no_canary()


def echo(status: int, message: str) -> Fault:
    """An error whose message repeats what was sent."""
    return Status(status, message=message)


FAILURES = [
    pytest.param(echo(401, f"Incorrect API key provided: {KEY}."), id="401 with the key"),
    pytest.param(echo(401, f"Incorrect API key provided: {KEY[:9]}*****{KEY[-4:]}."), id="401 with the key's ends"),
    pytest.param(echo(401, f"bad header Authorization: Bearer {KEY}"), id="401 with the header"),
    pytest.param(echo(400, f"cannot embed {TEXT}"), id="400 with the text"),
    pytest.param(echo(400, f"cannot embed {TEXT!r}"), id="400 with the text's repr"),
    pytest.param(echo(400, "x" * 270 + TEXT), id="400 with the text where it is cut off"),
    pytest.param(
        Status(422, body=json.dumps({"detail": [{"type": "value_error", "input": [TEXT], "msg": "no"}]})),
        id="422 with the request",
    ),
    pytest.param(echo(500, f"unsupported value: NaN for {TEXT}"), id="500 with the text"),
    pytest.param(Status(429, message=f"{KEY} is out of money", code="insufficient_quota"), id="quota with the key"),
    pytest.param(Status(400, code=KEY, type=TEXT), id="key and text as codes"),
    pytest.param(Status(413, body=f"<html>{TEXT} {KEY}</html>"), id="a page with both"),
    pytest.param(Redirect(f"http://127.0.0.1:1/?key={KEY}"), id="a redirect with the key"),
    pytest.param(Garbage(TEXT.encode() + KEY.encode()), id="both as the body of a reply"),
    pytest.param(ErrorBody200(), id="an error with 200"),
    pytest.param(WrongCount(), id="a wrong count"),
    pytest.param(Reset(), id="reset"),
    pytest.param(Disconnect("mid-body"), id="closed"),
    pytest.param(Hang(), id="silence"),
]


@pytest.mark.parametrize("fault", FAILURES)
async def test_no_failure_shows_the_key_or_a_text(seen: Seen, fault: Fault) -> None:
    async with EmbeddingServer(faults=lambda _: fault, dimensions=8) as server:
        provider = OpenAIProvider("m", base_url=server.base_url, api_key=KEY, timeout=0.5)
        embedder = Embedder("m", base_url=server.base_url, api_key=KEY, max_retries=0, timeout=0.5)
        for each in (embedder, provider):
            with pytest.raises(AsyncEmbedError) as caught:
                await each.embed([TEXT])
            seen.add_error(caught.value)
            await each.aclose()


async def test_no_repr_and_no_result_shows_the_key_or_a_text(seen: Seen) -> None:
    async with EmbeddingServer(dimensions=8) as server:
        provider = OpenAIProvider("m", base_url=server.base_url, api_key=KEY)
        embedder = Embedder("m", provider=provider)
        result = await embedder.embed([TEXT])
        for thing in (embedder, provider, result, await embedder.plan([TEXT])):
            seen.add("repr", repr(thing))
            seen.add("str", str(thing))
        await embedder.aclose()


async def test_a_refused_connection_shows_neither_key_nor_text(seen: Seen) -> None:
    async with Embedder("m", base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0) as embedder:
        with pytest.raises(AsyncEmbedError) as caught:
            await embedder.embed([TEXT])
    seen.add_error(caught.value)


async def test_failures_of_a_users_client_show_neither_key_nor_text(seen: Seen) -> None:
    faults = [echo(401, f"Incorrect API key provided: {KEY}"), Reset(), echo(400, TEXT)]
    async with EmbeddingServer(faults=faults, dimensions=8) as server, httpx2.AsyncClient() as http_client:
        provider = OpenAIProvider("m", base_url=server.base_url, api_key=KEY, http_client=http_client)
        for _ in faults:
            with pytest.raises(AsyncEmbedError) as caught:
                await provider.embed([TEXT])
            seen.add_error(caught.value)


async def test_a_key_that_a_function_returns_is_not_shown(seen: Seen) -> None:
    async def key() -> str:
        return KEY

    async with EmbeddingServer(faults=[echo(401, f"Incorrect API key provided: {KEY}")]) as server:
        embedder = Embedder("m", base_url=server.base_url, api_key=key)
        with pytest.raises(AsyncEmbedError) as caught:
            await embedder.embed([TEXT])
    seen.add_error(caught.value)


async def test_a_key_with_a_newline_inside_is_not_shown(seen: Seen) -> None:
    async def key() -> str:
        return f"{KEY}\n{KEY}"

    with pytest.raises(AsyncEmbedError) as caught:
        Embedder("m", api_key=f"{KEY}\n{KEY}")
    seen.add_error(caught.value)
    with pytest.raises(AsyncEmbedError) as caught:
        await Embedder("m", base_url="http://127.0.0.1:9/v1", api_key=key).embed([TEXT])
    seen.add_error(caught.value)


async def test_an_invalid_proxy_is_reported_without_its_password(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"nonsense://user:{PASSWORD}@127.0.0.1:9")
    with pytest.raises(AsyncEmbedError, match="no client") as caught:
        await Embedder("m", api_key=KEY).embed([TEXT])
    seen.add_error(caught.value)


async def test_an_embedder_cannot_be_pickled(seen: Seen) -> None:
    with pytest.raises(TypeError, match="make one in each process") as caught:
        pickle.dumps(Embedder("m", api_key=KEY))
    seen.add_error(caught.value)


async def test_a_cancelled_call_shows_neither_key_nor_text(seen: Seen) -> None:
    async with EmbeddingServer(faults=lambda _: Hang()) as server:
        embedder = Embedder("m", base_url=server.base_url, api_key=KEY)
        with pytest.raises(TimeoutError) as caught:
            await asyncio.wait_for(embedder.embed([TEXT]), 0.2)
        await embedder.aclose()
    seen.add_error(caught.value)


@pytest.mark.parametrize(
    "rest", ["@127.0.0.1:9/db", "/#@127.0.0.1:9/db", "@127.0.0.1:port/db", "@127.0.0.1:9/db?sslmode=nonsense", "@"]
)
async def test_the_password_of_a_store_is_not_shown(seen: Seen, rest: str) -> None:
    errors: list[Any] = []
    try:
        sink: Any = open_sink(f"postgresql://user:{PASSWORD}{rest}")
        seen.add("sink", repr(sink))
        async with sink:
            await sink.prepare("m", 8)
    except (AsyncEmbedError, ImportError) as error:
        errors.append(error)
    assert errors, "no server listens there"
    seen.add_error(errors[0])
