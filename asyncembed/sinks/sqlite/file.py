"""The file of an `SQLiteSink`: a connection that writes, one that reads, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import warnings
from contextlib import suppress
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

    Args:
        path: Absolute; None is in memory, with one connection for both.
        shown: The path as messages show it.
        owner: The sink as messages show it.
        busy_timeout: Seconds to wait for the locks of other processes.
    """

    def __init__(self, path: Path | None, shown: str, owner: str, busy_timeout: float) -> None:
        self._path = path
        self._shown = shown
        self._owner = owner
        self._busy_timeout = busy_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._identity = _FileIdentity(path)
        if path is None:
            self._writer = Database(partial(_open, "file::memory:", self._identity, writes=True), is_private=True)
            self._reader = self._writer
        else:
            open_writer = partial(_open, f"{path.as_uri()}?mode=rwc", self._identity, writes=True)
            open_reader = partial(_open, f"{path.as_uri()}?mode=rw", self._identity, writes=False)
            self._writer = Database(open_writer, busy_timeout_s=busy_timeout)
            self._reader = Database(open_reader, busy_timeout_s=busy_timeout)

    def __del__(self) -> None:
        was_open = self._writer.close(), self._reader.close()
        if any(was_open):
            warnings.warn(f"{self._owner} was not closed: use `async with`, or aclose()", ResourceWarning, stacklevel=2)

    async def read(self, work: Work[T]) -> T:
        """Run the function on the connection that reads.

        Raises:
            SinkError: SQLite failed, or the file was moved or replaced.
        """
        return await self._run(self._reader, work)

    async def write(self, work: Work[T], stop: StopSignal | None = None) -> T:
        """Run the function on the connection that writes; see `Database.run`, and `read` for errors."""
        return await self._run(self._writer, work, stop)

    async def aclose(self) -> None:
        """Close the connections after the work under way. A later call opens them again."""
        await self._writer.aclose()
        await self._reader.aclose()
        self._identity.forget()

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
        except _MovedError:
            raise SinkError(
                f"{self._shown} was moved, replaced or deleted while it was open: close the sink, and run again"
            ) from None

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


class _MovedError(Exception):
    """The path leads to another file than when it was opened, so the written file will not be found."""


class _FileIdentity:
    """Which file a path led to when it was opened. SQLite compares it, too, but not if there is a write-ahead log."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._opened: tuple[int, int] | None = None

    def remember(self) -> None:
        self._opened = self._opened or self._now()

    def forget(self) -> None:
        self._opened = None

    def check(self) -> None:
        if self._opened is not None and self._opened != self._now():
            raise _MovedError

    def _now(self) -> tuple[int, int] | None:
        if self._path is not None:
            with suppress(OSError):
                found = os.stat(self._path)
                return found.st_dev, found.st_ino
        return None


def _open(uri: str, identity: _FileIdentity, *, writes: bool) -> sqlite3.Connection:
    connection = connect(uri, uri=True)
    try:
        identity.remember()
        if writes:  # FULL syncs at every commit, so that paid vectors survive a power cut, too: 10 % slower
            set_up_for_writing(connection, page_bytes=PAGE_BYTES, synchronous="FULL")
    except BaseException:
        connection.close()
        raise
    return connection
