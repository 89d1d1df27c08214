"""`records`: values to records, and any source in chunks."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from asyncembed.errors import InputError, InvalidRecordError
from asyncembed.sources.records import IDLE, as_record, in_chunks
from asyncembed.types import Record

NUMBER = uuid.uuid4()


class AsyncpgRecord:
    """Like asyncpg's: it has keys and items, but is not a Mapping."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def keys(self) -> Any:
        return self._fields.keys()

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]


@pytest.mark.parametrize(
    ("value", "record"),
    [
        pytest.param(Record("a", "t", {"x": 1}), Record("a", "t", {"x": 1}), id="Record"),
        pytest.param(("a", "t"), Record("a", "t"), id="pair"),
        pytest.param(("a", "t", {"x": 1}), Record("a", "t", {"x": 1}), id="with metadata"),
        pytest.param({"id": 5, "text": "t"}, Record(5, "t"), id="mapping"),
        pytest.param({"id": 5, "text": "t", "metadata": {"x": 1}}, Record(5, "t", {"x": 1}), id="mapping, metadata"),
        pytest.param({"id": "a", "title": "T", "content": "C"}, Record("a", "T\nC"), id="title and content"),
        pytest.param({"id": "a", "title": None, "content": "C"}, Record("a", "C"), id="no title"),
        pytest.param({"id": "a", "title": "T", "content": ""}, Record("a", "T"), id="no content"),
        pytest.param({"id": NUMBER, "text": "t"}, Record(NUMBER, "t"), id="UUID"),
        pytest.param((np.int64(5), "t"), Record(5, "t"), id="numpy's integer"),
        pytest.param(AsyncpgRecord(id=1, text="t"), Record(1, "t"), id="asyncpg's record"),
    ],
)
def test_all_forms_of_a_record_are_accepted(value: object, record: Record) -> None:
    assert as_record(value) == record
    assert type(as_record(value).id) is type(record.id)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(None, "NoneType", id="None"),
        pytest.param("text", "str", id="a text without id"),
        pytest.param(("a",), "tuple", id="one of two"),
        pytest.param({"text": "t"}, "no id", id="no id"),
        pytest.param({"id": "a"}, "neither text nor content", id="no text"),
        pytest.param({"id": "", "text": "t"}, "empty id", id="an empty id"),
        pytest.param({"id": 1.0, "text": "t"}, "float", id="a float"),
        pytest.param({"id": True, "text": "t"}, "bool", id="a bool"),
        pytest.param({"id": None, "text": "t"}, "NoneType", id="no id at all"),
        pytest.param({"id": b"a", "text": "t"}, "bytes", id="bytes"),
        pytest.param({"id": "a", "title": 5, "content": "C"}, "int", id="a title that is a number"),
        pytest.param((1 << 14_000, "t"), "14001 bits", id="a number that has no str"),
    ],
)
def test_a_value_that_is_not_a_record_is_refused_with_the_reason(value: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        as_record(value)
    assert words in str(caught.value)


def test_an_error_that_a_source_yields_for_an_unreadable_record_is_raised() -> None:
    error = InvalidRecordError("line 3 is broken")
    with pytest.raises(InvalidRecordError) as caught:
        as_record(error)
    assert caught.value is error


async def chunks_of(source: Any, most: int = 3) -> list[Sequence[Any]]:
    async with aclosing(in_chunks(source, most)) as chunks:
        return [chunk async for chunk in chunks]


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
async def test_chunks_hold_all_items_in_order(count: int) -> None:
    for source in (list(range(count)), iter(range(count)), numbers(count)):
        found = await chunks_of(source)
        assert [item for chunk in found for item in chunk] == list(range(count))
        assert all(len(chunk) <= 3 for chunk in found)


async def test_items_before_an_error_are_yielded_first() -> None:
    def broken() -> Iterator[int]:
        yield from range(4)
        raise KeyError("broken")

    async def broken_too() -> AsyncIterator[int]:
        for number in broken():
            yield number

    for source in (broken(), broken_too()):
        seen: list[int] = []
        with pytest.raises(KeyError):
            async for chunk in in_chunks(source, 3):
                seen.extend(chunk)
        assert seen == [0, 1, 2, 3]


@pytest.mark.virtual_time
async def test_an_async_source_is_read_at_most_one_chunk_ahead() -> None:
    read: list[int] = []

    async def source() -> AsyncIterator[int]:
        async for number in numbers(100):
            read.append(number)
            yield number

    async with aclosing(in_chunks(source(), 3)) as chunks:
        await anext(chunks)
        await asyncio.sleep(10)
        assert len(read) <= 2 * 3


@pytest.mark.virtual_time
async def test_an_idle_source_is_reported_once_however_long_it_is_silent() -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(60)
        yield "b"

    first, idle, last = await chunks_of(source())
    assert (first, last) == (["a"], ["b"])
    assert idle is IDLE


@pytest.mark.virtual_time
async def test_closing_the_chunks_closes_the_source() -> None:
    closed = False

    async def source() -> AsyncIterator[int]:
        nonlocal closed
        try:
            async for number in numbers(100):
                yield number
        finally:
            closed = True

    async with aclosing(in_chunks(source(), 3)) as chunks:
        await anext(chunks)
    assert closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_closing_the_chunks_closes_the_iterator_of_an_iterable() -> None:
    closed: list[bool] = []

    class Pages:
        async def __aiter__(self) -> AsyncIterator[int]:
            try:
                async for number in numbers(100):
                    yield number
            finally:
                closed.append(True)

    async with aclosing(in_chunks(Pages(), 3)) as chunks:
        await anext(chunks)
        await asyncio.sleep(10)  # the reader is one chunk ahead, and waits
    assert closed == [True]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_error_of_a_source_that_is_not_read_to_its_end_is_not_logged_as_lost() -> None:
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))

    async def source() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise KeyError("after the last item that was read")

    async with aclosing(in_chunks(source(), 1)) as chunks:
        await anext(chunks)
        for _ in range(10):
            await asyncio.sleep(0)
    gc.collect()
    assert lost == []
