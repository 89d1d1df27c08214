"""Cancelled at every step of every task, with the real SDK, a real server and a real store: nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder, Record, SQLiteSink, ingest
from asyncembed.errors import DeadlineError, ServerError
from asyncembed.testing import EmbeddingServer, embedding_of
from tests.fakes import FakeProvider, is_idle, make_embedder, texts

DIMENSIONS = 8


class Steps:
    """Counts the steps of all tasks of a loop, and calls `then` at the n-th."""

    def __init__(self, at: int, then: Callable[[], object]) -> None:
        self.taken = 0
        self._at = at
        self._then = then

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> Any:
        task: asyncio.Task[Any] = asyncio.Task(self._counted(coro), loop=loop, **options)  # type: ignore[arg-type]
        task.add_done_callback(lambda _: coro.close())  # it may have been cancelled before its first step
        return task

    @types.coroutine
    def _counted(self, coro: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        error: BaseException | None = None
        while True:
            self.taken += 1
            if self.taken == self._at:
                self._then()
            try:
                waited_for = coro.throw(error) if error else coro.send(None)
            except StopIteration as end:
                return end.value
            error = None
            try:
                yield waited_for
            except BaseException as raised:
                error = raised


@contextmanager
def steps(at: int, then: Callable[[], object]) -> Iterator[Steps]:
    counting = Steps(at, then)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(counting)
    try:
        yield counting
    finally:
        loop.set_task_factory(None)


async def cancelled_at(step: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Do the work in a task and cancel it at the n-th step of any task; return whether there was an n-th step."""
    before = asyncio.all_tasks()

    def cancel() -> None:
        task.cancel()

    async def run() -> None:
        await work()

    with steps(step, cancel) as counting:
        task = asyncio.get_running_loop().create_task(run())
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    assert asyncio.all_tasks() <= before, "a task was left"
    return counting.taken >= step


def foreign_threads() -> set[threading.Thread]:
    """All threads except the server's, and except the loop's default executor, which keeps its threads."""
    return {
        thread for thread in threading.enumerate() if not thread.name.startswith(("asyncio_", "asyncembed-testing"))
    }


def make(server: EmbeddingServer, **options: Any) -> Embedder:
    return Embedder("fake", base_url=server.base_url, api_key="none", max_batch_size=5, concurrency=2, **options)


TEXTS = [f"text {number}" for number in range(12)]


RECORDS = [Record(number, text) for number, text in enumerate(TEXTS)]


def right(vector: Any, text: str) -> None:
    np.testing.assert_array_equal(vector, embedding_of(text, dimensions=DIMENSIONS, model="fake"))


async def records() -> AsyncIterator[Record]:
    for record in RECORDS:
        yield record
        await asyncio.sleep(0)


async def embed(embedder: Embedder) -> None:
    result = await embedder.embed(TEXTS)
    for index, text in enumerate(TEXTS):
        right(result[index], text)


async def embed_ones(embedder: Embedder) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(embedder.embed_one(text)) for text in TEXTS]
    for task, text in zip(tasks, TEXTS, strict=True):
        right(task.result(), text)


async def stream(embedder: Embedder) -> None:
    source = records()
    async with aclosing(embedder.stream(source)) as items:
        seen = [item async for item in items]
    assert [item.record for item in seen] == RECORDS
    for item in seen:
        right(item.vector, item.record.text)


@pytest.mark.parametrize("work", [embed, embed_ones, stream], ids=lambda work: work.__name__)
async def test_a_call_cancelled_at_any_step_leaves_no_task_and_the_embedder_usable(
    work: Callable[[Embedder], Awaitable[None]],
) -> None:
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        embedder = make(server)
        await work(embedder)  # loads the vocabulary and opens the connections
        threads = foreign_threads()
        step, reached = 0, True
        while reached:
            step += 1
            reached = await cancelled_at(step, lambda: work(embedder))
            assert is_idle(embedder)
            assert foreign_threads() == threads
        await work(embedder)
        await embedder.aclose()
    assert step > 10


async def test_ingest_cancelled_at_any_step_leaves_no_transaction_and_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "vectors.db"
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        embedder = make(server)
        async with SQLiteSink(path) as sink:
            await ingest(records(), embedder, sink)
            threads = foreign_threads()
            step, reached = 0, True
            while reached:
                step += 1
                await sink.delete(range(len(RECORDS)), "fake")
                reached = await cancelled_at(step, lambda: ingest(records(), embedder, sink))
                assert foreign_threads() == threads
                other = sqlite3.connect(path, timeout=0, isolation_level=None)
                other.execute("BEGIN IMMEDIATE")  # raises if a transaction was left open
                stored = {int(id) for (id,) in other.execute("SELECT id FROM embeddings")}
                other.execute("ROLLBACK")
                other.close()
                batches = [set(range(5)), set(range(5, 10)), set(range(10, 12))]
                assert stored == set().union(*(batch for batch in batches if batch <= stored)), "half a batch"
            report = await ingest(records(), embedder, sink)
            assert report.success_count + report.skipped_count == len(RECORDS)
            assert await sink.count() == len(RECORDS)
        await embedder.aclose()
    assert step > 30


@pytest.mark.parametrize("warm", [True, False], ids=["after a call", "never used"])
async def test_aclose_cancelled_at_any_step_leaves_no_task_and_the_embedder_usable(warm: bool) -> None:
    with EmbeddingServer(dimensions=DIMENSIONS).in_thread() as server:
        embedder = make(server)
        step, reached = 0, True
        while reached:
            step += 1
            if warm:
                await embed(embedder)
                await embedder.embed_one("one")
            reached = await cancelled_at(step, embedder.aclose)
        await embed(embedder)
        await embedder.aclose()


@pytest.mark.parametrize("work", [embed, embed_ones, stream], ids=lambda work: work.__name__)
async def test_an_asyncio_timeout_around_a_call_raises_a_plain_timeout_error(
    work: Callable[[Embedder], Awaitable[None]],
) -> None:
    provider = FakeProvider(latency_s=3_600)
    embedder = Embedder("fake", provider=provider)
    before = asyncio.all_tasks()
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await work(embedder)
    assert type(caught.value) is TimeoutError
    await embedder.aclose()
    assert provider.in_flight == 0
    assert asyncio.all_tasks() == before


@pytest.mark.virtual_time
async def test_the_shorter_of_deadline_and_asyncio_timeout_decides_the_error() -> None:
    embedder = Embedder("fake", provider=FakeProvider(latency_s=3_600))
    with pytest.raises(DeadlineError):
        async with asyncio.timeout(10):
            await embedder.embed(["a"], deadline=5)
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(5):
            await embedder.embed(["a"], deadline=10)
    assert type(caught.value) is TimeoutError


@pytest.mark.virtual_time
async def test_a_cancelled_call_leaves_no_request_and_no_task() -> None:
    embedder, provider = make_embedder(concurrency=4, max_batch_size=1)
    call = asyncio.create_task(embedder.embed(texts(100)))
    await asyncio.sleep(2.5)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert provider.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    # the slots are free again
    result = await embedder.embed(texts(8))
    assert result.failures == ()


@pytest.mark.virtual_time
async def test_a_backoff_a_pause_and_a_wait_for_a_slot_can_be_cancelled() -> None:
    embedder = Embedder(
        "fake",
        provider=FakeProvider(lambda number, _: ServerError("HTTP 500", status=500) if number % 2 else None),
        concurrency=1,
        max_batch_size=1,
    )
    for wait_s in np.arange(0.1, 12, 0.3):
        call = asyncio.create_task(embedder.embed(TEXTS))
        await asyncio.sleep(float(wait_s))
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert is_idle(embedder)
    await embedder.embed(TEXTS)


@pytest.mark.virtual_time
async def test_one_of_fifty_calls_is_cancelled_and_the_others_are_served() -> None:
    embedder = Embedder("fake", provider=FakeProvider(), concurrency=4)
    for ask in (lambda number: embedder.embed([f"a {number}", "shared"]), lambda _: embedder.embed_one("shared")):
        calls = [asyncio.ensure_future(ask(number)) for number in range(50)]
        await asyncio.sleep(0.5)
        calls[7].cancel()
        await asyncio.wait(calls)
        assert [call.cancelled() for call in calls] == [number == 7 for number in range(50)]
        assert all(call.exception() is None for call in calls if not call.cancelled())


@pytest.mark.any_loop
async def test_ten_thousand_calls_cancelled_at_random_instants_leave_nothing_behind() -> None:
    dice = random.Random(0)
    with EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.005).in_thread() as server:
        embedder = Embedder("fake", base_url=server.base_url, api_key="none", max_batch_size=100)
        await embedder.embed_one("the connections")
        loop = asyncio.get_running_loop()
        answered = 0

        async def call(number: int) -> None:
            nonlocal answered
            texts = [f"text {dice.randrange(2_000)}" for _ in range(1 + number % 3)]
            if len(texts) == 1:
                right(await embedder.embed_one(texts[0]), texts[0])
            else:
                for vector, text in zip((await embedder.embed(texts)).embeddings, texts, strict=True):
                    right(vector, text)
            answered += 1

        tasks = [loop.create_task(call(number)) for number in range(10_000)]
        for task in tasks:
            loop.call_later(dice.expovariate(1 / 0.3), task.cancel)
            if dice.random() < 0.01:
                await asyncio.sleep(0)
        await asyncio.wait(tasks)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        assert 0 < answered < 10_000

        await asyncio.sleep(0)  # runs the callbacks of tasks that have ended
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert is_idle(embedder)
        again = [loop.create_task(embedder.embed_one(f"text {number}")) for number in range(2_000)]
        await asyncio.wait(again)  # none of them waits for a request that was cancelled
        for number, task in enumerate(again):
            right(task.result(), f"text {number}")
        await embedder.aclose()
        assert server.in_flight == 0
