"""One sqlite3 connection on a thread of its own, which runs whole functions, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import aiosqlite

from ...concurrency import noted
from ...databases.sqlite import STATEMENTS_KEPT

T = TypeVar("T")
Job: TypeAlias = Callable[[sqlite3.Connection, Callable[[], None]], T]
"""What runs on a connection's thread. It calls its second argument now and then, which raises to give up."""

# Measured with 10,000 rows of 1,536 dimensions: 25,000 rows/s with pages of 4 KiB, 48,000 with 16 KiB, 55,000 with
# 64 KiB, of which a changed row then rewrites more. Without rowids, at 16 KiB: 12,000, and a file twice as large.
PAGE_BYTES = 16_384

# How long one attempt waits for a lock before it looks whether its caller is still there.
LOCK_SLICE_S = 0.05

# What a wait may help against.
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class _StoppedError(Exception):
    """The caller is gone; what it began is rolled back."""


class MovedError(Exception):
    """The file is not where it was opened: what was written may be in none that anybody will open."""


class ThreadConnection:
    """One sqlite3 connection on a thread of its own, opened at first use; it runs whole functions, one at a time.

    Args:
        connect: Called on that thread.
        wait_s: How long another process's lock is waited for.
        path: The file; None if there is none.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], wait_s: float, path: Path | None) -> None:
        self._connect = connect
        self._wait_s = wait_s
        self._path = path
        self._file: tuple[int, int] | None = None
        self._turn = asyncio.Lock()
        self._db: aiosqlite.Connection | None = None

    async def run(self, job: Job[T]) -> T:
        """Run the job on the thread. When this returns or raises, even CancelledError, the job runs no more.

        Cancelled when the job was done already, the error says so: see `loops.outcome_of`.

        Raises:
            MovedError: It ran, but the file is not there any more.
        """
        async with self._turn:
            stop = threading.Event()
            if self._db is None:
                # assigns in its own task: cancelled meanwhile, the connection is kept for the next one or `aclose`
                await _settled(asyncio.ensure_future(self._open()), stop)
            assert self._db is not None
            connection = self._db._conn
            # A bare future, not a task: `asyncio.run` cancels all tasks when it ends, and the thread would
            # report to a closed loop. aiosqlite's own methods forget what they started when they are cancelled.
            future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._db._tx.put_nowait((future, partial(self._work, job, connection, stop)))
            self._db._tx.put_nowait((None, _nothing))  # the thread holds what it did last, a batch of rows, until then
            return await _settled(future, stop)

    def _work(self, job: Job[T], connection: sqlite3.Connection, stop: threading.Event) -> T:
        result = _patiently(job, connection, self._wait_s, stop)
        # SQLite looks, too (os_unix.c, fileHasMoved), but not if there is a write-ahead log
        if _identity(self._path) != self._file:
            raise MovedError
        return result

    def _connected(self) -> sqlite3.Connection:
        connection = self._connect()
        self._file = _identity(self._path)
        return connection

    async def _open(self) -> None:
        db = aiosqlite.Connection(self._connected, iter_chunk_size=64)
        db._thread.daemon = True  # aiosqlite's is not, and a sink that nobody closed would keep the process alive
        try:
            self._db = await db
        except BaseException:
            await ended(db._thread)  # it reports its end to this loop, which must not be gone by then
            raise

    async def aclose(self) -> None:
        """Close the connection and end its thread, after what is under way."""
        async with self._turn:
            await ended(self.abandon())

    def abandon(self) -> threading.Thread | None:
        """Have the thread close the connection, and end; return it if there was one. Needs no loop."""
        db, self._db = self._db, None
        if db is None:
            return None
        # asked for from the thread itself, where there is no loop, so that it will report to none
        db._tx.put_nowait((None, db.stop))
        return db._thread


async def ended(thread: threading.Thread | None) -> None:
    """Wait for the end of a connection's thread, if there is one."""
    if thread is not None:
        await asyncio.to_thread(thread.join)


async def _settled(future: asyncio.Future[T], stop: threading.Event) -> T:
    """Wait for the end of what the thread does, come what may; tell it to stop if the caller is cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            stop.set()  # the end is one row, one commit or one look at a lock away
            cancelled = error
    if cancelled is None:
        return future.result()
    if future.cancelled() or future.exception():  # seen, so that nobody logs it as lost
        raise cancelled
    raise noted(cancelled, future.result())


def _patiently(job: Job[T], connection: sqlite3.Connection, wait_s: float, stop: threading.Event) -> T:
    """Run the job, again and again while another process holds the lock."""

    def check() -> None:
        if stop.is_set():
            raise _StoppedError

    deadline = time.monotonic() + wait_s
    while True:
        check()
        try:
            return job(connection, check)
        except sqlite3.OperationalError as error:
            if primary_code(error) not in _BUSY or time.monotonic() >= deadline:
                raise


def _nothing() -> None: ...


def _identity(path: Path | None) -> tuple[int, int] | None:
    if path is None:
        return None
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's result code, without what extends it (sqlite.org/rescode.html)."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def connect(uri: str, *, writes: bool = False) -> sqlite3.Connection:
    """Connect; called on the connection's thread."""
    connection = sqlite3.connect(
        uri, uri=True, timeout=LOCK_SLICE_S, isolation_level=None, cached_statements=STATEMENTS_KEPT
    )
    if not writes:
        return connection
    try:
        # what undoes a statement is a temporary file otherwise, and the folder for those may be full
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # heeded by a new file only
        # FULL syncs at every commit, so that what was paid for outlives a power cut, too: 10 % slower
        connection.execute("PRAGMA synchronous = FULL")
        # Refused while a process without WAL is in it, and on disks that cannot share memory: a rollback journal is
        # as safe, only slower. What else may be wrong the first statement will say.
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    return connection
