"""`SQLiteCache`: vectors in an SQLite file, shared by processes and kept over restarts.

    vectors(id, key, used, vector)    `key` has 32 bytes, `vector` is little-endian float32;
                                      `used` grows with every write: the lowest are evicted first

Lookups that arrive while the file is in use are answered together by the next read, so that a thousand lookups of one
text each take a few hops to the file's thread, not a thousand.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np

from ..concurrency import PerLoop
from ..databases.sqlite import (
    KEYS_PER_STATEMENT,
    Database,
    T,
    Work,
    batched,
    concatenated,
    connect,
    placeholders,
    primary_code,
    set_up_for_writing,
    single_value,
    transaction,
)
from ..errors import AsyncEmbedError, ConfigError
from ..options import check_range
from ..types import Vectors

DEFAULT_MAX_BYTES = 2 * 1024 * 1024 * 1024  # 320,000 vectors of 1,536 dimensions
MIN_BYTES = 1024 * 1024  # less would be little more than the file's own pages
BYTES_PER_TRANSACTION = 4 * 1024 * 1024  # takes 20 ms, for which lookups wait

# How long to wait for the lock of another process: short, because a vector that is not read or kept is only a miss.
BUSY_TIMEOUT_S = 1.0

# `PRAGMA application_id` identifies the files of this library (sqlite.org/pragma.html): "aemc".
APPLICATION_ID = 0x61656D63
VERSION = 1

_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS vectors (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    used INTEGER NOT NULL,
    vector BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS vectors_by_use ON vectors (used);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
"""

# What a row takes beside its vector: key and `used`, each also in its index; pages half full at worst.
ROW_BYTES = 256

# Measured with 20,000 vectors of 1,536 dimensions, 2026-11: 6.6 KB and 14 us each to write with pages of 32 KiB; 8.3 KB
# and 33 us with 4, 8 and 16 KiB, of which whole rows leave a quarter empty. 64 KiB are slower to read one by one.
PAGE_BYTES = 32_768

ROWS_PER_STATEMENT = 300  # of three parameters each

_SELECT = f"""
    SELECT json_group_array(hex(key)), json_group_array(length(vector)), {concatenated("vector")}
    FROM vectors WHERE key IN ({{}}) AND typeof(vector) = 'blob' AND length(vector) > 0 AND length(vector) % 4 = 0
"""
_OLDEST = f"""
    SELECT json_group_array(id), sum(bytes)
    FROM (SELECT id, bytes, sum(bytes) OVER (ORDER BY used, id) - bytes AS bytes_before
        FROM (SELECT id, used, length(vector) AS bytes FROM vectors ORDER BY used, id LIMIT {KEYS_PER_STATEMENT}))
    WHERE bytes_before < ?
"""
_UPSERT = """
    INSERT INTO vectors (key, used, vector) VALUES {}
    ON CONFLICT (key) DO UPDATE SET used = excluded.used, vector = excluded.vector
"""

# An eviction deletes at least this much, so that not every write has to evict: 15 ms of work.
EVICTED_BYTES = 4 * 1024 * 1024

# After a write, the log beside the file is truncated to this size, that of a few writes.
_LOG_BYTES = 16 * 1024 * 1024

# SQLite's result codes for a file that can never be a cache (sqlite.org/rescode.html).
_UNUSABLE = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CORRUPT: "is damaged: delete it",
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_PERM: "cannot be opened",
}


@dataclass(slots=True, eq=False)
class _Lookup:
    """The keys of one `get`, and its outcome."""

    keys: Sequence[bytes]
    outcome: Mapping[bytes, Vectors] | AsyncEmbedError | None = None


@dataclass(slots=True, eq=False)
class _LookupQueue:
    """The lookups of one event loop that have no outcome yet; one of them reads for all."""

    waiting: set[_Lookup] = field(default_factory=set)
    read_ended: asyncio.Event | None = None  # set when the current read ends; None if there is none


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


@dataclass(frozen=True, slots=True)
class CacheFile:
    """The file of a cache. Its methods run on the database's thread, and leave no transaction open."""

    path: str
    max_bytes: int | None

    def open(self) -> sqlite3.Connection:
        """Return a connection to the file, which is created with mode 0600 if it is missing.

        Raises:
            ConfigError: The file can never be a cache.
            sqlite3.Error: It cannot be opened now.
        """
        try:
            # before SQLite does it with another mode; its other files beside this one get the same mode
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = connect(self.path)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise ConfigError(f"the cache {self.path} cannot be opened: {error.strerror}") from error
        except sqlite3.Error as error:
            if primary_code(error) in _UNUSABLE:
                raise ConfigError(f"the cache {self.path} {_UNUSABLE[primary_code(error)]}") from error
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # in this order: another process may create it at the same time, and sets the owner together with the tables
        tables = single_value(connection, "SELECT count(*) FROM sqlite_master")
        owner = single_value(connection, "PRAGMA application_id")
        version = single_value(connection, "PRAGMA user_version")
        if owner != APPLICATION_ID and (tables or owner):
            raise ConfigError(f"{self.path} is a database, but no cache: choose another file")
        if version > VERSION:
            raise ConfigError(f"the cache {self.path} has version {version}; this library writes {VERSION}")
        # with NORMAL a power cut may cost the last vectors, never the file
        set_up_for_writing(connection, page_bytes=PAGE_BYTES, synchronous="NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        if not tables:
            connection.executescript(_SCHEMA)

    def read(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Vectors]:
        """Return the stored vectors of these keys, each float32[d]."""
        found: dict[bytes, Vectors] = {}
        for some in batched(keys, KEYS_PER_STATEMENT):
            keys_as_hex, sizes, blobs = connection.execute(_SELECT.format(placeholders(len(some))), some).fetchone()
            start = 0
            for digits, size in zip(json.loads(keys_as_hex), json.loads(sizes), strict=True):
                # its own bytes: a view of one vector would keep all others in memory
                blob = blobs[start : start + size]
                found[bytes.fromhex(digits)] = np.frombuffer(blob, "<f4").astype(np.float32, copy=False)
                start += size
        return found

    def write(self, connection: sqlite3.Connection, vectors: Mapping[bytes, Vectors]) -> None:
        """Store the vectors in one transaction, after the oldest have made room for them."""
        rows = [(key, vector.astype("<f4", copy=False).tobytes()) for key, vector in vectors.items()]
        with transaction(connection):
            now = single_value(connection, "SELECT coalesce(max(used), 0) + 1 FROM vectors")
            # twice its size, because a row of just over half a page has that page to itself
            self._make_room(connection, sum(2 * len(blob) + ROW_BYTES for _, blob in rows))
            for some in batched(rows, ROWS_PER_STATEMENT):
                values = chain.from_iterable((key, now, blob) for key, blob in some)
                connection.execute(_UPSERT.format(placeholders(len(some), "(?, ?, ?)")), tuple(values))

    def _make_room(self, connection: sqlite3.Connection, needed: int) -> None:
        while self.max_bytes is not None and _bytes_in_use(connection) + needed > self.max_bytes:
            target = max(needed, min(EVICTED_BYTES, self.max_bytes // 8))
            while target > 0:
                ids, evicted = connection.execute(_OLDEST, (target,)).fetchone()
                if evicted is None:  # there are no rows
                    return
                connection.execute("DELETE FROM vectors WHERE id IN (SELECT value FROM json_each(?))", (ids,))
                target -= evicted


def parts(vectors: Mapping[bytes, Vectors], max_bytes: int) -> Iterator[dict[bytes, Vectors]]:
    """Yield parts of at most `max_bytes`, each for one transaction; a vector larger than that is left out."""
    part: dict[bytes, Vectors] = {}
    size = 0
    for key, vector in vectors.items():
        row_bytes = vector.nbytes + ROW_BYTES
        if row_bytes > max_bytes:
            continue
        if size + row_bytes > max_bytes:
            yield part
            part, size = {}, 0
        part[key] = vector
        size += row_bytes
    if part:
        yield part


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    pages, free_pages, page_bytes = (
        single_value(connection, f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free_pages) * page_bytes)
