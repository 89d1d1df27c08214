"""The web app in uvicorn: SIGTERM in the middle of requests, and clients that disconnect."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from asyncembed.testing import EmbeddingServer, Hang, script
from tests.examples.held import Held
from tests.examples.server import WebApp, web_app

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

MODEL = {"EMBEDDING_MODEL": "text-embedding-3-small", "OPENAI_API_KEY": "any"}


@asynccontextmanager
async def started(folder: Path, provider: EmbeddingServer) -> AsyncIterator[WebApp]:
    with ExitStack() as stack:
        app = web_app(folder, OPENAI_BASE_URL=provider.base_url, **MODEL)
        yield await asyncio.to_thread(stack.enter_context, app)  # in a thread: the provider runs in this loop


async def refuses(url: str) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    except ConnectionRefusedError:
        return True
    writer.close()
    await writer.wait_closed()
    return False


async def test_after_sigterm_open_requests_are_answered_and_new_ones_refused(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with EmbeddingServer() as provider, started(tmp_path, provider) as app:
        provider.faults = script([], then=Held(gate))
        async with httpx.AsyncClient(base_url=app.url, timeout=30) as client, asyncio.TaskGroup() as group:
            document = group.create_task(client.put("/documents/a.txt", content="one text"))
            await provider.until(lambda: provider.in_flight == 1)
            searches = []
            for number in range(2):  # one after the other, so that they do not share a request
                searches.append(group.create_task(client.get(f"/search?q=question-{number}")))
                await provider.until(lambda number=number: provider.in_flight == 2 + number)

            app.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(app.wait_for, "Waiting for connections to close")
            assert await refuses(app.url)
            gate.set()
        code = await asyncio.to_thread(app.wait)
    assert document.result().status_code == 200
    assert document.result().json()["stored"] == 1
    assert [search.result().status_code for search in searches] == [200, 200]
    assert code == -signal.SIGTERM, app.log  # uvicorn exits by the signal, which a shell shows as 143
    assert "Application shutdown complete" in app.log
    assert "Traceback" not in app.log


async def test_a_client_that_disconnects_ends_only_its_own_search(tmp_path: Path) -> None:
    async with EmbeddingServer() as provider, started(tmp_path, provider) as app:
        provider.faults = script([Hang()])
        provider.clear()
        async with httpx.AsyncClient(base_url=app.url, timeout=30) as client:
            leaving = asyncio.create_task(client.get("/search?q=the-impatient"))
            await provider.until(lambda: provider.in_flight == 1)
            staying = asyncio.create_task(client.get("/search?q=the-patient"))
            await provider.until(lambda: len(provider.requests) == 2)
            leaving.cancel()
            assert (await staying).status_code == 200
            await provider.until(lambda: provider.in_flight == 0)
            assert (await client.get("/health")).status_code == 200
        app.process.terminate()
        await asyncio.to_thread(app.wait)
    assert "Application shutdown complete" in app.log
    assert "Traceback" not in app.log
