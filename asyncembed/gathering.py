"""Where outcomes go: into the rows of a result, or back into the order of a stream."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from .batches import Outcome
from .errors import AsyncEmbedError, InputError
from .records import SLICE_RECORDS, AnyIterable, as_record, in_slices
from .report import EmbeddingResult, Progress, ProgressCallback
from .run import Run
from .threads import in_thread_if
from .types import EmbeddedRecord, Failure, Place, Record, Vectors
from .weighing import Item, Text, check_text, unique

logger = logging.getLogger(__name__)

# Copied in 0.1 ms.
WORTH_A_THREAD_BYTES = 512 * 1024


class Results:
    """The rows of one `embed` call, as they come in."""

    def __init__(self, count: int, run: Run, on_progress: ProgressCallback | None) -> None:
        self._count = count
        self._run = run
        self._report = reporter(on_progress)
        self._embeddings: Vectors | None = None
        self._is_settled = False
        """Something was delivered. Before that, the size of the rows may be that of a reply which was then refused."""
        self._errors: dict[int, AsyncEmbedError] = {}
        self._done = np.zeros(count, np.bool_)
        self._placed = 0
        run.place_for = self._place_for

    def _place_for(self, items: Sequence[Item]) -> Place | None:
        """Let whole texts that stand side by side be put into their rows as they come; `finish` clears the others'."""
        rows = [row for item in items if item.text.mean is None for row in item.text.indices[:1]]
        first = rows[0] if rows else 0
        if rows != list(range(first, first + len(items))):
            return None

        def place(dimensions: int) -> Vectors | None:
            embeddings = self._rows(dimensions)
            return embeddings[first : first + len(items)] if embeddings.shape[1] == dimensions else None

        return place

    def _rows(self, dimensions: int) -> Vectors:
        is_wrong = self._embeddings is not None and self._embeddings.shape[1] != dimensions
        if self._embeddings is None or (is_wrong and not self._is_settled):
            self._embeddings = np.empty((self._count, dimensions), np.float32)
        return self._embeddings

    async def deliver(self, outcome: Outcome) -> None:
        """Put the vectors into their rows, and count."""
        if outcome.texts:
            embeddings = self._rows(outcome.vectors.shape[1])  # not in a thread: two outcomes would make two of it
            self._is_settled = True
            placed = sum(len(text.indices) for text in outcome.texts)
            copied = placed - (len(outcome.texts) if outcome.vectors.base is embeddings else 0)
            is_work = copied * outcome.vectors[0].nbytes > WORTH_A_THREAD_BYTES
            await in_thread_if(is_work, self._place, embeddings, outcome)
            self._placed += placed
        for text, error in outcome.failed:
            self._errors.update(dict.fromkeys(text.indices, error))
        done = self._placed + len(self._errors)
        self._report(self._run.progress(done, self._count, len(self._errors)))

    def _place(self, embeddings: Vectors, outcome: Outcome) -> None:
        rows = [text.indices[0] for text in outcome.texts]
        if outcome.vectors.base is not embeddings:  # else they came to their places
            embeddings[rows] = outcome.vectors
        self._done[rows] = True
        for text, vector in zip(outcome.texts, outcome.vectors, strict=True):
            if len(text.indices) > 1:
                others = list(text.indices[1:])
                embeddings[others] = vector
                self._done[others] = True

    def finish(
        self, dimensions: int | None, cost_usd: float | None, stopped_by: AsyncEmbedError | None
    ) -> EmbeddingResult:
        """Return the result; rows that did not come are NaN and failed, for the reason the run was stopped."""
        missing = np.flatnonzero(~self._done)
        embeddings = self._embeddings
        if embeddings is None:
            embeddings = np.empty((self._count, dimensions or 0), np.float32)
        elif stopped_by is not None:
            embeddings = embeddings.copy()  # a thread that nobody waits for may still be placing rows in the other
        embeddings[missing] = np.nan
        unfinished = stopped_by or AsyncEmbedError("it was not finished")
        run = self._run
        return EmbeddingResult(
            embeddings,
            tuple(Failure(index, self._errors.get(index, unfinished)) for index in missing.tolist()),
            run.tokens,
            run.requests,
            run.retries,
            run.elapsed_s,
            cost_usd,
            run.cache_hits,
            run.cache_misses,
        )


class Order:
    """Puts the outcomes of a stream back into the order of its source, which it keeps from running ahead."""

    def __init__(self, most_ahead: int) -> None:
        self._most_ahead = most_ahead
        self._records: dict[int, Record] = {}
        self._done: dict[int, EmbeddedRecord] = {}
        self._read = 0
        self._yielded = 0
        self._ended = False
        self._changed = asyncio.Event()

    async def slices(self, source: AnyIterable) -> AsyncGenerator[Sequence[Text], None]:
        async with aclosing(in_slices(source, min(SLICE_RECORDS, self._most_ahead))) as slices:
            async for some in slices:
                yield self._texts(some)
                if self._read - self._yielded >= self._most_ahead:
                    yield ()  # what waits for company is what everybody waits for
                    while self._read - self._yielded >= self._most_ahead:
                        await self._change()

    def _texts(self, some: list[Any]) -> list[Text]:
        texts: list[tuple[int, str]] = []
        for index, record, error in readable(self._read, some):
            if error is None:
                self._records[index] = record
                texts.append((index, record.text))
            else:
                self._finish(index, EmbeddedRecord(record, None, error))
        self._read += len(some)
        return unique(texts)

    async def deliver(self, outcome: Outcome) -> None:
        for text, vector in zip(outcome.texts, outcome.vectors, strict=True):
            for index in text.indices:
                self._finish(index, EmbeddedRecord(self._records.pop(index), vector))
        for text, error in outcome.failed:
            for index in text.indices:
                self._finish(index, EmbeddedRecord(self._records.pop(index), None, error))

    async def items(self) -> AsyncGenerator[EmbeddedRecord, None]:
        while True:
            item = self._done.pop(self._yielded, None)
            if item is not None:
                # a copy, since who keeps one vector would with a view of it keep those of the whole request
                yield item if item.vector is None else replace(item, vector=item.vector.copy())
                self._yielded += 1
                self._changed.set()
            elif self._ended:
                return
            else:
                await self._change()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def _finish(self, index: int, item: EmbeddedRecord) -> None:
        self._done[index] = item
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


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


def reporter(on_progress: ProgressCallback | None) -> ProgressCallback:
    """Return a callback that can do no harm: one that raises is logged and not called again.

    Raises:
        TypeError: It cannot be called, or has to be awaited.
    """
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress is {type(on_progress).__name__}; it must be a function")
    if inspect.iscoroutinefunction(on_progress):
        raise TypeError("on_progress is a coroutine function, which nobody would await; pass a function")
    broken = on_progress is None

    def report(progress: Progress) -> None:
        nonlocal broken
        if broken or on_progress is None:
            return
        try:
            on_progress(progress)
        except Exception:
            broken = True
            logger.exception("on_progress raised; it is not called again in this run")

    return report
