"""`Embedder.stream`: the order of the source, bounded memory, and how a stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder, Record
from asyncembed.errors import (
    BadRequestError,
    DeadlineError,
    InvalidRecordError,
    InvalidTextError,
    QuotaError,
    RejectedTextError,
)
from tests.fakes import FakeProvider, make_embedder, vector_of

make = partial(make_embedder, latency_s=0)


async def ids(items: AsyncIterator[Any]) -> list[Any]:
    return [item.record.id async for item in items]


def numbered(count: int) -> Iterator[tuple[int, str]]:
    return ((number, f"text {number}") for number in range(count))


async def test_a_stream_keeps_the_order_of_its_source_and_bad_records_fail_alone() -> None:
    embedder, _ = make(
        lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None, max_batch_size=3
    )
    source: list[Any] = [("a", "x"), "plain text", Record("b", ""), None, {"id": "p", "text": "poison"}, ("c", "z")]

    items = [item async for item in embedder.stream(source)]

    assert [item.record.id for item in items] == ["a", 1, "b", 3, "p", "c"]
    kinds = [type(item.error) for item in items]
    assert kinds == [type(None), type(None), InvalidTextError, InvalidRecordError, RejectedTextError, type(None)]
    for item, text in zip(items, ["x", "plain text", None, None, None, "z"], strict=True):
        if text is None:
            assert item.vector is None
        else:
            np.testing.assert_array_equal(item.vector, vector_of(text))


@pytest.mark.virtual_time
async def test_a_stream_keeps_its_order_if_replies_come_in_another_order() -> None:
    provider = FakeProvider()
    answer = provider.embed

    async def slower_at_first(texts: Sequence[str]) -> Any:
        await asyncio.sleep(100 / (1 + len(provider.requests)))
        return await answer(texts)

    provider.embed = slower_at_first  # type: ignore[method-assign]
    embedder = Embedder("fake", provider=provider, max_batch_size=10, concurrency=4)

    assert await ids(embedder.stream(numbered(500))) == list(range(500))


@pytest.mark.virtual_time
async def test_a_stream_reads_its_source_a_bounded_distance_ahead() -> None:
    read = 0

    def source() -> Iterator[tuple[int, str]]:
        nonlocal read
        for item in numbered(100_000):
            read += 1
            yield item

    embedder = Embedder("fake", provider=FakeProvider(), max_batch_size=10, concurrency=2)
    async with aclosing(embedder.stream(source())) as items:
        async for item in items:
            await asyncio.sleep(1)
            assert read - item.record.id <= 2 * 3 * 10  # concurrency + 1 batches, and a chunk of the same size
            if item.record.id == 300:
                break
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_a_partly_filled_batch_is_flushed_when_the_source_is_idle() -> None:
    received = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await received.wait()
        yield "b"

    embedder = Embedder("fake", provider=FakeProvider())
    seen = []
    async for item in embedder.stream(source()):
        seen.append(item.record.text)
        received.set()
    assert seen == ["a", "b"]


@pytest.mark.virtual_time
async def test_leaving_a_stream_early_cancels_its_requests_and_closes_its_source() -> None:
    closed = False

    async def source() -> AsyncIterator[str]:
        nonlocal closed
        try:
            for number in range(1_000_000):
                yield f"text {number}"
        finally:
            closed = True

    provider = FakeProvider()
    embedder = Embedder("fake", provider=provider, max_batch_size=10)
    async with aclosing(embedder.stream(source())) as items:
        async for _ in items:
            break
    assert closed
    assert provider.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_fatal_error_is_raised_after_the_finished_records() -> None:
    embedder, _ = make(
        lambda number, _: QuotaError("no money", status=429) if number == 2 else None,
        max_batch_size=10,
        concurrency=1,
    )
    done: list[Any] = []
    with pytest.raises(QuotaError):
        async for item in embedder.stream(numbered(100)):
            done.append(item)  # noqa: PERF401  # what came before the error is what is tested
    assert [item.record.id for item in done] == list(range(len(done)))
    assert sum(item.vector is not None for item in done) == 20


SOURCE_ERRORS = [
    KeyError("the source broke"),
    TimeoutError("the source's own"),
    ExceptionGroup("the source's own", [ValueError(1), KeyError(2)]),
    DeadlineError("of another call"),
]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", SOURCE_ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_source_is_raised_unchanged_after_the_records_before_it(
    error: Exception, is_async: bool
) -> None:
    def source() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise error

    async def async_source() -> AsyncIterator[str]:
        for text in source():
            yield text

    embedder, _ = make(max_batch_size=2)
    seen = []
    with pytest.raises(type(error)) as caught:
        async for item in embedder.stream(async_source() if is_async else source(), deadline=60):
            seen.append(item.record.text)  # noqa: PERF401  # what came before the error is what is tested
    assert caught.value is error
    assert seen == ["a", "b", "c"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_a_stream_ends_at_its_deadline_after_the_finished_records() -> None:
    embedder = Embedder("fake", provider=FakeProvider(), max_batch_size=1, concurrency=1)
    seen = []
    with pytest.raises(DeadlineError):
        async for item in embedder.stream(numbered(100), deadline=3.5):
            seen.append(item.record.id)  # noqa: PERF401  # as above
    assert seen == [0, 1, 2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_streamed_vector_keeps_no_other_vector_in_memory() -> None:
    embedder, _ = make()
    async for item in embedder.stream(numbered(10)):
        assert item.vector is not None
        assert item.vector.base is None


@pytest.mark.parametrize("source", ["text", b"text", {"id": 1}, {"a", "b"}])
async def test_a_source_without_an_order_is_refused(source: Any) -> None:
    embedder, _ = make()
    with pytest.raises(TypeError):
        await ids(embedder.stream(source))
