"""The web app through its routes: documents, searches, failures, clients that disconnect."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from asyncembed.testing import EmbeddingServer, Hang, InvalidKey, Late, ServerError, poison, script
from examples.web_app.app import PAGE
from examples.web_app.settings import Settings
from tests.examples.conftest import OpenApp
from tests.stores import run_sql

HOUSE = """# Bread

Mix flour, water and salt, let the dough rest overnight, bake it hot.

# Bicycle

The rear wheel loses air: it needs a new inner tube.

# Garden

Sow tomatoes indoors in March, plant them out after the last frost.
"""
MODEL = "text-embedding-3-small"


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddingServer]:
    """The test server for embeddings; the app finds its address in the environment."""
    async with EmbeddingServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
        yield server


async def put(client: httpx.AsyncClient, name: str, text: str) -> dict[str, Any]:
    response = await client.put(f"/documents/{name}", content=text)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def ids(client: httpx.AsyncClient, question: str = "anything", k: int = 50) -> list[str]:
    response = await client.get("/search", params={"q": question, "k": k})
    assert response.status_code == 200, response.text
    return [hit["id"] for hit in response.json()["hits"]]


# ---- documents and searches ----


async def test_a_section_is_found_by_its_meaning(open_app: OpenApp, store: str) -> None:
    async with open_app(database_url=store) as client:
        assert await put(client, "house.md", HOUSE) == {
            "sections": 3,
            "stored": 3,
            "unchanged": 0,
            "deleted": 0,
            "failed": [],
            "tokens": 71,
        }
        response = await client.get("/search", params={"q": "how do I make a loaf?", "k": 2})
    best, second = response.json()["hits"]
    assert best["id"] == "house.md#bread-1"
    assert best["text"] == "# Bread\n\nMix flour, water and salt, let the dough rest overnight, bake it hot."
    assert best["metadata"]["heading"] == "Bread"
    assert 1 >= best["score"] > second["score"] >= -1


async def test_a_new_version_replaces_the_old_one_and_embeds_only_changed_sections(
    open_app: OpenApp, store: str
) -> None:
    async with open_app(database_url=store) as client:
        await put(client, "house.md", HOUSE)
        await put(client, "house.md.old", "Another document, whose name begins like the first one's.")
        changed = HOUSE.replace("a new inner tube", "a patch").replace("# Garden", "# Balcony")
        done = await put(client, "house.md", changed)
        assert (done["stored"], done["unchanged"], done["deleted"]) == (2, 1, 1)
        assert sorted(await ids(client)) == [
            "house.md#balcony-1",
            "house.md#bicycle-1",
            "house.md#bread-1",
            "house.md.old#1",
        ]


async def test_two_versions_of_a_document_are_stored_one_after_the_other(
    open_app: OpenApp, store: str, provider: EmbeddingServer
) -> None:
    first = "".join(f"# First {number}\n\nA text.\n" for number in range(20))
    async with open_app(embedding_model=MODEL, database_url=store) as client:
        provider.faults = script([], then=Late(0.05))  # long enough for the other version to interleave, if it could
        async with asyncio.TaskGroup() as both:
            both.create_task(put(client, "page.md", first))
            both.create_task(put(client, "page.md", first.replace("First", "Second")))
        assert provider.max_in_flight == 1
        assert len({id.split("-")[0] for id in await ids(client)}) == 1
        assert len(await ids(client)) == 20


async def test_a_document_without_text_deletes_the_stored_one(open_app: OpenApp, store: str) -> None:
    async with open_app(database_url=store) as client:
        await put(client, "house.md", HOUSE)
        assert (await put(client, "house.md", ""))["deleted"] == 3
        assert await ids(client) == []


async def test_a_search_in_an_empty_store_finds_nothing(open_app: OpenApp, store: str) -> None:
    async with open_app(database_url=store) as client:
        assert await ids(client) == []


async def test_concurrent_searches_share_requests(open_app: OpenApp, provider: EmbeddingServer) -> None:
    async with open_app(embedding_model=MODEL) as client:
        await put(client, "house.md", HOUSE)
        provider.clear()
        async with asyncio.TaskGroup() as group:
            found = [group.create_task(ids(client, section)) for section in HOUSE.split("\n\n")]
    assert len(provider.requests) <= 3  # the first is sent at once, at most two more while it is in flight
    for section, task in zip(HOUSE.split("\n\n"), found, strict=True):
        assert len(task.result()) == 3, section


async def test_a_repeated_question_is_answered_from_the_cache(open_app: OpenApp, provider: EmbeddingServer) -> None:
    async with open_app(embedding_model=MODEL) as client:
        await put(client, "house.md", HOUSE)
        first = await ids(client, "loaf")
        provider.clear()
        assert await ids(client, "loaf") == first
        assert provider.requests == []


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        pytest.param("GET", "/search?q=", b"", 422, id="an empty question"),
        pytest.param("GET", "/search", b"", 422, id="no question"),
        pytest.param("GET", "/search?q=x&k=51", b"", 422, id="too many results"),
        pytest.param("GET", "/search?q=%20", b"", 200, id="a blank is a question"),
        pytest.param("PUT", "/documents/a%23b", b"text", 422, id="a name with a hash"),
        pytest.param("PUT", "/documents/a", b"\xff\xfe", 415, id="not UTF-8"),
        pytest.param("PUT", "/documents/a", b"x" * 1_001, 413, id="too large"),
        pytest.param("PUT", "/documents/a", b"NUL \0", 422, id="a text that no store accepts"),
        pytest.param("POST", "/documents/a", b"text", 405, id="a POST, which a form on a foreign page could send"),
    ],
)
async def test_a_bad_request_gets_its_status(
    open_app: OpenApp, method: str, path: str, content: bytes, status: int
) -> None:
    async with open_app(max_document_bytes=1_000) as client:
        response = await client.request(method, path, content=content)
        assert response.status_code == status, response.text


# ---- failures ----


async def test_a_refused_section_is_reported_and_the_others_are_stored(
    open_app: OpenApp, provider: EmbeddingServer
) -> None:
    async with open_app(embedding_model=MODEL) as client:
        provider.faults = poison(lambda text: "Bicycle" in text)
        response = await client.put("/documents/house.md", content=HOUSE)
        assert response.status_code == 422
        assert [one["id"] for one in response.json()["failed"]] == ["house.md#bicycle-1"]
        assert sorted(await ids(client)) == ["house.md#bread-1", "house.md#garden-1"]


async def test_a_refused_api_key_is_a_502_and_is_not_shown(open_app: OpenApp, provider: EmbeddingServer) -> None:
    async with open_app(embedding_model=MODEL, check_every_s=0) as client:
        provider.faults = script([], then=InvalidKey())
        found = await client.get("/search", params={"q": "bread"})
        stored = await client.put("/documents/house.md", content=HOUSE)
        health = await client.get("/health")
    assert (found.status_code, stored.status_code) == (502, 502)
    assert "sk-" not in found.text + stored.text + health.text
    assert health.status_code == 503
    assert health.json() == {"provider": "AuthenticationError", "store": "ok", "model": MODEL, "latency_s": None}


async def test_the_app_starts_without_its_provider_and_health_reports_its_return(
    open_app: OpenApp, provider: EmbeddingServer
) -> None:
    provider.faults = script([], then=ServerError())
    async with open_app(embedding_model=MODEL, check_every_s=0) as client:
        away = await client.get("/health")
        provider.faults = script([])
        back = await client.get("/health")
    assert (away.status_code, away.json()["provider"]) == (503, "ServerError")
    assert (back.status_code, back.json()["provider"]) == (200, "ok")


async def test_a_search_past_its_deadline_is_cancelled(open_app: OpenApp, provider: EmbeddingServer) -> None:
    async with open_app(embedding_model=MODEL, search_deadline_s=0.05) as client:
        provider.faults = script([], then=Hang())
        response = await client.get("/search", params={"q": "bread"})
        assert response.status_code == 504
        await provider.until(lambda: provider.in_flight == 0)


async def test_a_search_over_the_queue_limit_gets_503_with_retry_after(
    open_app: OpenApp, provider: EmbeddingServer
) -> None:
    async with open_app(embedding_model=MODEL, max_waiting=2) as client, asyncio.TaskGroup() as group:
        provider.faults = script([], then=Hang())
        waiting = [group.create_task(client.get("/search", params={"q": f"bread {n}"})) for n in range(2)]
        await provider.until(lambda: provider.in_flight == 1)  # both searches share it
        response = await client.get("/search", params={"q": "one too many"})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        for task in waiting:
            task.cancel()


async def test_a_broken_store_is_reported_by_health(open_app: OpenApp, bare_dsn: str) -> None:
    async with open_app(database_url=bare_dsn, check_every_s=0) as client:
        assert await ids(client) == []
        healthy = await client.get("/health")
        run_sql(bare_dsn, "DROP TABLE embeddings")
        broken = await client.get("/health")
        found = await client.get("/search", params={"q": "bread"})
    assert (healthy.status_code, healthy.json()["provider"], healthy.json()["store"]) == (200, "ok", "ok")
    assert (broken.status_code, broken.json()["provider"], broken.json()["store"]) == (503, "ok", "SinkConfigError")
    assert found.status_code == 503


async def test_concurrent_health_probes_share_one_check(open_app: OpenApp, provider: EmbeddingServer) -> None:
    async with open_app(embedding_model=MODEL) as client:
        async with asyncio.TaskGroup() as group:
            probes = [group.create_task(client.get("/health")) for _ in range(10)]
        assert [probe.result().status_code for probe in probes] == [200] * 10
    assert len(provider.requests) == 1  # from the start of the app


# ---- clients that disconnect ----


async def ask_and_leave(
    client: httpx.AsyncClient, method: str, path: str, messages: list[dict[str, Any]], left: asyncio.Event
) -> list[Any]:
    """Send these ASGI messages, disconnect when `left` is set, and return what the app sent."""
    sent: list[Any] = []
    messages = [*messages]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": []}
    app: Any = client._transport.app
    await app(scope, receive, send)
    return sent


async def test_a_search_whose_client_disconnects_is_cancelled_and_the_next_is_answered(
    open_app: OpenApp, provider: EmbeddingServer
) -> None:
    left = asyncio.Event()
    async with open_app(embedding_model=MODEL) as client:
        provider.faults = script([Hang()])
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask_and_leave(client, "GET", "/search?q=bread", [], left))
            await provider.until(lambda: provider.in_flight == 1)
            left.set()
        await provider.until(lambda: provider.in_flight == 0)
        assert asking.result()[0]["status"] == 499
        assert await ids(client) == []


async def test_an_incomplete_document_is_not_stored(open_app: OpenApp) -> None:
    left = asyncio.Event()
    left.set()
    async with open_app() as client:
        half: dict[str, Any] = {"type": "http.request", "body": b"# Half a", "more_body": True}
        sent = await ask_and_leave(client, "PUT", "/documents/half.md", [half], left)
        assert sent[0]["status"] == 499
        assert await ids(client) == []


async def test_a_document_is_stored_even_if_its_client_disconnects(
    open_app: OpenApp, provider: EmbeddingServer
) -> None:
    left = asyncio.Event()
    left.set()
    async with open_app(embedding_model=MODEL) as client:
        whole: dict[str, Any] = {"type": "http.request", "body": HOUSE.encode(), "more_body": False}
        sent = await ask_and_leave(client, "PUT", "/documents/house.md", [whole], left)
        assert sent[0]["status"] == 200
        assert len(await ids(client)) == 3


# ---- metrics and settings ----


async def test_each_line_of_the_metrics_has_a_name_and_a_number(open_app: OpenApp, provider: EmbeddingServer) -> None:
    async with open_app(embedding_model=MODEL) as client:
        await put(client, "house.md", HOUSE)
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.split(" ") for line in response.text.splitlines())
    assert float(lines["asyncembed_requests"]) == len(provider.requests) == 2  # one from the start of the app
    assert float(lines["asyncembed_tokens"]) == provider.total_tokens


async def test_the_page_loads_nothing_from_other_hosts(open_app: OpenApp) -> None:
    async with open_app() as client:
        response = await client.get("/")
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    assert response.text == PAGE
    assert not re.search(r"https?://|//cdn|@import|innerHTML", PAGE)


def test_settings_are_read_from_the_environment() -> None:
    read = Settings.read({"EMBEDDING_MODEL": "m", "PORT": "80", "SEARCH_DEADLINE_S": "0.5", "OTHER": "x"})
    assert read == Settings(embedding_model="m", port=80, search_deadline_s=0.5)
    with pytest.raises(ValueError, match="PORT is 'eighty'"):
        Settings.read({"PORT": "eighty"})


def test_the_repr_of_settings_hides_the_password() -> None:
    assert "secret" not in repr(Settings(database_url="postgresql://user:secret@host/db"))
