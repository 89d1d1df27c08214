"""The connections of a sink: a pool that was handed in, or one of our own for every event loop."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial

from ...databases.postgres import CLOSE_S, Connection, Pool, create_pool, widen
from ...errors import SinkError
from .pgvector import teach


class LoopPool:
    """The pool that was handed in, or one of our own, made anew for every event loop."""

    def __init__(self, dsn_or_pool: str | Pool, size: int, name: str) -> None:
        self._given = None if isinstance(dsn_or_pool, str) else dsn_or_pool
        self._dsn = dsn_or_pool if isinstance(dsn_or_pool, str) else None
        self._size = size
        self._name = name
        self._own: Pool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keeper: AsyncGenerator[None, None] | None = None
        self._ignorant = asyncio.Event()  # set when a connection is made where there is no pgvector yet

    def __del__(self) -> None:
        if self._own is not None and self._loop is not None and not self._loop.is_closed():
            text = f"the sink for {self._name} was not closed: use `async with`, or aclose()"
            warnings.warn(text, ResourceWarning, stacklevel=2)

    @property
    def is_given(self) -> bool:
        """Whether somebody else made it, and will close it."""
        return self._given is not None

    async def open(self) -> Pool:
        """Return the pool for the running loop.

        Raises:
            SinkError: The one that was handed in is closed, not open yet, or another loop's.
        """
        loop = asyncio.get_running_loop()
        if self._given is not None:
            if self._given.is_closing():
                raise SinkError(f"{self._name}: the pool is closed")
            # asyncpg has no other words for these two
            if not getattr(self._given, "_initialized", True):
                raise SinkError(f"{self._name}: the pool is not open yet: await it, or enter it with `async with`")
            if getattr(self._given, "_loop", loop) is not loop:
                raise SinkError(f"{self._name}: the pool belongs to another event loop: make one in this loop")
            return self._given
        if self._own is not None and self._loop is loop:
            return self._own
        if self._own is not None and self._loop is not None and self._loop.is_running():
            raise SinkError(f"{self._name} is in use by another running event loop: make a sink for each")
        self._loop = loop
        assert self._dsn is not None
        first_words = partial(_first_words, self._ignorant)
        self._own = create_pool(self._dsn, min_size=0, max_size=self._size, init=first_words, reset=_no_words)
        await self._own  # connects nothing yet, and so does not wait
        self._keeper = _kept(self._own)
        await anext(self._keeper)
        return self._own

    async def learn(self) -> None:
        """Have connections that know of no pgvector made anew before they are used again: now there is one."""
        if self._own is not None and self._ignorant.is_set():
            self._ignorant.clear()
            await self._own.expire_connections()

    async def aclose(self) -> None:
        """Close the connections that were made here."""
        keeper, self._keeper, self._own = self._keeper, None, None
        if keeper is not None and self._loop is asyncio.get_running_loop():
            await keeper.aclose()


async def _first_words(ignorant: asyncio.Event, connection: Connection) -> None:
    widen(connection)
    async with connection.transaction():  # all on one backend, should a pooler stand between
        if not await teach(connection):
            ignorant.set()


async def _no_words(connection: Connection) -> None:
    """Do without asyncpg's RESET ALL and the like: what we set, we set for one transaction."""


async def _kept(pool: Pool) -> AsyncGenerator[None, None]:
    """Close the pool when this is closed; asyncio does that to open generators before it closes their loop."""
    try:
        yield
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await pool.close()  # and if it cannot, it cuts its connections
