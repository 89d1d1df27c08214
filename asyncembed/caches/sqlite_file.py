"""The file of an `SQLiteCache`: its schema, and what is read and written. Blocking: called in threads, one at a time.

    vectors(id, key, used, vector)    `key` has 32 bytes, `vector` is little-endian float32;
                                      `used` grows with every writing: the lowest leave first

No call leaves a transaction open. What SQLite raises leaves as an error of ours. No connection lives through a fork: of
those on its other side SQLite would believe that they hold the locks of this one (seen when run: rows were lost).
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain

import numpy as np

from ..databases.sqlite import KEYS_A_STATEMENT, STATEMENTS_KEPT, joined, marks, pieces
from ..errors import AsyncEmbedError, ConfigError
from ..types import Vectors

# `PRAGMA application_id` says whose file it is (sqlite.org/pragma.html): "aemc".
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

# What a row takes beside its vector: the key, there and in its index, and `used`, likewise; pages half full at worst.
ROW_BYTES = 256

# Measured with 20,000 vectors of 1,536 dimensions, 2026-11: 6.6 KB and 14 us each to write with pages of 32 KiB; 8.3 KB
# and 33 us with 4, 8 and 16 KiB, of which whole rows leave a quarter empty. 64 KiB are slower to read one by one.
PAGE_BYTES = 32_768

# How long another process's lock is waited for. Whoever is cancelled meanwhile waits, too, so it is short: what is not
# read or kept then is a miss, not an error.
BUSY_S = 1.0

# Of three parameters each.
ROWS_A_STATEMENT = 300

_FOUND = f"""
    SELECT json_group_array(hex(key)), json_group_array(used), json_group_array(length(vector)), {joined("vector")}
    FROM vectors WHERE key IN ({{}}) AND typeof(vector) = 'blob' AND length(vector) > 0 AND length(vector) % 4 = 0
"""
_OLDEST = """
    SELECT json_group_array(json_array(id, length(vector)))
    FROM (SELECT id, vector FROM vectors ORDER BY used, id LIMIT ?)
"""
_WRITE = """
    INSERT INTO vectors (key, used, vector) VALUES {}
    ON CONFLICT (key) DO UPDATE SET used = excluded.used, vector = excluded.vector
"""

# Hits that are noted together, in a transaction of their own if nothing is written meanwhile.
MOST_NOTED = 2_000

# Deleted at least, beyond what is needed: 15 ms of work, and not again with every writing.
EVICTED_BYTES = 4 * 1024 * 1024

# After a writing, the log beside the file is cut to so much, a few writings' worth.
_LOG_BYTES = 16 * 1024 * 1024

# What SQLite says when it can never work, as a caller reads it (sqlite.org/rescode.html).
_HOPELESS = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CORRUPT: "is damaged: delete it",
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_PERM: "cannot be opened",
}


class CacheFile:
    """One process's connection to a cache's file, opened at first use.

    Args:
        path: Created with mode 0600 if it is missing.
        max_bytes: What the file may take; None for as much as there is.
    """

    def __init__(self, path: str, max_bytes: int | None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None
        self._one_at_a_time = threading.Lock()
        self._is_filling = False
        self._newest = 0
        self._only_noted: int | None = None
        self._noted: set[bytes] = set()
        _files.add(self)

    def read(self, keys: Sequence[bytes]) -> dict[bytes, Vectors]:
        """Return the vectors that are there, each float32[d].

        Raises:
            ConfigError: The file can never be a cache.
            AsyncEmbedError: It cannot be read now.
        """
        found: dict[bytes, Vectors] = {}
        with self._connected() as connection:
            for some in pieces(keys, KEYS_A_STATEMENT):
                row = connection.execute(_FOUND.format(marks(len(some))), some).fetchone()
                hexes, uses, sizes = map(json.loads, row[:3])
                start = 0
                for digits, used, size in zip(hexes, uses, sizes, strict=True):
                    key = bytes.fromhex(digits)
                    # bytes of its own, since who keeps one vector would with a view keep them all
                    found[key] = _decoded(row[3][start : start + size])
                    start += size
                    # before the file is half full nobody asks who was used when
                    if self._is_filling and used < self._newest:
                        self._noted.add(key)
            if len(self._noted) >= MOST_NOTED:
                with suppress(sqlite3.Error):  # what was found is there all the same
                    self._write(connection, {})
        return found

    def write(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Store the vectors in one transaction, after the least recently used ones have made room for them.

        Raises: as `read`. Nothing was stored then.
        """
        with self._connected() as connection:
            self._write(connection, vectors)

    def close(self) -> None:
        """Note the last hits and close the connection. The next use opens it anew."""
        with self._one_at_a_time:
            if self._connection is not None and self._noted:
                with suppress(sqlite3.Error):
                    self._write(self._connection, {})
            self._disconnect()

    def before_fork(self) -> None:
        """Close the connection, and let nobody open it until `after_fork`."""
        self._one_at_a_time.acquire()
        self._disconnect()

    def after_fork(self) -> None:
        self._one_at_a_time.release()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._one_at_a_time:
            if self._connection is None:
                self._connection = self._open()
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise self._error(error) from error

    def _open(self) -> sqlite3.Connection:
        try:
            # before SQLite does it, which asks for no mode; its other files beside this one take over the mode
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(
                self._path,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=STATEMENTS_KEPT,
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise ConfigError(f"the cache {self._path} cannot be opened: {error.strerror}") from error
        except sqlite3.Error as error:
            if _code(error) in _HOPELESS:
                raise ConfigError(f"the cache {self._path} {_HOPELESS[_code(error)]}") from error
            raise self._error(error) from error
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # in this order: another process may be creating it, and where there are tables there is an owner then
        tables = _number(connection, "SELECT count(*) FROM sqlite_master")
        owner = _number(connection, "PRAGMA application_id")
        version = _number(connection, "PRAGMA user_version")
        if owner != APPLICATION_ID and (tables or owner):
            raise ConfigError(f"{self._path} is a database, but no cache: choose another file")
        if version > VERSION:
            raise ConfigError(f"the cache {self._path} has version {version}; this library writes {VERSION}")
        connection.execute("PRAGMA temp_store = MEMORY")  # the folder for temporary files may be full
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # heeded by a new file only
        with suppress(sqlite3.OperationalError):  # a disk that cannot share memory: slower, and as safe
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last vectors, never the file
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        if not tables:
            connection.executescript(_SCHEMA)
        self._newest, self._is_filling = _newest(connection), self._is_over(connection, 0.5)

    def _write(self, connection: sqlite3.Connection, vectors: Mapping[bytes, Vectors]) -> None:
        rows = [(key, vector.astype("<f4", copy=False).tobytes()) for key, vector in vectors.items()]
        noted, self._noted = self._noted, set()  # lost if this fails, which does no harm
        with _transaction(connection):
            now = _newest(connection)
            if rows or now != self._only_noted:  # else all hits would be older again, and noted, whenever some are
                now += 1
            for some in pieces(noted, KEYS_A_STATEMENT):
                connection.execute(f"UPDATE vectors SET used = ? WHERE key IN ({marks(len(some))})", (now, *some))
            self._make_room(connection, sum(_most_stored(blob) for _, blob in rows))
            for written in pieces(rows, ROWS_A_STATEMENT):
                values = chain.from_iterable((key, now, blob) for key, blob in written)
                connection.execute(_WRITE.format(marks(len(written), "(?, ?, ?)")), tuple(values))
        self._newest, self._only_noted = now, None if rows else now
        self._is_filling = self._is_over(connection, 0.5)

    def _make_room(self, connection: sqlite3.Connection, needed: int) -> None:
        while self._is_over(connection, 1.0, needed):
            least, evicted = max(needed, min(EVICTED_BYTES, (self._max_bytes or 0) // 8)), 0
            while evicted < least:
                oldest = json.loads(connection.execute(_OLDEST, (KEYS_A_STATEMENT,)).fetchone()[0])
                if not oldest:
                    return
                leaving = []
                for id, length in oldest:
                    leaving.append(id)
                    evicted += length
                    if evicted >= least:
                        break
                connection.execute(f"DELETE FROM vectors WHERE id IN ({marks(len(leaving))})", leaving)

    def _is_over(self, connection: sqlite3.Connection, share: float, more: int = 0) -> bool:
        """Tell whether the pages in use, and so many bytes, take more than that share of what the file may take."""
        if self._max_bytes is None:
            return False
        pages = _number(connection, "PRAGMA page_count") - _number(connection, "PRAGMA freelist_count")
        return pages * _number(connection, "PRAGMA page_size") + more > share * self._max_bytes

    def _error(self, error: sqlite3.Error) -> AsyncEmbedError:
        return AsyncEmbedError(f"the cache {self._path} cannot be used: {error}")


_files: weakref.WeakSet[CacheFile] = weakref.WeakSet()
_forking: list[CacheFile] = []
_one_fork_at_a_time = threading.Lock()


def _before_fork() -> None:
    _one_fork_at_a_time.acquire()
    _forking.extend(_files)
    for file in _forking:
        file.before_fork()


def _after_fork() -> None:
    while _forking:
        _forking.pop().after_fork()
    _one_fork_at_a_time.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite ends it by itself when the disk is full
            connection.execute("ROLLBACK")
        raise


def parts(vectors: Mapping[bytes, Vectors], most_bytes: int) -> Iterator[dict[bytes, Vectors]]:
    """Cut into parts that one transaction may take; a vector that is larger by itself is left out."""
    part: dict[bytes, Vectors] = {}
    size = 0
    for key, vector in vectors.items():
        bytes_more = vector.nbytes + ROW_BYTES
        if bytes_more > most_bytes:
            continue
        if size + bytes_more > most_bytes:
            yield part
            part, size = {}, 0
        part[key] = vector
        size += bytes_more
    if part:
        yield part


def _most_stored(blob: bytes) -> int:
    # a row of just over half a page has that page to itself
    return 2 * len(blob) + ROW_BYTES


def _decoded(blob: bytes) -> Vectors:
    return np.frombuffer(blob, "<f4").astype(np.float32, copy=False)


def _newest(connection: sqlite3.Connection) -> int:
    return _number(connection, "SELECT coalesce(max(used), 0) FROM vectors")


def _number(connection: sqlite3.Connection, statement: str) -> int:
    number: int = connection.execute(statement).fetchone()[0]
    return number


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
