"""`records`: what records may come as, and slices of any source."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from asyncembed.errors import InputError, InvalidRecordError
from asyncembed.sources.records import as_record, in_slices
from asyncembed.types import Record

NUMBER = uuid.uuid4()


class AsyncpgRecord:
    """As asyncpg's: it has keys and items, and is no Mapping."""

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
def test_a_record_may_come_as(value: object, record: Record) -> None:
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
def test_what_is_no_record_is_said(value: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        as_record(value)
    assert words in str(caught.value)


def test_a_source_may_hand_over_an_error_for_what_it_could_not_read() -> None:
    error = InvalidRecordError("line 3 is broken")
    with pytest.raises(InvalidRecordError) as caught:
        as_record(error)
    assert caught.value is error


async def slices(source: Any, most: int = 3) -> list[list[Any]]:
    async with aclosing(in_slices(source, most)) as some:
        return [slice_ async for slice_ in some]


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
async def test_slices_hold_everything_in_order(count: int) -> None:
    for source in (list(range(count)), iter(range(count)), numbers(count)):
        found = await slices(source)
        assert [item for slice_ in found for item in slice_] == list(range(count))
        assert all(len(slice_) <= 3 for slice_ in found)


async def test_what_came_before_an_error_is_handed_over_first() -> None:
    def broken() -> Iterator[int]:
        yield from range(4)
        raise KeyError("broken")

    async def broken_too() -> AsyncIterator[int]:
        for number in broken():
            yield number

    for source in (broken(), broken_too()):
        seen: list[int] = []
        with pytest.raises(KeyError):
            async for some in in_slices(source, 3):
                seen.extend(some)
        assert seen == [0, 1, 2, 3]


@pytest.mark.virtual_time
async def test_an_async_source_is_read_one_slice_ahead_and_no_more() -> None:
    read: list[int] = []

    async def source() -> AsyncIterator[int]:
        async for number in numbers(100):
            read.append(number)
            yield number

    async with aclosing(in_slices(source(), 3)) as some:
        await anext(some)
        await asyncio.sleep(10)
        assert len(read) <= 2 * 3


@pytest.mark.virtual_time
async def test_silence_is_told_once_and_then_waited_out() -> None:
    async def source() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(60)
        yield "b"

    assert await slices(source()) == [["a"], [], ["b"]]


@pytest.mark.virtual_time
async def test_closing_the_slices_closes_the_source() -> None:
    closed = False

    async def source() -> AsyncIterator[int]:
        nonlocal closed
        try:
            async for number in numbers(100):
                yield number
        finally:
            closed = True

    async with aclosing(in_slices(source(), 3)) as some:
        await anext(some)
    assert closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_closing_the_slices_closes_the_iterator_of_an_iterable_too() -> None:
    closed: list[bool] = []

    class Pages:
        async def __aiter__(self) -> AsyncIterator[int]:
            try:
                async for number in numbers(100):
                    yield number
            finally:
                closed.append(True)

    async with aclosing(in_slices(Pages(), 3)) as some:
        await anext(some)
        await asyncio.sleep(10)  # it is one slice ahead, and waits there
    assert closed == [True]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_error_of_a_source_that_nobody_reads_any_more_is_no_lost_one() -> None:
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))

    async def source() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise KeyError("after what was wanted")

    async with aclosing(in_slices(source(), 1)) as some:
        await anext(some)
        for _ in range(10):
            await asyncio.sleep(0)
    gc.collect()
    assert lost == []
