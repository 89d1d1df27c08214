"""`stream`: reads a source a bounded distance ahead, and yields the results in the order of the source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ..batching.batch import Outcome
from ..batching.texts import Text, unique
from ..sources.records import CHUNK_RECORDS, AnyIterable, checked_records, in_chunks
from ..types import EmbeddedRecord, Record


class OrderedStream:
    """The receiver of one `stream` call: restores the order of the source, and bounds how far it is read ahead.

    At most `most_ahead` records are read and not yet yielded; one chunk may exceed it.
    """

    def __init__(self, most_ahead: int) -> None:
        self._most_ahead = most_ahead
        self._records: dict[int, Record] = {}
        self._done: dict[int, EmbeddedRecord] = {}
        self._read = 0
        self._yielded = 0
        self._ended = False
        self._changed = asyncio.Event()

    async def slices(self, source: AnyIterable) -> AsyncGenerator[Sequence[Text], None]:
        """Yield the texts to be embedded, in slices; an empty slice flushes partly filled batches."""
        async with aclosing(in_chunks(source, min(CHUNK_RECORDS, self._most_ahead))) as slices:
            async for some in slices:
                yield self._texts(some)  # for IDLE, an empty slice
                if self._read - self._yielded >= self._most_ahead:
                    yield ()  # flush: the reader waits for a batch that is only partly filled
                    while self._read - self._yielded >= self._most_ahead:
                        await self._change()

    def _texts(self, some: Sequence[Any]) -> list[Text]:
        texts: list[tuple[int, str]] = []
        for index, record, error in checked_records(self._read, some):
            if error is None:
                self._records[index] = record
                texts.append((index, record.text))
            else:
                self._finish(index, EmbeddedRecord(record, None, error))
        self._read += len(some)
        return unique(texts)

    async def deliver(self, outcome: Outcome) -> None:
        """Hold the records of an outcome until `items` yields them."""
        for text, vector in zip(outcome.texts, outcome.vectors, strict=True):
            for index in text.indices:
                self._finish(index, EmbeddedRecord(self._records.pop(index), vector))
        for text, error in outcome.failed:
            for index in text.indices:
                self._finish(index, EmbeddedRecord(self._records.pop(index), None, error))

    async def items(self) -> AsyncGenerator[EmbeddedRecord, None]:
        """Yield the records in order, each as soon as all earlier ones were yielded."""
        while True:
            item = self._done.pop(self._yielded, None)
            if item is not None:
                # copied: a view would keep all vectors of its request in memory
                yield item if item.vector is None else replace(item, vector=item.vector.copy())
                self._yielded += 1
                self._changed.set()
            elif self._ended:
                return
            else:
                await self._change()

    def end(self) -> None:
        """End `items` after the finished records: nothing more will be delivered."""
        self._ended = True
        self._changed.set()

    def _finish(self, index: int, item: EmbeddedRecord) -> None:
        self._done[index] = item
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
