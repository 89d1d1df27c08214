"""An `Embedder`'s life: its status line, its check, its end, and what happens if nobody ends it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from asyncembed import (
    AuthenticationError,
    Check,
    ConfigError,
    DeadlineError,
    Embedder,
    NotFoundError,
    ServerError,
    TransportError,
)
from asyncembed.errors import RateLimitedError
from asyncembed.testing import EmbeddingServer
from tests.fakes import FakeProvider, Script, vector_of


def make(script: Script | None = None, **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script)  # a request takes one second
    return Embedder("fake", provider=provider, **options), provider


def now() -> float:
    return asyncio.get_running_loop().time()


def test_the_status_line_needs_no_loop() -> None:
    embedder, _ = make()
    assert repr(embedder) == "<Embedder 'fake': 0 of 8 requests under way>"


@pytest.mark.virtual_time
async def test_the_status_line_tells_what_is_under_way_and_what_waits() -> None:
    embedder, _ = make(max_batch_size=1, concurrency=2)
    bulk = asyncio.create_task(embedder.embed(["a", "b", "c", "d", "e"]))
    single = asyncio.create_task(embedder.embed_one("f"))
    await asyncio.sleep(0.5)
    # one worker has the batch that goes next
    assert repr(embedder) == "<Embedder 'fake': 2 of 2 requests under way, 2 queued>"
    await asyncio.wait([bulk, single])
    assert repr(embedder) == "<Embedder 'fake': 0 of 2 requests under way>"


@pytest.mark.virtual_time
async def test_the_status_line_tells_of_a_pause() -> None:
    embedder, _ = make(lambda n, _: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0) if n == 0 else None)
    call = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(2)
    assert "1 queued, paused for " in repr(embedder)
    await call


@pytest.mark.virtual_time
async def test_a_bulk_call_under_way_is_waited_for_when_the_embedder_is_closed() -> None:
    embedder, provider = make(max_batch_size=1, concurrency=1)
    bulk = asyncio.create_task(embedder.embed([f"text {n}" for n in range(5)]))
    await asyncio.sleep(0.5)
    await embedder.aclose()
    assert provider.closed
    np.testing.assert_array_equal((await bulk).embeddings[4], vector_of("text 4"))


@pytest.mark.virtual_time
async def test_a_bulk_call_that_takes_longer_than_the_grace_ends_with_what_it_has() -> None:
    embedder, provider = make(max_batch_size=100, concurrency=1)
    bulk = asyncio.create_task(embedder.embed([f"text {n}" for n in range(500)]))
    await asyncio.sleep(0.5)
    began = now()
    await embedder.aclose(grace=2.0)
    assert now() - began == pytest.approx(2.0, abs=0.01)
    with pytest.raises(TransportError, match="closed") as caught:
        await bulk
    assert len(caught.value.result.failures) == 300
    assert provider.in_flight == 0


@pytest.mark.virtual_time
async def test_leaving_with_an_error_waits_for_nobody() -> None:
    embedder, _ = make()
    with pytest.raises(LookupError):
        async with embedder:
            call = asyncio.create_task(embedder.embed_one("a"))
            await asyncio.sleep(0.5)
            began = now()
            raise LookupError
    assert now() - began < 0.01
    assert isinstance((await asyncio.wait([call]))[0].pop().exception(), TransportError)


@pytest.mark.virtual_time
async def test_a_stream_that_nobody_reads_any_more_does_not_hold_up_closing() -> None:
    embedder, provider = make(max_batch_size=10, concurrency=2)
    items = embedder.stream(f"text {n}" for n in range(1_000))
    assert (await anext(items)).record.id == 0
    began = now()
    await embedder.aclose()
    assert now() - began < 0.01
    assert provider.in_flight == 0
    with pytest.raises(TransportError, match="closed"):
        async for _ in items:
            pass
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_an_embedder_that_was_closed_can_be_used_again() -> None:
    embedder, _ = make()
    await embedder.aclose()
    np.testing.assert_array_equal(await embedder.embed_one("a"), vector_of("a"))


async def test_a_check_proves_key_model_and_dimensions_with_one_request() -> None:
    with EmbeddingServer(dimensions=8).in_thread() as server:
        async with Embedder("any", base_url=server.base_url, api_key="key") as embedder:
            check = await embedder.check()
        assert len(server.requests) == 1
    assert check == Check("any", 8, 1, check.latency_s)
    assert check.latency_s > 0


@pytest.mark.parametrize(("status", "kind"), [(401, AuthenticationError), (404, NotFoundError), (500, ServerError)])
async def test_a_check_raises_what_the_provider_answers_and_repeats_nothing(status: int, kind: type[Exception]) -> None:
    _, provider = failing = make(lambda *_: kind(f"HTTP {status}", status=status))  # type: ignore[call-arg]
    with pytest.raises(kind):
        await failing[0].check()
    assert len(provider.requests) == 1


async def test_a_check_tells_of_another_size_than_the_models() -> None:
    class OfficialLooking(FakeProvider):
        host = "api.openai.com"

    embedder = Embedder("text-embedding-3-small", provider=OfficialLooking(latency_s=0))
    with pytest.raises(ConfigError, match="4 dimensions; text-embedding-3-small has 1536"):
        await embedder.check()


@pytest.mark.virtual_time
async def test_a_check_goes_before_a_bulk_job_and_keeps_a_pause() -> None:
    embedder, _ = make(max_batch_size=1, concurrency=1)
    bulk = asyncio.create_task(embedder.embed([f"text {n}" for n in range(100)]))
    await asyncio.sleep(0.5)
    assert (await embedder.check()).latency_s == pytest.approx(1.5, abs=0.01)
    bulk.cancel()
    await asyncio.wait([bulk])

    embedder._dispatches.get().engine.slots.pace.pause(60)
    with pytest.raises(DeadlineError):
        await embedder.check()
    assert (await embedder.check(deadline=None)).latency_s > 49
    with pytest.raises(DeadlineError):
        await embedder.check(deadline=0)


FORGETFUL = """
import asyncio, sys
from asyncembed import Embedder

async def main():
    embedder = Embedder("any", base_url=sys.argv[1], api_key="key")
    await embedder.embed_one("a")
    if sys.argv[2] == "closes":
        await embedder.aclose()

asyncio.run(main())
"""


@pytest.mark.parametrize(("closes", "warned"), [("closes", False), ("forgets", True)])
def test_who_forgets_to_close_is_warned_and_the_process_ends(closes: str, warned: bool) -> None:
    with EmbeddingServer(dimensions=8).in_thread() as server:
        ended = subprocess.run(
            [sys.executable, "-X", "dev", "-c", FORGETFUL, server.base_url, closes],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 0
    assert ("ResourceWarning: <OpenAIProvider 'any' at 127.0.0.1" in ended.stderr) is warned
    assert "Exception" not in ended.stderr


def test_one_embedder_serves_one_loop_after_another_without_a_warning() -> None:
    with EmbeddingServer(dimensions=8).in_thread() as server:
        embedder = Embedder("any", base_url=server.base_url, api_key="key")
        vectors = [asyncio.run(embedder.embed_one("a")) for _ in range(3)]
        asyncio.run(embedder.aclose())
    np.testing.assert_array_equal(vectors[0], vectors[2])
