"""Calls with a cache at the same time, cancelled calls, deadlines, and `ingest`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import MemoryCache, SQLiteCache, ingest
from asyncembed.errors import DeadlineError, FatalProviderError, QuotaError, TransportError
from asyncembed.types import Vectors
from tests.embedder.cached import DictCache, make_cached, many, sent_texts
from tests.embedder.test_cancellation import cancelled_at
from tests.fakes import assert_vectors, now

# ---- calls at the same time


@pytest.mark.virtual_time
async def test_closing_ends_all_calls_that_embed_the_same_texts() -> None:
    embedder, _ = make_cached(True, latency_s=1, max_batch_size=10, concurrency=1)
    calls = [asyncio.create_task(embedder.embed(many())) for _ in range(3)]
    await asyncio.sleep(2.5)
    await embedder.aclose(0)
    await asyncio.wait(calls)
    assert [type(call.exception()) for call in calls] == [TransportError] * 3
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_a_partly_filled_batch_is_flushed_when_the_source_is_idle() -> None:
    received = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await received.wait()
        yield "b"

    embedder, _ = make_cached(True, latency_s=1)
    seen = []
    async for item in embedder.stream(source()):
        seen.append(item.record.text)
        received.set()
    assert seen == ["a", "b"]


@pytest.mark.virtual_time
async def test_a_call_keeps_its_own_deadline_while_another_embeds_the_same_texts() -> None:
    embedder, _ = make_cached(True, latency_s=10)
    first = asyncio.create_task(embedder.embed(many()))
    await asyncio.sleep(0.1)
    began = now()
    with pytest.raises(DeadlineError) as caught:
        await embedder.embed([*many(), "new"], deadline=3)
    assert now() - began == pytest.approx(3, abs=1e-3)
    assert len(caught.value.result.failures) == 101
    assert_vectors((await first).embeddings, many())


@pytest.mark.virtual_time
async def test_embed_one_does_not_wait_for_a_job() -> None:
    embedder, _ = make_cached(True, latency_s=1, max_batch_size=10, concurrency=1)
    job = asyncio.create_task(embedder.embed(many()))  # ten seconds of requests
    await asyncio.sleep(0.5)
    began = now()
    assert_vectors([await embedder.embed_one("text 99")], ["text 99"])
    assert now() - began < 3
    assert_vectors((await job).embeddings, many())


async def test_calls_that_miss_a_cache_file_together_share_one_request(tmp_path: Path) -> None:
    embedder, provider = make_cached(SQLiteCache(tmp_path / "cache"), latency_s=0)
    await asyncio.gather(*[embedder.embed_one(f"text {number % 3}") for number in range(1_000)])
    assert provider.requests == [["text 0", "text 1", "text 2"]]


@pytest.mark.virtual_time
@pytest.mark.parametrize("at", [0.5, 1.5, 2.5])
async def test_a_fatal_error_keeps_hits_and_finished_texts(at: float) -> None:
    cache = MemoryCache()
    await make_cached(cache)[0].embed(many(0, 50))
    embedder, _ = make_cached(
        cache,
        lambda number, _: QuotaError("no money", status=429) if number >= at else None,
        latency_s=1,
        max_batch_size=10,
        concurrency=1,
    )
    with pytest.raises(FatalProviderError) as caught:
        await embedder.embed(many())
    result = caught.value.result
    done = 50 + 10 * int(at + 0.5)
    assert_vectors([result[index] for index in range(done)], many(0, done))
    assert result.failed_indices == list(range(done, 100))
    assert len(cache) == done


# ---- cancelled calls


@pytest.mark.virtual_time
@pytest.mark.parametrize("latency_s", [0.001, 1])
async def test_calls_cancelled_at_random_leave_nothing_behind_and_pay_little_twice(latency_s: float) -> None:
    dice = np.random.default_rng(7)
    embedder, provider = make_cached(True, latency_s=latency_s, max_batch_size=20)

    async def call() -> None:
        await asyncio.sleep(dice.uniform(0, 20 * latency_s))
        texts = [f"text {number}" for number in dice.integers(0, 200, size=dice.choice([1, 5, 60]))]
        if len(texts) == 1:
            assert_vectors([await embedder.embed_one(texts[0])], texts)
        else:
            assert_vectors((await embedder.embed(texts)).embeddings, texts)

    tasks = [asyncio.create_task(call()) for _ in range(400)]
    for task in tasks[::3]:
        asyncio.get_running_loop().call_later(dice.uniform(0, 25 * latency_s), task.cancel)
    await asyncio.wait(tasks)
    assert {task.exception() for task in tasks if not task.cancelled()} == {None}
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert provider.in_flight == 0
    assert len(sent_texts(provider)) < 1_000  # without a cache 8,800


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("count", [1, 3, 40], ids=["embed_one", "a small call", "a job"])
async def test_a_call_cancelled_at_any_step_leaves_no_request_and_whole_vectors(
    kind: str, count: int, tmp_path: Path
) -> None:
    cache = MemoryCache() if kind == "memory" else SQLiteCache(tmp_path / "cache.db")
    step, reached = 0, True
    while reached:
        step += 1
        embedder, provider = make_cached(cache, max_batch_size=15)
        known, new = many(0, count), [f"{step}: {text}" for text in many(0, count)]
        await embedder.embed(known)

        async def work() -> None:
            if count == 1:
                assert_vectors([await embedder.embed_one(new[0])], new)  # noqa: B023  # it ends within this round
            else:
                assert_vectors((await embedder.embed([*new, *known])).embeddings, [*new, *known])  # noqa: B023

        reached = await cancelled_at(step, work)
        assert provider.in_flight == 0
        assert_vectors((await embedder.embed([*known, *new])).embeddings, [*known, *new])
    await cache.aclose()
    assert step > 5


@pytest.mark.parametrize("kind", [MemoryCache, DictCache])
async def test_a_stream_that_is_left_early_leaves_no_task_and_no_request(kind: type[Any]) -> None:
    cache = kind()
    await make_cached(cache)[0].embed(many(0, 50))
    for left_at in (0, 10, 49, 50, 70):
        embedder, provider = make_cached(cache, max_batch_size=10)
        async with aclosing(embedder.stream(many(0, 5_000))) as items:
            async for item in items:
                if item.record.id == left_at:
                    break
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert provider.in_flight == 0


# ---- ingest


class SlowStore:
    """Takes three seconds to store a batch."""

    def __init__(self) -> None:
        self.stored: list[Any] = []

    async def prepare(self, model: str, dimensions: int | None) -> None: ...

    async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
        return set()

    async def write(self, model: str, rows: Sequence[Any]) -> Mapping[Any, Any]:
        await asyncio.sleep(3)
        self.stored.extend(row.id for row in rows)
        return {}


@pytest.mark.virtual_time
@pytest.mark.parametrize("known", [True, False], ids=["storing hits", "storing and keeping what came"])
async def test_a_cancelled_ingest_leaves_no_task_and_no_request(known: bool) -> None:
    class SlowCache(DictCache):
        async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
            await asyncio.sleep(100)

    cache = MemoryCache() if known else SlowCache()
    if known:
        await make_cached(cache)[0].embed(many())
    embedder, provider = make_cached(cache)
    store = SlowStore()
    call = asyncio.create_task(ingest(list(enumerate(many())), embedder, store))
    await asyncio.sleep(1)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert (provider.in_flight, store.stored) == (0, [])


@pytest.mark.virtual_time
async def test_a_stopped_ingest_finishes_storing_the_hits_it_has_begun() -> None:
    cache = MemoryCache()
    await make_cached(cache)[0].embed(many(0, 3_000))
    embedder, _ = make_cached(cache)
    store, stop = SlowStore(), asyncio.Event()
    asyncio.get_running_loop().call_later(1, stop.set)
    report = await ingest(list(enumerate(many(0, 3_000))), embedder, store, stop=stop)
    assert report.success_count == len(store.stored) > 0
    assert report.seen == report.success_count < 3_000
