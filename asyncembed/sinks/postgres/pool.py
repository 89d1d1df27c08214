"""The connections of a sink: a pool that was handed in, or its own pool for each event loop."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial

from ...databases.postgres import CLOSE_S, Connection, Pool, create_pool
from ...errors import SinkError
from .pgvector import register_codec


class LoopPool:
    """A pool that was handed in, or our own, which is replaced when the event loop changes."""

    def __init__(self, dsn_or_pool: str | Pool, size: int, name: str) -> None:
        self._source = dsn_or_pool
        self._size = size
        self._name = name
        self._own: Pool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closer: AsyncGenerator[None, None] | None = None
        self._missing_extension = asyncio.Event()  # set by a connection to a database that had no pgvector yet

    def __del__(self) -> None:
        if self._own is not None and self._loop is not None and not self._loop.is_closed():
            text = f"the sink for {self._name} was not closed: use `async with`, or aclose()"
            warnings.warn(text, ResourceWarning, stacklevel=2)

    @property
    def is_given(self) -> bool:
        """Whether the pool was handed in; then its owner closes it."""
        return not isinstance(self._source, str)

    async def open(self) -> Pool:
        """Return the pool for the running loop.

        Raises:
            SinkError: The pool that was handed in is closed, not open yet, or belongs to another loop.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(self._source, str):
            if self._source.is_closing():
                raise SinkError(f"{self._name}: the pool is closed")
            # asyncpg shows the next two only in private attributes
            if not getattr(self._source, "_initialized", True):
                raise SinkError(f"{self._name}: the pool is not open yet: await it, or enter it with `async with`")
            if getattr(self._source, "_loop", loop) is not loop:
                raise SinkError(f"{self._name}: the pool belongs to another event loop: make one in this loop")
            return self._source
        if self._own is not None and self._loop is loop:
            return self._own
        if self._own is not None and self._loop is not None and self._loop.is_running():
            raise SinkError(f"{self._name} is in use by another running event loop: make a sink for each")
        self._loop = loop
        on_connect = partial(_on_connect, self._missing_extension)  # without `self`, or it would never be collected
        self._own = create_pool(self._source, min_size=0, max_size=self._size, init=on_connect, reset=_on_release)
        await self._own  # with min_size=0 it does not connect, and so does not wait
        self._closer = _closing(self._own)
        await anext(self._closer)
        return self._own

    async def renew(self) -> None:
        """Replace connections that were made before the extension existed, so that the new ones get its codec."""
        if self._own is not None and self._missing_extension.is_set():
            self._missing_extension.clear()
            await self._own.expire_connections()

    async def aclose(self) -> None:
        """Close our own connections."""
        closer, self._closer, self._own = self._closer, None, None
        if closer is not None and self._loop is asyncio.get_running_loop():
            await closer.aclose()


async def _on_connect(missing_extension: asyncio.Event, connection: Connection) -> None:
    async with connection.transaction():  # all on one backend, even through a pooler
        if not await register_codec(connection):
            missing_extension.set()


async def _on_release(connection: Connection) -> None:
    """Skip asyncpg's RESET ALL and the like: our settings end with their transaction."""


async def _closing(pool: Pool) -> AsyncGenerator[None, None]:
    """Close the pool when this generator is closed, which asyncio does before it closes the loop."""
    try:
        yield
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await pool.close()  # cancelled, it cuts its connections
