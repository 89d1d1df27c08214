"""The bridge to SQLite: a connection with its thread, transactions, and statements that take many rows in one step.

Python's sqlite3 releases the GIL at every step of a statement: once for each row that it returns, and once for each row
of `executemany`. While another thread computes, it gets the GIL back only 5 ms later (`sys.getswitchinterval`), so
2,000 rows take ten seconds. Statements here take many rows at once, and return one row that holds all results.
`bench.busy` measures it.

A `Database` runs whole functions on its thread. `aiosqlite` offers one call for each statement, so other tasks come in
between, a cancelled call returns while its statement still runs, and its thread keeps an unclosed process alive.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar

from ..concurrency import with_outcome

T = TypeVar("T")
Work: TypeAlias = Callable[[sqlite3.Connection], T]
"""A function that runs on a database's thread. It leaves no transaction open."""

# SQLite took 999 parameters a statement before 3.32, and takes 32,766 since (sqlite.org/limits.html).
KEYS_PER_STATEMENT = 500

# Statements that a connection keeps prepared, 128 by default. Each keeps the values of its last execution, which may be
# megabytes.
CACHED_STATEMENTS = 8

LOCK_SLICE_S = 0.05  # an attempt waits this long for a lock, then looks whether its caller was cancelled

# The pause before the next attempt, since SQLite reports some locks at once (sqlite.org/rescode.html, SQLITE_LOCKED).
BUSY_PAUSE_S = 0.005

THREAD_NAME = "asyncembed-sqlite"
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)  # another connection holds a lock

_new_thread = partial(ThreadPoolExecutor, max_workers=1, thread_name_prefix=THREAD_NAME)


class WorkStoppedError(Exception):
    """The caller of a running function was cancelled; its transaction is rolled back."""


class StopSignal(threading.Event):
    """Set when the caller of a running function is cancelled."""

    def check(self) -> None:
        """Raise WorkStoppedError if it is set."""
        if self.is_set():
            raise WorkStoppedError


class Database:
    """One SQLite connection and its thread, which runs one function at a time. Any task, loop or thread may use it.

    It connects at first use, and again at the first use after `close` or `aclose`.

    No connection to a file stays open over a fork: SQLite would believe that those of the other process hold the locks
    of this one (observed: rows were lost). A private one is kept: it is in memory or temporary.

    While another connection holds a lock, the function is called again, for up to `busy_timeout_s`.
    """

    def __init__(
        self, connect: Callable[[], sqlite3.Connection], *, busy_timeout_s: float = 0.0, is_private: bool = False
    ) -> None:
        self._connect = connect
        self._busy_timeout_s = busy_timeout_s
        self._is_private = is_private
        self._connection: sqlite3.Connection | None = None
        self._in_use = threading.Lock()
        self._thread = _new_thread()
        with _registering:
            _databases.add(self)

    async def run(self, work: Work[T], stop: StopSignal | None = None) -> T:
        """Return the result of the function, called on the thread.

        When this returns or raises, even CancelledError, the function does not run any more. A cancelled call that
        was still queued raises at once. If the function was finished nevertheless, the error carries its result: see
        `concurrency.outcome_of`. `stop` is set when the call is cancelled, for functions that look at it.
        """
        stop = stop or StopSignal()
        queued = [work]  # taken out by `_attempt`: the thread must not keep its rows for longer than the caller
        try:
            job = self._thread.submit(self._attempt, queued, stop)
        except RuntimeError:  # `aclose` of another thread came in between, so there is a new executor
            job = self._thread.submit(self._attempt, queued, stop)
        # a bare future, not a task: `asyncio.run` cancels all tasks when it ends, and the result would be lost
        future = asyncio.wrap_future(job)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                if job.cancel():  # it was still queued
                    queued.clear()
                    raise
                stop.set()  # the function ends after one statement, one commit or one attempt to get a lock
                cancelled = error
        if cancelled is None:
            return future.result()
        if future.exception():  # retrieved, or asyncio would log it as lost
            raise cancelled
        raise with_outcome(cancelled, future.result())

    def _attempt(self, queued: list[Work[T]], stop: StopSignal) -> T:
        work, deadline = queued.pop(), time.monotonic() + self._busy_timeout_s
        while True:
            stop.check()
            try:
                with self._in_use:
                    if self._connection is None:
                        self._connection = self._connect()
                    return work(self._connection)
            except sqlite3.OperationalError as error:
                if primary_code(error) not in _BUSY or time.monotonic() >= deadline:
                    raise
            stop.wait(BUSY_PAUSE_S)

    async def aclose(self) -> None:
        """Close the connection after the queued functions, and end the thread."""
        thread, self._thread = self._thread, _new_thread()
        thread.submit(self.close, wait=True)
        await asyncio.to_thread(thread.shutdown)

    def close(self, *, wait: bool = False) -> bool:
        """Close the connection, unless a function runs and `wait` is not set; return whether it was open.

        It needs no event loop. In `__del__` it must not wait: SQLite closes a connection that is garbage.
        """
        is_open = self._connection is not None
        if self._in_use.acquire(blocking=wait):
            self._close_connection()
            self._in_use.release()
        return is_open

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def before_fork(self) -> None:
        """Let no function run until `after_fork`, and close the connection to a file."""
        self._in_use.acquire()
        if not self._is_private:
            self._close_connection()

    def after_fork(self, *, in_child: bool) -> None:
        """Let functions run again; the child has none of its parent's threads."""
        if in_child:
            self._thread = _new_thread()
        self._in_use.release()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_registering = threading.Lock()  # held over a fork, so that there is one at a time and no new database


def _before_fork() -> None:
    _registering.acquire()
    for database in _databases:
        database.before_fork()


def _after_fork(*, in_child: bool) -> None:
    for database in _databases:
        database.after_fork(in_child=in_child)
    _registering.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, in_child=False),
        after_in_child=partial(_after_fork, in_child=True),
    )


def connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    """Return a connection in autocommit mode that any thread may use."""
    return sqlite3.connect(
        database,
        uri=uri,
        timeout=LOCK_SLICE_S,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=CACHED_STATEMENTS,
    )


def set_up_for_writing(
    connection: sqlite3.Connection, *, page_bytes: int, synchronous: Literal["NORMAL", "FULL"]
) -> None:
    """Set the pragmas of a connection that writes; a new file gets the page size and a write-ahead log."""
    # the undo log of a statement is a temporary file otherwise, and the folder for those may be full
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA page_size = {page_bytes}")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    # Refused while a process without a write-ahead log uses the file, and on disks that cannot share memory. A rollback
    # journal is as safe, only slower. The first statement reports any other problem.
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit at the end, or roll back if anything is raised."""
    # A deferred transaction could fail at its first write, and could then never have the lock (SQLITE_BUSY_SNAPSHOT).
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back already if the disk was full
            connection.execute("ROLLBACK")
        raise


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code (sqlite.org/rescode.html)."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the values in lists of at most `size`."""
    remaining = iter(values)
    while batch := list(islice(remaining, size)):
        yield batch


def placeholders(count: int, placeholder: str = "?") -> str:
    """Return `count` placeholders for parameters, or for rows of parameters, separated by commas."""
    return ", ".join([placeholder] * count)


def concatenated(column: str) -> str:
    """Return SQL for the concatenated bytes of a column of blobs, in a database whose encoding is UTF-8.

    `group_concat` takes the bytes of a blob for a text in the database's encoding, and the cast returns them. Another
    encoding would change them on the way.
    """
    return f"CAST(group_concat({column}, '') AS BLOB)"


def single_value(connection: sqlite3.Connection, statement: str, parameters: tuple[Any, ...] = ()) -> Any:
    """Return the first value of the first row."""
    return connection.execute(statement, parameters).fetchone()[0]
