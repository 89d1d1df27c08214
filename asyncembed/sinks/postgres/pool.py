"""The connections of a sink: a pool that was handed in, or its own pool for each event loop."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator
from contextlib import suppress

from ...databases.postgres import CLOSE_S, Connection, Pool, create_pool
from ...errors import SinkError
from .pgvector import register_codec


class LoopPool:
    """A pool that was handed in, or our own, which is replaced when the event loop changes."""

    def __init__(self, dsn_or_pool: str | Pool, size: int, name: str) -> None:
        self.name = name
        self.is_given = not isinstance(dsn_or_pool, str)
        self._source = dsn_or_pool
        self._size = size
        self._loop: asyncio.AbstractEventLoop | None = None  # the one of our own pool
        self._own: Pool | None = None
        self._closer: AsyncGenerator[Pool, None] | None = None
        self._missing_extension = asyncio.Event()  # set by a connection to a database that had no pgvector yet

    def __del__(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            text = f"the sink for {self.name} was not closed: use `async with`, or aclose()"
            warnings.warn(text, ResourceWarning, stacklevel=2)

    async def open(self) -> Pool:
        """Return the pool for the running loop.

        Raises:
            SinkError: The pool that was handed in is closed, not open yet, or belongs to another loop.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(self._source, str):
            if self._source.is_closing():
                raise SinkError(f"{self.name}: the pool is closed")
            # asyncpg shows the next two only in private attributes
            if not getattr(self._source, "_initialized", True):
                raise SinkError(f"{self.name}: the pool is not open yet: await it, or enter it with `async with`")
            if getattr(self._source, "_loop", loop) is not loop:
                raise SinkError(f"{self.name}: the pool belongs to another event loop: make one in this loop")
            return self._source
        if self._loop is loop:
            return self._own
        if self._loop is not None and self._loop.is_running():
            raise SinkError(f"{self.name} is in use by another running event loop: make a sink for each")
        self._closer = _own_pool(self._source, self._size, self._missing_extension)
        self._own = await anext(self._closer)
        self._loop = loop
        return self._own

    async def renew(self) -> None:
        """Replace connections that were made before the extension existed, so that the new ones get its codec."""
        if self._own is not None and self._missing_extension.is_set():
            self._missing_extension.clear()
            await self._own.expire_connections()

    async def aclose(self) -> None:
        """Close our own connections."""
        closer, loop = self._closer, self._loop
        self._closer = self._loop = self._own = None
        if closer is not None and loop is asyncio.get_running_loop():
            await closer.aclose()


# a function without `self`: the connections refer to it, so the sink would never be collected
async def _own_pool(dsn: str, size: int, missing_extension: asyncio.Event) -> AsyncGenerator[Pool, None]:
    """Yield a pool that is closed with this generator, which asyncio does before it closes the loop."""

    async def on_connect(connection: Connection) -> None:
        async with connection.transaction():  # all on one backend, even through a pooler
            if not await register_codec(connection):
                missing_extension.set()

    async def on_release(connection: Connection) -> None:
        """Skip asyncpg's RESET ALL and the like: our settings end with their transaction."""

    pool = create_pool(dsn, min_size=0, max_size=size, init=on_connect, reset=on_release)
    await pool  # with min_size=0 it does not connect, and so does not wait
    try:
        yield pool
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await pool.close()  # cancelled, it cuts its connections
