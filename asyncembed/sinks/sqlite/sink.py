"""Vectors in an SQLite file, as the little-endian float32 blobs that sqlite-vec reads, too.

A transaction is one function on its connection's thread, from BEGIN IMMEDIATE to COMMIT or ROLLBACK. So no other
task can come between its statements, and a cancelled caller cannot leave it open: it waits for that function,
which stops before its next statement or commits. There are two connections, since in WAL mode a reader does not wait
for a writer: one writes, one reads.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from ...errors import AsyncEmbedError, SinkBusyError, SinkConfigError, SinkError
from ...types import Hit, RecordId, Row, Vectors
from .. import contract as schema
from ..ranking import Ranking, check_query
from .connection import Job, MovedError, ThreadConnection, connect, ended, primary_code
from .table import Table, transaction

T = TypeVar("T")

# What SQLite's primary result codes mean to our caller (sqlite.org/rescode.html), and what to do about it.
_MEANINGS: dict[int, tuple[type[SinkError], str]] = {
    sqlite3.SQLITE_BUSY: (SinkBusyError, "is locked by another process: try again when that is done"),
    sqlite3.SQLITE_LOCKED: (SinkBusyError, "is locked by another connection: try again when that is done"),
    sqlite3.SQLITE_READONLY: (SinkConfigError, "is read-only: let this user write to the file and its folder"),
    sqlite3.SQLITE_IOERR: (SinkError, "could not be read or written: the disk reports an error"),
    sqlite3.SQLITE_CORRUPT: (SinkError, "is damaged: restore it, or save what is left with `sqlite3 FILE .recover`"),
    sqlite3.SQLITE_FULL: (SinkError, "cannot grow: its disk is full"),
    sqlite3.SQLITE_NOTADB: (SinkConfigError, "is not an SQLite database: choose another file"),
}


class SQLiteSink:
    """Stores vectors in an SQLite file, and finds them again.

    Args:
        path: The file; it and its tables are created by `prepare` or the first `write`. `":memory:"` is kept in
            memory, until the sink is closed.
        table: Holds the rows; created if missing.
        busy_timeout: Seconds to wait for other processes' locks, then SinkBusyError.

    It connects at first use and may be used by many tasks at once. Used again after `aclose()`, or in another
    event loop after the first one ended, it connects anew.
    """

    def __init__(self, path: str | os.PathLike[str], *, table: str = schema.TABLE, busy_timeout: float = 5.0) -> None:
        self._connections: tuple[ThreadConnection, ...] = ()  # a writer and a reader, or in memory one for both
        self._loop: asyncio.AbstractEventLoop | None = None
        if not busy_timeout >= 0:
            raise SinkConfigError(f"busy_timeout is {busy_timeout}; it is a number of seconds, at least 0")
        if "\0" in os.fspath(path):
            raise SinkConfigError("the path has a NUL in it, which no file's has")
        self._memory = os.fspath(path) == ":memory:"
        self._path = Path(path) if self._memory else Path(path).absolute()
        self._shown = os.fspath(path)
        self._table = Table(schema.check_table(table), f"table {table!r} in {self._shown}")
        self._busy_timeout = busy_timeout

    def __repr__(self) -> str:
        return f"SQLiteSink({self._shown!r}, table={self._table.name!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if [connection for connection in self._connections if connection.abandon() is not None]:
            warnings.warn(f"{self!r} was not closed: use `async with`, or aclose()", ResourceWarning, stacklevel=2)

    async def prepare(self, model: str, dimensions: int | None) -> None:
        """Create file and tables if they are missing, and record the size of the model's vectors.

        Raises:
            SinkConfigError: The file cannot be written, the table has other columns, or vectors of another size.
            SinkBusyError: Another process held the lock for longer than `busy_timeout`.
        """
        schema.check_model_key(model, dimensions)

        def job(connection: sqlite3.Connection, check: Callable[[], None]) -> None:
            with transaction(connection):
                self._table.create(connection)
                self._table.touch(connection)
                if dimensions is not None:
                    stored = self._table.record(connection, model, dimensions)
                    schema.check_dimensions(model, stored, dimensions, self._table.where)

        await self._write(job)

    async def existing(self, model: str, hashes: Mapping[RecordId, str]) -> set[RecordId]:
        """Return those of the given ids that are stored for this model with this very content hash."""
        keys = schema.keys_of(hashes)
        stored = await self._read(lambda connection: self._table.hashes(connection, model, keys))
        return {id for id, content_hash in hashes.items() if stored.get(str(id)) == content_hash}

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[RecordId, AsyncEmbedError]:
        """Upsert the rows in one transaction, synced to the disk before this returns.

        Of rows with the same key the last one wins; a stored row keeps its `created_at`. Cancelled, it has stored
        all or nothing before it raises.

        Returns:
            The rows that no store takes, each with its error; all others are stored.

        Raises:
            SinkError: Nothing of this call was stored. As for `prepare`, which need not have been called.
        """
        if not rows:
            return {}
        schema.check_model_key(model, rows[0].vector.size)
        table = self._table

        def job(connection: sqlite3.Connection, check: Callable[[], None]) -> schema.Refusals:
            with transaction(connection):
                table.create(connection)
                dimensions = table.record(connection, model, rows[0].vector.size)
                admitted, refused = schema.admit(model, rows, dimensions, table.where)
                return refused | table.upsert(connection, model, admitted, check)

        return await self._write(job)

    async def search(self, vector: Vectors | Sequence[float], k: int = 5, *, model: str | None = None) -> list[Hit]:
        """Return the k rows nearest to float32[d] by cosine similarity: best first, equal ones by id.

        Every stored vector of the model is looked at, a few megabytes at a time. Rows that are all zeros have no
        direction and are never found.

        Raises:
            ConfigError: The vector or k is not usable.
            SinkConfigError: Nothing was stored here yet, the vector has another size than those stored, or there
                are several models and none was named.
        """
        query = check_query(vector, k)
        candidates = await self._read(partial(self._table.candidates, model=model))
        chosen = schema.choose_model(candidates, model, query.size, self._table.where)
        if chosen is None:
            return []
        ranking = Ranking(query, k)
        after: int | None = -(2**63)
        while after is not None:
            # one slice a turn, so that others who read come in between
            after = await self._read(partial(self._table.rank_slice, model=chosen, ranking=ranking, after=after))
        return await self._read(lambda connection: self._table.hits(connection, chosen, ranking.best()))

    async def models(self) -> dict[str, int]:
        """Return the models that have rows here, each with the dimensions of its vectors."""
        return await self._read(self._table.models)

    async def count(self, model: str | None = None) -> int:
        """Return the number of rows, of one model or of all."""
        return await self._read(lambda connection: self._table.count(connection, model))

    def stored_id(self, id: RecordId) -> str:
        """Return the id as `ids` yields it."""
        return str(id)

    async def ids(self, model: str) -> AsyncIterator[str]:
        """Yield the ids stored for the model, in order; one page of them is held in memory."""
        last: str | None = ""
        while last is not None:
            read = partial(self._table.ids, model=model, after=last, limit=schema.IDS_PER_PAGE)
            page, last = await self._read(read)
            for id in page:
                yield id

    async def delete(self, ids: Iterable[RecordId], model: str) -> int:
        """Delete the model's rows with these ids, in one transaction; return how many there were."""
        keys = schema.keys_of(ids)

        def job(connection: sqlite3.Connection, check: Callable[[], None]) -> int:
            with transaction(connection):
                return self._table.delete(connection, model, keys)

        return await self._write(job)

    async def aclose(self) -> None:
        """Close the connections; what is under way ends first. A later call opens them again."""
        at_home = self._loop is asyncio.get_running_loop()
        for connection in self._connections:
            await (connection.aclose() if at_home else ended(connection.abandon()))

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        return await self._run(-1, lambda connection, check: read(connection))

    async def _write(self, job: Job[T]) -> T:
        return await self._run(0, job)

    async def _run(self, which: int, job: Job[T]) -> T:
        self._move_to(asyncio.get_running_loop())
        try:
            return await self._connections[which].run(job)
        except sqlite3.Error as error:
            raise self._explained(error, writing=which == 0) from error
        except MovedError:
            raise SinkError(
                f"{self._shown} was moved, replaced or deleted while it was open: close the sink, and run again"
            ) from None

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """See that the connections are this loop's."""
        if self._connections and self._loop is loop:
            return
        if self._connections and self._loop is not None and self._loop.is_running():
            raise SinkError(f"{self!r} is in use by another running event loop: make a sink for each")
        for connection in self._connections:
            connection.abandon()
        if self._memory:
            path, connects = None, [partial(connect, "file::memory:", writes=True)]
        else:
            path = self._path
            uri = path.as_uri()
            connects = [partial(connect, f"{uri}?mode=rwc", writes=True), partial(connect, f"{uri}?mode=rw")]
        self._connections = tuple(ThreadConnection(connect, self._busy_timeout, path) for connect in connects)
        self._loop = loop

    def _explained(self, error: sqlite3.Error, *, writing: bool) -> SinkError:
        kind, meaning = _MEANINGS.get(primary_code(error), (SinkError, f"failed: {error}"))
        if primary_code(error) == sqlite3.SQLITE_CANTOPEN:
            kind, meaning = SinkConfigError, self._why_closed(writing)
        elif kind is SinkBusyError:
            meaning = f"{meaning}, or wait longer than busy_timeout={self._busy_timeout:g} s"
        return kind(f"{self._shown} {meaning}")

    def _why_closed(self, writing: bool) -> str:
        if self._path.is_dir():
            return "is a folder: name a file in it"
        if not self._path.parent.is_dir():
            return f"cannot be made: there is no folder {self._path.parent}"
        if not writing and not self._path.exists():
            return "does not exist yet: ingest into it first"
        return "cannot be opened: let this user read and write it, and its folder"
