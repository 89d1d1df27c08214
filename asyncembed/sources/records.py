"""Anything that texts and records come as, to `Record`s, in slices: lazily, in order, in bounded memory."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from itertools import islice
from typing import Any, TypeAlias
from uuid import UUID

from ..concurrency import ended
from ..errors import InputError, InvalidRecordError, InvalidTextError, WrongTypeError
from ..types import Record, RecordId

AnyIterable: TypeAlias = Iterable[Any] | AsyncIterable[Any]

# How many records are taken at once: enough that asking a store for them costs little, few enough to hold.
SLICE_RECORDS = 1_000

# Python documentation, "Integer string conversion length limitation": an int of more than 4,300 digits has no str.
MAX_ID_BITS = 14_000

# A source that has been silent for so long may be silent for good; what waits to fill a batch is sent.
IDLE_S = 0.5


def as_record(value: object) -> Record:
    """Return the record a value stands for.

    Takes `Record`, `(id, text)`, `(id, text, metadata)`, and mappings with `id` and either `text` or `title` and
    `content`, which are joined as `title\\ncontent`; also asyncpg's records. The text itself is not checked.

    Raises:
        InvalidRecordError: It stands for none, or its id cannot be one.
    """
    try:
        return _as_record(value)
    except InputError:
        raise
    except Exception as error:  # of a mapping that is lazy, or an object that only looks like one
        # from None: the original may show the record
        raise InvalidRecordError(f"cannot be read ({type(error).__name__})") from None


def _as_record(value: object) -> Record:
    if isinstance(value, Record):
        record_id = _record_id(value.id)
        return value if record_id is value.id else Record(record_id, value.text, value.metadata)
    if isinstance(value, InputError):
        raise value  # a source's word for a record it could not read
    if isinstance(value, tuple) and len(value) in (2, 3):
        return Record(_record_id(value[0]), *value[1:])
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        return _from_mapping(value)
    raise InvalidRecordError(
        f"is {type(value).__name__}; a record is a Record, (id, text), or a mapping with id and text"
    )


def _from_mapping(value: Any) -> Record:
    keys = set(value.keys())
    if "id" not in keys:
        raise InvalidRecordError("has no id")
    record_id = _record_id(value["id"])
    metadata = value["metadata"] if "metadata" in keys else None
    if "text" in keys:
        return Record(record_id, value["text"], metadata)
    if "content" not in keys:
        raise InvalidRecordError("has neither text nor content")
    parts = [value[key] for key in ("title", "content") if key in keys]
    parts = [part for part in parts if part is not None and not (isinstance(part, str) and not part)]
    for part in parts:
        if not isinstance(part, str):
            raise WrongTypeError(f"has a title or content that is {type(part).__name__}; a text is a str")
    return Record(record_id, "\n".join(parts), metadata)


def _record_id(value: object) -> RecordId:
    if isinstance(value, (str, UUID)):
        if isinstance(value, str) and not value:
            raise InvalidRecordError("has an empty id")
        return value
    if not isinstance(value, (bool, float)):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]  # what it is for: numpy's integers have it too
            if number.bit_length() > MAX_ID_BITS:
                raise InvalidRecordError(
                    f"has an id of {number.bit_length()} bits; an int of up to {MAX_ID_BITS} can be one"
                )
            return number
    raise InvalidRecordError(f"has an id that is {type(value).__name__}; an id is a str, an int or a UUID")


async def in_slices(source: AnyIterable, most: int = SLICE_RECORDS) -> AsyncGenerator[list[Any], None]:
    """Yield what the source yields, in lists of at most so many; an empty list when it has been silent for IDLE_S.

    A sync iterable is drawn from on the event loop, an async one in a task of its own that is never more than
    one slice ahead. Closing this closes an async source.

    Raises:
        TypeError: The source is one str, or has no order.
    """
    if isinstance(source, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"expected an iterable, got one {type(source).__name__}; put it into a list")
    if isinstance(source, (set, frozenset)):
        raise TypeError("a set has no order, so results could not be told apart; pass sorted(…) or list(…)")
    if isinstance(source, AsyncIterable):
        async with aclosing(_read_ahead(source, most)) as slices:
            async for some in slices:
                yield some
        return
    iterator = iter(source)
    while True:
        some, error = _take(iterator, most)
        if some:
            yield some
        if error is not None:
            raise error
        if len(some) < most:
            return
        await asyncio.sleep(0)


def _take(iterator: Any, most: int) -> tuple[list[Any], Exception | None]:
    some: list[Any] = []
    try:
        some.extend(islice(iterator, most))  # extend keeps what came before an error
    except Exception as error:
        return some, error
    return some, None


async def _read_ahead(source: AsyncIterable[Any], most: int) -> AsyncGenerator[list[Any], None]:
    iterator = aiter(source)
    waiting: list[Any] = []
    room, news = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for item in iterator:
                waiting.append(item)
                news.set()
                if len(waiting) >= most:
                    room.clear()
                    await room.wait()
        finally:
            news.set()

    reader = asyncio.create_task(read())
    try:
        while not reader.done() or waiting:
            if not waiting and not await _within(news, IDLE_S):
                yield []
                await news.wait()
            some, waiting[:] = waiting[:], []
            news.clear()
            room.set()
            if some:
                yield some
        await reader  # raises what the source raised
    finally:
        try:
            await ended(reader)
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await event.wait()
    return False


def readable(first: int, values: Iterable[Any]) -> Iterator[tuple[int, Record, InputError | None]]:
    """Yield each value's position and record, and what is wrong with it; a plain text's id is its position."""
    for index, value in enumerate(values, start=first):
        record = Record(index, value) if isinstance(value, str) else None
        try:
            record = record or as_record(value)
            check_text(record.text)
        except InputError as error:
            yield index, record or Record(index, ""), error
        else:
            yield index, record, None


def check_text(text: object) -> None:
    """Raise if the value cannot be embedded, whatever the model.

    Raises:
        WrongTypeError: It is not a str.
        InvalidTextError: It is empty, or holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise WrongTypeError(f"is {type(text).__name__}; a text is a str")
    if not text:
        raise InvalidTextError("is empty; the API refuses a request that holds an empty text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # from None: the original shows the text
            raise InvalidTextError(f"has a lone surrogate at character {error.start}, so it is not UTF-8") from None
