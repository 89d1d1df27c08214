"""Converts the values of callers and sources into `Record`s.

First one value: `as_record` parses it, `check_text` validates a text, `checked_records` does both for many values.
Then a whole source: `in_chunks` reads any sync or async iterable in chunks: lazily, in order, in bounded memory.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from itertools import islice
from typing import Any, Final, TypeAlias
from uuid import UUID

from ..concurrency import cancel_and_wait
from ..errors import InputError, InvalidRecordError, WrongTypeError
from ..types import Record, RecordId, check_text

AnyIterable: TypeAlias = Iterable[Any] | AsyncIterable[Any]

# The most records in a chunk: enough that one query of the store for all of them costs little, few enough to hold.
CHUNK_RECORDS: Final = 1_000

# Python documentation, "Integer string conversion length limitation": an int of more than 4,300 digits has no str.
MAX_ID_BITS: Final = 14_000

# A source that is silent for this long is idle. It may stay so, and therefore partly filled batches are flushed.
IDLE_S: Final = 0.5

IDLE: Final[Sequence[Any]] = ()
"""The chunk without records that `in_chunks` yields when its source is idle. Compare with `is IDLE`."""


# ---- one value ----


def as_record(value: object) -> Record:
    """Return the record that a value stands for.

    Accepts a `Record`, `(id, text)`, `(id, text, metadata)`, and mappings with `id` and either `text` or `title` and
    `content`, which are joined as `title\\ncontent`. asyncpg's records count as mappings. The text is not checked.

    Raises:
        InvalidRecordError: The value is not a record, or its id cannot be one.
        WrongTypeError: Its title or content is not a str.
    """
    try:
        return _as_record(value)
    except InputError:
        raise
    except Exception as error:  # raised by a lazy mapping, or by an object that only looks like a mapping
        # from None: the original may show the record
        raise InvalidRecordError(f"cannot be read ({type(error).__name__})") from None


def _as_record(value: object) -> Record:
    if isinstance(value, Record):
        record_id = _record_id(value.id)
        return value if record_id is value.id else Record(record_id, value.text, value.metadata)
    if isinstance(value, InputError):
        raise value  # a source yields it in place of a record that it could not read
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
    parts = [part for key in ("title", "content") if key in keys and (part := value[key]) is not None]
    for part in parts:
        if not isinstance(part, str):
            raise WrongTypeError(f"has a title or content that is {type(part).__name__}; a text is a str")
    return Record(record_id, "\n".join(filter(None, parts)), metadata)


def _record_id(value: object) -> RecordId:
    if isinstance(value, (str, UUID)):
        if value == "":
            raise InvalidRecordError("has an empty id")
        return value
    if not isinstance(value, (bool, float)):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]  # numpy's integers support it as well
            if number.bit_length() > MAX_ID_BITS:
                raise InvalidRecordError(f"has an id of {number.bit_length()} bits; an int has at most {MAX_ID_BITS}")
            return number
    raise InvalidRecordError(f"has an id that is {type(value).__name__}; an id is a str, an int or a UUID")


def checked_records(first: int, values: Iterable[Any]) -> Iterator[tuple[int, Record, InputError | None]]:
    """Yield each value's position (counted from `first`), its record, and its error or None.

    A plain text is a record with its position as id. So is, with an empty text, a value that is not a record.
    """
    for index, value in enumerate(values, start=first):
        record = Record(index, value) if isinstance(value, str) else None
        try:
            record = record or as_record(value)
            check_text(record.text)
        except InputError as error:
            yield index, record or Record(index, ""), error
        else:
            yield index, record, None


# ---- a whole source ----


async def in_chunks(source: AnyIterable, most: int = CHUNK_RECORDS) -> AsyncGenerator[Sequence[Any], None]:
    """Yield the source's items in chunks of at most `most`; yield IDLE once whenever it is silent for IDLE_S.

    A sync iterable is read on the event loop, an async one by a task that is never more than one chunk ahead.
    Closing this generator closes an async source.

    Raises:
        TypeError: The source is one str, or has no order.
    """
    if isinstance(source, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"expected an iterable, got one {type(source).__name__}; put it into a list")
    if isinstance(source, (set, frozenset)):
        raise TypeError("a set has no order, so results could not be told apart; pass sorted(…) or list(…)")
    if isinstance(source, AsyncIterable):
        async with aclosing(_read_ahead(source, most)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    iterator = iter(source)
    while True:
        some: list[Any] = []
        try:
            some.extend(islice(iterator, most))  # extend keeps the items before an error
        except Exception:
            if some:
                yield some
            raise
        if some:
            yield some
        if len(some) < most:
            return
        await asyncio.sleep(0)


async def _read_ahead(source: AsyncIterable[Any], most: int) -> AsyncGenerator[Sequence[Any], None]:
    iterator = aiter(source)
    waiting: list[Any] = []
    has_room, has_news = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for item in iterator:
                waiting.append(item)
                has_news.set()
                if len(waiting) >= most:
                    has_room.clear()
                    await has_room.wait()
        finally:
            has_news.set()

    reader = asyncio.create_task(read())
    try:
        while not reader.done() or waiting:
            try:
                async with asyncio.timeout(IDLE_S):
                    await has_news.wait()
            except TimeoutError:
                yield IDLE
                await has_news.wait()
            some, waiting[:] = waiting[:], []
            has_news.clear()
            has_room.set()
            if some:
                yield some
        await reader  # raises the source's error
    finally:
        try:
            await cancel_and_wait(reader)
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()
