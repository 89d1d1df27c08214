"""The file of an `SQLiteSink`: a connection that writes, one that reads, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ...databases.sqlite import Database, StopSignal, Work, connect, primary_code, set_up_for_writing
from ...errors import SinkBusyError, SinkConfigError, SinkError

T = TypeVar("T")

# Measured with 10,000 rows of 1,536 dimensions: 25,000 rows/s with pages of 4 KiB, 48,000 with 16 KiB, 55,000 with
# 64 KiB, of which a changed row then rewrites more. Without rowids, at 16 KiB: 12,000, and a file twice as large.
PAGE_BYTES = 16_384

# SQLite's primary result codes (sqlite.org/rescode.html): the error that the caller gets, and what to do about it.
_MEANINGS: dict[int, tuple[type[SinkError], str]] = {
    sqlite3.SQLITE_BUSY: (SinkBusyError, "is locked by another process: try again when that is done"),
    sqlite3.SQLITE_LOCKED: (SinkBusyError, "is locked by another connection: try again when that is done"),
    sqlite3.SQLITE_READONLY: (SinkConfigError, "is read-only: let this user write to the file and its folder"),
    sqlite3.SQLITE_IOERR: (SinkError, "could not be read or written: the disk reports an error"),
    sqlite3.SQLITE_CORRUPT: (SinkError, "is damaged: restore it, or save what is left with `sqlite3 FILE .recover`"),
    sqlite3.SQLITE_FULL: (SinkError, "cannot grow: its disk is full"),
    sqlite3.SQLITE_NOTADB: (SinkConfigError, "is not an SQLite database: choose another file"),
}


class SinkFile:
    """The file of a sink. It has a connection to write and one to read: in WAL mode a reader never waits for a writer.

    The path is absolute; None is in memory, with one connection for both. Messages show `shown` and `owner`, the sink.
    """

    def __init__(self, path: Path | None, shown: str, owner: str, busy_timeout: float) -> None:
        self._path, self._shown, self._owner = path, shown, owner
        self._busy_timeout = busy_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._identity = _FileIdentity(path, shown)
        uri = "file::memory:" if path is None else path.as_uri()
        make = partial(Database, busy_timeout_s=busy_timeout, is_private=path is None)
        self._writer = make(partial(_open, f"{uri}?mode=rwc", self._identity, writes=True))
        self._reader = make(partial(_open, f"{uri}?mode=rw", self._identity, writes=False)) if path else self._writer

    def __del__(self) -> None:
        was_open = self._writer.close(), self._reader.close()
        if any(was_open):
            warnings.warn(f"{self._owner} was not closed: use `async with`, or aclose()", ResourceWarning, stacklevel=2)

    async def read(self, work: Work[T]) -> T:
        """Run the function on the connection that reads; raise SinkError if SQLite fails or the file was moved."""
        return await self._run(self._reader, work)

    async def write(self, work: Work[T], stop: StopSignal | None = None) -> T:
        """Run the function on the connection that writes; see `Database.run`, and `read` for errors."""
        return await self._run(self._writer, work, stop)

    async def aclose(self) -> None:
        """Close the connections after the work under way. A later call opens them again."""
        await self._writer.aclose()
        await self._reader.aclose()
        self._identity.opened = None

    async def _run(self, database: Database, work: Work[T], stop: StopSignal | None = None) -> T:
        def checked(connection: sqlite3.Connection) -> T:
            result = work(connection)
            self._identity.check()
            return result

        self._check_loop()
        try:
            return await database.run(checked, stop)
        except sqlite3.Error as error:
            raise self._explained(error, writing=database is self._writer) from error

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop and self._loop.is_running():
            raise SinkError(f"{self._owner} is in use by another running event loop: make a sink for each")
        self._loop = loop

    def _explained(self, error: sqlite3.Error, *, writing: bool) -> SinkError:
        kind, meaning = _MEANINGS.get(primary_code(error), (SinkError, f"failed: {error}"))
        if primary_code(error) == sqlite3.SQLITE_CANTOPEN and self._path is not None:
            kind, meaning = SinkConfigError, _why_not_opened(self._path, writing)
        elif kind is SinkBusyError:
            meaning = f"{meaning}, or wait longer than busy_timeout={self._busy_timeout:g} s"
        return kind(f"{self._shown} {meaning}")


def _why_not_opened(path: Path, writing: bool) -> str:
    if path.is_dir():
        return "is a folder: name a file in it"
    if not path.parent.is_dir():
        return f"cannot be made: there is no folder {path.parent}"
    if not writing and not path.exists():
        return "does not exist yet: ingest into it first"
    return "cannot be opened: let this user read and write it, and its folder"


@dataclass(slots=True)
class _FileIdentity:
    """Which file a path led to when it was opened. SQLite compares it, too, but not if there is a write-ahead log."""

    path: Path | None
    shown: str
    opened: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise SinkError if the path leads to another file now, so that the written one will not be found."""
        if self.opened is not None and self.opened != self.now():
            raise SinkError(
                f"{self.shown} was moved, replaced or deleted while it was open: close the sink, and run again"
            )

    def now(self) -> tuple[int, int] | None:
        with suppress(OSError):
            if self.path is not None:
                found = os.stat(self.path)
                return found.st_dev, found.st_ino
        return None


def _open(uri: str, identity: _FileIdentity, *, writes: bool) -> sqlite3.Connection:
    connection = connect(uri, uri=True)
    try:
        identity.opened = identity.opened or identity.now()
        if writes:  # FULL syncs at every commit, so that paid vectors survive a power cut, too: 10 % slower
            set_up_for_writing(connection, page_bytes=PAGE_BYTES, synchronous="FULL")
    except BaseException:
        connection.close()
        raise
    return connection
