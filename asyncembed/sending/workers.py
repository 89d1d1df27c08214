"""A few tasks that bring pieces of work to their end, and share what is left of each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """Runs `step` on every piece that is put in, and on every piece that a step returns, until none is left.

    Tasks are started as they are needed, at most so many, inside the caller's group: what one of them raises ends
    them all.

    Args:
        group: Where the tasks live.
        most: How many tasks there may be, beside those that are `aside`.
        spare: How many may be aside without counting.
        step: Does a piece of work; returns what is left of it, in order, to be done before anything newer.
    """

    def __init__(
        self, group: asyncio.TaskGroup, most: int, step: Callable[[T], Awaitable[list[T]]], *, spare: int = 0
    ) -> None:
        self._group = group
        self._most = most
        self._spare = spare
        self._aside = 0
        self._step = step
        self._pieces: deque[T] = deque()
        self._workers = 0
        self._idle = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def put(self, piece: T) -> None:
        """Hand over a piece; waits until somebody can take it, so that no more is in memory than is worked on."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._idle > len(self._pieces) or self._may_grow())
            self._pieces.append(piece)
            self._call_workers()

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """While a step waits for nothing but time, let another task do its work."""
        async with self._changed:
            self._aside += 1
            self._call_workers()
        try:
            yield
        finally:
            self._aside -= 1

    async def close(self) -> None:
        """Nothing more comes from outside: the tasks end when nothing is left."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _call_workers(self) -> None:
        while self._idle < len(self._pieces) and self._may_grow():
            self._workers += 1
            self._idle += 1
            self._group.create_task(self._work())
        self._changed.notify_all()

    async def _work(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._pieces or self._is_finished())
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                self._idle -= 1
            left = await self._step(piece)
            async with self._changed:
                self._idle += 1
                self._pieces.extendleft(reversed(left))
                self._call_workers()

    def _may_grow(self) -> bool:
        return self._workers < self._most + min(self._aside, self._spare)

    def _is_finished(self) -> bool:
        return self._closed and self._idle == self._workers
