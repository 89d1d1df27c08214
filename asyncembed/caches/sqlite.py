"""`SQLiteCache`: vectors in an SQLite file, shared by processes and kept over restarts.

Lookups that arrive while the file is in use are answered together by the next read, so that a thousand lookups of one
text each take a few hops to the file's thread, not a thousand.
"""

from __future__ import annotations

import asyncio
import copy
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..concurrency import PerLoop
from ..databases.sqlite import Database, T, Work
from ..errors import AsyncEmbedError, ConfigError
from ..options import check_range
from ..types import Vectors
from .sqlite_file import CacheFile, parts

# 320,000 vectors of 1,536 dimensions.
DEFAULT_MAX_BYTES = 2 * 1024 * 1024 * 1024

# Less would be little more than the file's own pages.
MIN_BYTES = 1024 * 1024

# Written in one transaction: 20 ms, for which lookups wait.
BYTES_PER_TRANSACTION = 4 * 1024 * 1024

# How long the lock of another process is waited for. It is short, because a vector that is not read or kept is only a
# miss.
BUSY_TIMEOUT_S = 1.0


@dataclass(slots=True, eq=False)
class _Lookup:
    """The keys of one `get`, and its outcome."""

    keys: Sequence[bytes]
    outcome: Mapping[bytes, Vectors] | AsyncEmbedError | None = None


@dataclass(slots=True, eq=False)
class _LookupQueue:
    """The lookups of one event loop that have no outcome yet; one of them reads for all."""

    waiting: set[_Lookup] = field(default_factory=set)
    read_ended: asyncio.Event | None = None
    """Set when the current read ends; None if there is none."""


class SQLiteCache:
    """Keeps vectors in a file; the oldest are evicted first.

    Embedders, event loops, threads and processes may share it. It connects at first use, and again when it is used
    after `aclose`.

    Args:
        path: The file; created at first use, readable by this user alone.
        max_bytes: The most that the file may take, at least 1 MiB; None is no limit. The log beside it takes some
            megabytes more while it is in use.

    Raises:
        ConfigError: An option cannot be used. At first use: the file is another database, damaged, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = DEFAULT_MAX_BYTES) -> None:
        if max_bytes is not None:
            check_range("max_bytes", max_bytes, MIN_BYTES)
        self._shown = os.fspath(path)
        if not isinstance(self._shown, str) or self._shown in ("", ":memory:"):
            raise ConfigError(f"cache={self._shown!r}; it must be the path of a file, or True for a cache in memory")
        self._part_bytes = BYTES_PER_TRANSACTION if max_bytes is None else min(BYTES_PER_TRANSACTION, max_bytes // 8)
        self._file = CacheFile(os.path.abspath(self._shown), max_bytes)
        self._database = Database(self._file.open, busy_timeout_s=BUSY_TIMEOUT_S)
        self._queues = PerLoop(_LookupQueue)

    def __repr__(self) -> str:
        return f"SQLiteCache({self._shown!r})"

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        """Return the stored vectors of these keys, each float32[d] and read-only.

        Raises:
            ConfigError: The file can never be a cache.
            AsyncEmbedError: It cannot be read now.
        """
        queue, lookup = self._queues.get(), _Lookup(keys)
        queue.waiting.add(lookup)
        try:
            while lookup.outcome is None:
                if queue.read_ended is None:
                    await self._read(queue)
                else:  # an event resumes all at once, a lock one by one: then callers would share fewer requests
                    await queue.read_ended.wait()
        finally:
            queue.waiting.discard(lookup)  # if it was cancelled
        if isinstance(lookup.outcome, AsyncEmbedError):
            raise copy.copy(lookup.outcome)  # each call raises its own error, since raising adds a traceback
        assert lookup.outcome is not None
        return lookup.outcome

    async def _read(self, queue: _LookupQueue) -> None:
        queue.read_ended = ended = asyncio.Event()
        try:
            await asyncio.sleep(0)  # lookups that start at the same time join this read
            await self._answer(queue.waiting)
        finally:
            queue.read_ended = None
            ended.set()

    async def _answer(self, waiting: set[_Lookup]) -> None:
        """Give all waiting lookups their outcome, by one read."""
        lookups = list(waiting)
        keys = list({key: None for lookup in lookups for key in lookup.keys})
        try:
            found = await self._run(partial(self._file.read, keys=keys))
        except AsyncEmbedError as error:
            for lookup in lookups:
                lookup.outcome = error
        else:
            for lookup in lookups:
                lookup.outcome = {key: found[key] for key in lookup.keys if key in found}
        waiting.difference_update(lookups)

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Store the vectors, except those too large for the whole cache. A cancelled call has stored some of them.

        Raises: as `get`.
        """
        for part in parts(vectors, self._part_bytes):
            await self._run(partial(self._file.write, vectors=part))

    async def aclose(self) -> None:
        """Close the file after the work under way."""
        await self._database.aclose()

    async def _run(self, work: Work[T]) -> T:
        try:
            return await self._database.run(work)
        except sqlite3.Error as error:
            raise AsyncEmbedError(f"the cache {self._file.path} cannot be used: {error}") from error
