"""An `Embedder`'s life: its status line, its check, its end, and what happens if nobody ends it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import (
    AuthenticationError,
    Check,
    ConfigError,
    DeadlineError,
    Embedder,
    MemoryCache,
    NotFoundError,
    Reply,
    ServerError,
    TransportError,
    ingest,
)
from asyncembed.errors import RateLimitedError
from asyncembed.testing import EmbeddingServer
from asyncembed.types import ProviderInfo
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
async def test_each_call_that_closing_cuts_off_has_an_error_and_a_result_of_its_own() -> None:
    embedder, _ = make(max_batch_size=100, concurrency=1)
    calls = [asyncio.create_task(embedder.embed([f"{count} {n}" for n in range(count)])) for count in (300, 400)]
    await asyncio.sleep(0.5)
    await embedder.aclose(grace=2.0)
    await asyncio.wait(calls)
    errors = [call.exception() for call in calls]
    assert [len(error.result) for error in errors if isinstance(error, TransportError)] == [300, 400]


@pytest.mark.virtual_time
@pytest.mark.parametrize("grace", [0.0, 0.2, 5.0])
async def test_a_provider_that_is_slow_to_give_up_is_waited_for(grace: float) -> None:
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
async def test_who_closes_a_second_time_comes_back_when_it_is_closed() -> None:
    embedder, provider = make()
    call = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(0.5)
    first = asyncio.create_task(embedder.aclose())
    await asyncio.sleep(0)
    await embedder.aclose()
    assert provider.in_flight == 0
    await asyncio.wait([first, call])
    np.testing.assert_array_equal(call.result(), vector_of("a"))


@pytest.mark.virtual_time
async def test_a_check_under_way_is_waited_for() -> None:
    embedder, provider = make()
    check = asyncio.create_task(embedder.check())
    await asyncio.sleep(0.5)
    await embedder.aclose()
    assert provider.in_flight == 0
    assert (await check).dimensions == 4


@pytest.mark.virtual_time
@pytest.mark.parametrize("work", ["one", "few"])
async def test_a_call_that_still_asks_its_cache_is_waited_for_and_then_ended(work: str) -> None:
    class Slow(MemoryCache):
        async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Any]:
            await asyncio.sleep(5)
            return await super().get(keys)

    for grace, ends_well in ((10.0, True), (2.0, False)):
        embedder, provider = make(cache=Slow())
        asked: Any = embedder.embed_one("a") if work == "one" else embedder.embed(["a", "b"])
        call = asyncio.create_task(asked)
        await asyncio.sleep(0.5)
        await embedder.aclose(grace)
        await asyncio.wait([call])
        assert (provider.in_flight, len(provider.requests)) == (0, int(ends_well))
        assert isinstance(call.exception(), type(None) if ends_well else TransportError)


@pytest.mark.virtual_time
async def test_a_stream_sends_nothing_more_while_closing_waits_for_others() -> None:
    embedder, provider = make(lambda _, texts: 5.0 if texts == ["slow"] else None, max_batch_size=10, concurrency=4)
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
async def test_closing_is_not_held_up_by_a_store_that_hangs() -> None:
    class Hanging:
        async def prepare(self, model: str, dimensions: int | None) -> None: ...

        async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
            return set()

        async def write(self, model: str, rows: Sequence[Any]) -> Mapping[Any, Any]:
            await asyncio.sleep(10_000)
            return {}

    embedder, _ = make()
    job = asyncio.create_task(ingest([("a", "a")], embedder, Hanging()))
    await asyncio.sleep(2)
    began = now()
    await embedder.aclose(grace=2.0)
    assert now() - began == pytest.approx(12.0, abs=0.01)
    job.cancel()
    await asyncio.wait([job])


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
    provider = FakeProvider(latency_s=0)
    provider.info = ProviderInfo(dimensions=1536)
    embedder = Embedder("text-embedding-3-small", provider=provider)
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

    embedder._dispatchers.get().endpoint.limiter.rate.pause(60)
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
