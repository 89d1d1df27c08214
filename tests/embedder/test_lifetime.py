"""An `Embedder`'s life: its repr, its check, its end, and what happens if it is never closed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import AuthenticationError, Check, Embedder, MemoryCache, NotFoundError, ingest
from asyncembed.errors import ConfigError, DeadlineError, RateLimitedError, ServerError, TransportError
from asyncembed.testing import EmbeddingServer
from asyncembed.types import ProviderInfo, Reply
from tests.fakes import FakeProvider, make_embedder, now, vector_of


def test_the_repr_needs_no_event_loop() -> None:
    embedder, _ = make_embedder()
    assert repr(embedder) == "<Embedder 'fake': 0 of 8 requests under way>"


@pytest.mark.virtual_time
async def test_the_repr_shows_requests_in_flight_and_queued() -> None:
    embedder, _ = make_embedder(max_batch_size=1, concurrency=2)
    bulk = asyncio.create_task(embedder.embed(["a", "b", "c", "d", "e"]))
    single = asyncio.create_task(embedder.embed_one("f"))
    await asyncio.sleep(0.5)
    # one batch more than there are slots waits for one; "f" is the other
    assert repr(embedder) == "<Embedder 'fake': 2 of 2 requests under way, 2 queued>"
    await asyncio.wait([bulk, single])
    assert repr(embedder) == "<Embedder 'fake': 0 of 2 requests under way>"


@pytest.mark.virtual_time
async def test_the_repr_shows_a_pause() -> None:
    embedder, _ = make_embedder(
        lambda n, _: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0) if n == 0 else None
    )
    call = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(2)
    assert "1 queued, paused for " in repr(embedder)
    await call


@pytest.mark.virtual_time
async def test_closing_waits_for_a_bulk_call() -> None:
    embedder, provider = make_embedder(max_batch_size=1, concurrency=1)
    bulk = asyncio.create_task(embedder.embed([f"text {n}" for n in range(5)]))
    await asyncio.sleep(0.5)
    await embedder.aclose()
    assert provider.closed
    np.testing.assert_array_equal((await bulk).embeddings[4], vector_of("text 4"))


@pytest.mark.virtual_time
async def test_a_bulk_call_longer_than_the_grace_ends_with_its_finished_texts() -> None:
    embedder, provider = make_embedder(max_batch_size=100, concurrency=1)
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
async def test_each_call_that_closing_ends_has_its_own_error_and_result() -> None:
    embedder, _ = make_embedder(max_batch_size=100, concurrency=1)
    calls = [asyncio.create_task(embedder.embed([f"{count} {n}" for n in range(count)])) for count in (300, 400)]
    await asyncio.sleep(0.5)
    await embedder.aclose(grace=2.0)
    await asyncio.wait(calls)
    errors = [call.exception() for call in calls]
    assert [len(error.result) for error in errors if isinstance(error, TransportError)] == [300, 400]


@pytest.mark.virtual_time
@pytest.mark.parametrize("grace", [0.0, 0.2, 5.0])
async def test_closing_waits_for_a_provider_that_is_slow_to_cancel(grace: float) -> None:
    class Slow(FakeProvider):
        async def embed(self, texts: Sequence[str]) -> Reply:
            try:
                return await super().embed(texts)
            except asyncio.CancelledError:
                await asyncio.sleep(0.5)
                raise

    provider = Slow(latency_s=100)
    embedder = Embedder("fake", provider=provider, concurrency=1)
    calls = [asyncio.create_task(embedder.embed([f"text {n}" for n in range(100)])) for _ in range(2)]
    items = embedder.stream(["a", "b"])
    reading = asyncio.create_task(_read(items))
    await asyncio.sleep(0.1)
    await embedder.aclose(grace)
    assert (provider.closed, provider.in_flight) == (True, 0)
    await asyncio.wait([*calls, reading])
    assert all(isinstance(call.exception(), TransportError) for call in calls)


@pytest.mark.virtual_time
async def test_a_concurrent_aclose_waits_for_the_first_one() -> None:
    embedder, provider = make_embedder()
    call = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(0.5)
    first = asyncio.create_task(embedder.aclose())
    await asyncio.sleep(0)
    await embedder.aclose()
    assert provider.in_flight == 0
    await asyncio.wait([first, call])
    np.testing.assert_array_equal(call.result(), vector_of("a"))


@pytest.mark.virtual_time
async def test_closing_waits_for_a_check() -> None:
    embedder, provider = make_embedder()
    check = asyncio.create_task(embedder.check())
    await asyncio.sleep(0.5)
    await embedder.aclose()
    assert provider.in_flight == 0
    assert (await check).dimensions == 4


@pytest.mark.virtual_time
@pytest.mark.parametrize("work", ["one", "few"])
async def test_closing_waits_for_a_cache_lookup_up_to_the_grace(work: str) -> None:
    class Slow(MemoryCache):
        async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Any]:
            await asyncio.sleep(5)
            return await super().get(keys)

    for grace, ends_well in ((10.0, True), (2.0, False)):
        embedder, provider = make_embedder(cache=Slow())
        asked: Any = embedder.embed_one("a") if work == "one" else embedder.embed(["a", "b"])
        call = asyncio.create_task(asked)
        await asyncio.sleep(0.5)
        await embedder.aclose(grace)
        await asyncio.wait([call])
        assert (provider.in_flight, len(provider.requests)) == (0, int(ends_well))
        assert isinstance(call.exception(), type(None) if ends_well else TransportError)


@pytest.mark.virtual_time
async def test_a_stream_sends_no_more_requests_while_closing_waits_for_other_calls() -> None:
    embedder, provider = make_embedder(
        lambda _, texts: 5.0 if texts == ["slow"] else None, max_batch_size=10, concurrency=4
    )
    single = asyncio.create_task(embedder.embed_one("slow"))
    items = embedder.stream(f"text {n}" for n in range(10_000))
    reading = asyncio.create_task(_read(items))
    await asyncio.sleep(2.5)
    before = len(provider.requests)
    await embedder.aclose()
    assert len(provider.requests) == before
    assert isinstance((await asyncio.wait([reading]))[0].pop().exception(), TransportError)
    np.testing.assert_array_equal(await single, vector_of("slow"))


async def _read(items: AsyncIterator[Any]) -> None:
    async for _ in items:
        pass


@pytest.mark.virtual_time
async def test_a_hanging_store_does_not_keep_closing_from_ending() -> None:
    class Hanging:
        async def prepare(self, model: str, dimensions: int | None) -> None: ...

        async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
            return set()

        async def write(self, model: str, rows: Sequence[Any]) -> Mapping[Any, Any]:
            await asyncio.sleep(10_000)
            return {}

    embedder, _ = make_embedder()
    job = asyncio.create_task(ingest([("a", "a")], embedder, Hanging()))
    await asyncio.sleep(2)
    began = now()
    await embedder.aclose(grace=2.0)
    assert now() - began == pytest.approx(12.0, abs=0.01)
    job.cancel()
    await asyncio.wait([job])


@pytest.mark.virtual_time
async def test_leaving_the_context_with_an_error_waits_for_no_call() -> None:
    embedder, _ = make_embedder()
    with pytest.raises(LookupError):
        async with embedder:
            call = asyncio.create_task(embedder.embed_one("a"))
            await asyncio.sleep(0.5)
            began = now()
            raise LookupError
    assert now() - began < 0.01
    assert isinstance((await asyncio.wait([call]))[0].pop().exception(), TransportError)


@pytest.mark.virtual_time
async def test_an_abandoned_stream_does_not_delay_closing() -> None:
    embedder, provider = make_embedder(max_batch_size=10, concurrency=2)
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
async def test_a_closed_embedder_can_be_used_again() -> None:
    embedder, _ = make_embedder()
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
async def test_a_failed_check_raises_the_error_and_is_not_retried(status: int, kind: type[Exception]) -> None:
    _, provider = failing = make_embedder(lambda *_: kind(f"HTTP {status}", status=status))  # type: ignore[call-arg]
    with pytest.raises(kind):
        await failing[0].check()
    assert len(provider.requests) == 1


async def test_a_check_reports_wrong_dimensions() -> None:
    provider = FakeProvider(latency_s=0)
    provider.info = ProviderInfo(dimensions=1536)
    embedder = Embedder("text-embedding-3-small", provider=provider)
    with pytest.raises(ConfigError, match="4 dimensions; text-embedding-3-small has 1536"):
        await embedder.check()


@pytest.mark.virtual_time
async def test_a_check_goes_before_a_bulk_job_and_keeps_a_pause() -> None:
    embedder, _ = make_embedder(max_batch_size=1, concurrency=1)
    bulk = asyncio.create_task(embedder.embed([f"text {n}" for n in range(100)]))
    await asyncio.sleep(0.5)
    assert (await embedder.check()).latency_s == pytest.approx(1.5, abs=0.01)
    bulk.cancel()
    await asyncio.wait([bulk])

    embedder, _ = make_embedder(
        lambda n, _: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0) if not n else None
    )
    refused = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(1.5)
    with pytest.raises(DeadlineError):
        await embedder.check()
    assert (await embedder.check(deadline=None)).latency_s > 49
    with pytest.raises(DeadlineError):
        await embedder.check(deadline=0)
    np.testing.assert_array_equal(await refused, vector_of("a"))


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
def test_an_embedder_that_is_never_closed_warns_and_the_process_ends(closes: str, warned: bool) -> None:
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
