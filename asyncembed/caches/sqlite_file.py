"""The file of an `SQLiteCache`: its schema, and how vectors are read, written and evicted.

    vectors(id, key, used, vector)    `key` has 32 bytes, `vector` is little-endian float32;
                                      `used` grows with every write: the lowest are evicted first

Synchronous: `databases.sqlite.Database` calls these functions on its thread. None leaves a transaction open.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..databases.sqlite import (
    KEYS_PER_STATEMENT,
    batched,
    concatenated,
    connect,
    placeholders,
    primary_code,
    set_up_for_writing,
    single_value,
    transaction,
)
from ..errors import ConfigError
from ..types import Vectors

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

# The bytes of a row beside its vector: key and `used`, each also in its index; pages half full at worst.
ROW_BYTES = 256

# Measured with 20,000 vectors of 1,536 dimensions, 2026-11: 6.6 KB and 14 us each to write with pages of 32 KiB; 8.3 KB
# and 33 us with 4, 8 and 16 KiB, of which whole rows leave a quarter empty. 64 KiB are slower to read one by one.
PAGE_BYTES = 32_768

# Of three parameters each.
ROWS_PER_STATEMENT = 300

_SELECT = f"""
    SELECT json_group_array(hex(key)), json_group_array(length(vector)), {concatenated("vector")}
    FROM vectors WHERE key IN ({{}}) AND typeof(vector) = 'blob' AND length(vector) > 0 AND length(vector) % 4 = 0
"""
_OLDEST = """
    SELECT json_group_array(json_array(id, length(vector)))
    FROM (SELECT id, vector FROM vectors ORDER BY used, id LIMIT ?)
"""
_UPSERT = """
    INSERT INTO vectors (key, used, vector) VALUES {}
    ON CONFLICT (key) DO UPDATE SET used = excluded.used, vector = excluded.vector
"""

# An eviction deletes at least this much, so that not every write has to evict: 15 ms of work.
EVICTED_BYTES = 4 * 1024 * 1024

# After a write, the log beside the file is truncated to this size, which a few writes fill.
_LOG_BYTES = 16 * 1024 * 1024

# SQLite's result codes for a file that can never be a cache (sqlite.org/rescode.html).
_UNUSABLE = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
    sqlite3.SQLITE_CORRUPT: "is damaged: delete it",
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_PERM: "cannot be opened",
}


@dataclass(frozen=True, slots=True)
class CacheFile:
    """The file of a cache.

    Attributes:
        path: Created with mode 0600 if it is missing.
        max_bytes: The most that the file may take; None is no limit.
    """

    path: str
    max_bytes: int | None

    def open(self) -> sqlite3.Connection:
        """Return a connection to the file, which is created if it is missing.

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
            row = connection.execute(_SELECT.format(placeholders(len(some))), some).fetchone()
            start = 0
            for digits, size in zip(json.loads(row[0]), json.loads(row[1]), strict=True):
                # its own bytes: a view of one vector would keep all others in memory
                found[bytes.fromhex(digits)] = _decoded(row[2][start : start + size])
                start += size
        return found

    def write(self, connection: sqlite3.Connection, vectors: Mapping[bytes, Vectors]) -> None:
        """Store the vectors in one transaction, after the oldest have made room for them."""
        rows = [(key, vector.astype("<f4", copy=False).tobytes()) for key, vector in vectors.items()]
        with transaction(connection):
            now = single_value(connection, "SELECT coalesce(max(used), 0) + 1 FROM vectors")
            self._make_room(connection, sum(_max_stored(blob) for _, blob in rows))
            for some in batched(rows, ROWS_PER_STATEMENT):
                values = chain.from_iterable((key, now, blob) for key, blob in some)
                connection.execute(_UPSERT.format(placeholders(len(some), "(?, ?, ?)")), tuple(values))

    def _make_room(self, connection: sqlite3.Connection, needed: int) -> None:
        while self.max_bytes is not None and _bytes_in_use(connection) + needed > self.max_bytes:
            target, evicted = max(needed, min(EVICTED_BYTES, self.max_bytes // 8)), 0
            while evicted < target:
                oldest = json.loads(single_value(connection, _OLDEST, (KEYS_PER_STATEMENT,)))
                if not oldest:
                    return
                ids = []
                for id, length in oldest:
                    ids.append(id)
                    evicted += length
                    if evicted >= target:
                        break
                connection.execute(f"DELETE FROM vectors WHERE id IN ({placeholders(len(ids))})", ids)


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
    page_count: int = single_value(connection, "PRAGMA page_count")
    free_pages: int = single_value(connection, "PRAGMA freelist_count")
    page_bytes: int = single_value(connection, "PRAGMA page_size")
    return (page_count - free_pages) * page_bytes


def _max_stored(blob: bytes) -> int:
    # a row of just over half a page has that page to itself
    return 2 * len(blob) + ROW_BYTES


def _decoded(blob: bytes) -> Vectors:
    return np.frombuffer(blob, "<f4").astype(np.float32, copy=False)
