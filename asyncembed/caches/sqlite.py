"""Vectors in an SQLite file, shared by processes and kept over restarts: `SQLiteCache`.

`sqlite3` blocks, so it runs in a thread, one piece of work at a time. Calls that ask while one is under way are
answered together by the next, so a thousand lookups of one text each do not go through a thread a thousand times.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..concurrency import PerLoop, finished
from ..errors import AsyncEmbedError, ConfigError
from ..options import check_range
from ..types import Vectors
from .sqlite_file import CacheFile, parts

# 320,000 vectors of 1,536 dimensions.
DEFAULT_MAX_BYTES = 2 * 1024 * 1024 * 1024

# Less would be little more than the file's own pages.
LEAST_BYTES = 1024 * 1024

# Written in one transaction: 20 ms, for which lookups wait.
BYTES_A_TURN = 4 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Lookup:
    """What one call asks for, and what has come of it."""

    keys: Sequence[bytes]
    done: asyncio.Future[Mapping[bytes, Vectors]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(slots=True, eq=False)
class _Lane:
    """One event loop's way to the file, and the lookups that wait for their turn on it."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: set[_Lookup] = field(default_factory=set)


class SQLiteCache:
    """Keeps vectors in a file; the least recently used ones leave first.

    May be shared by embedders, event loops, threads and processes. It connects at first use, and after `aclose` anew.

    Args:
        path: The file; created at first use, readable by this user alone.
        max_bytes: What the file may take, at least 1 MiB; None for as much as the disk has. The log beside it takes
            some megabytes more while it is in use.

    Raises:
        ConfigError: An option cannot be used. At first use: the file is none of ours, damaged, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = DEFAULT_MAX_BYTES) -> None:
        if max_bytes is not None:
            check_range("max_bytes", max_bytes, LEAST_BYTES)
        self._shown = os.fspath(path)
        if not isinstance(self._shown, str) or self._shown in ("", ":memory:"):
            raise ConfigError(f"cache={self._shown!r}; it must be the path of a file, or True for a cache in memory")
        self._most_at_once = BYTES_A_TURN if max_bytes is None else min(BYTES_A_TURN, max_bytes // 8)
        self._file = CacheFile(os.path.abspath(self._shown), max_bytes)
        self._lanes = PerLoop(_Lane)

    def __repr__(self) -> str:
        return f"SQLiteCache({self._shown!r})"

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        """Return those it has, each float32[d] and read-only.

        Raises:
            ConfigError: The file can never be a cache.
            AsyncEmbedError: It cannot be read now.
        """
        lane, lookup = self._lanes.get(), _Lookup(keys)
        lane.waiting.add(lookup)
        try:
            async with lane.turn:
                if not lookup.done.done():
                    await finished(self._serve(lane))
            return lookup.done.result()
        finally:
            lane.waiting.discard(lookup)  # if it was cancelled before its turn

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Store the vectors; those too large for the whole cache are left out. Cancelled, some of them are stored.

        Raises: as `get`.
        """
        lane = self._lanes.get()
        for part in parts(vectors, self._most_at_once):
            async with lane.turn:
                await finished(asyncio.to_thread(self._file.write, part))

    async def aclose(self) -> None:
        """Close the file, after what is under way."""
        async with self._lanes.get().turn:
            await finished(asyncio.to_thread(self._file.close))

    async def _serve(self, lane: _Lane) -> None:
        """Answer all lookups that wait."""
        lookups, lane.waiting = lane.waiting, set()
        keys = list({key: None for lookup in lookups for key in lookup.keys})
        try:
            found = await asyncio.to_thread(self._file.read, keys)
        except AsyncEmbedError as error:
            for lookup in lookups:
                lookup.done.set_exception(copy.copy(error))  # each its own: a traceback is added where it is raised
                lookup.done.exception()  # seen, or asyncio would log it as lost for who was cancelled
            return
        except BaseException:  # the loop is ending, perhaps; whoever still waits takes the next turn
            lane.waiting |= lookups
            raise
        for lookup in lookups:
            lookup.done.set_result({key: found[key] for key in lookup.keys if key in found})
