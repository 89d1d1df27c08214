"""The SQLite bridge: functions on a thread, transactions, and the SQL helpers for many rows in one step."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncembed.databases.sqlite import (
    Database,
    StopSignal,
    WorkStoppedError,
    batched,
    concatenated,
    connect,
    placeholders,
    single_value,
    transaction,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with an empty table `t`."""
    with closing(connect(str(tmp_path / "x.db"))) as connection:
        connection.execute("CREATE TABLE t (n INTEGER)")
    return tmp_path / "x.db"


def at(path: Path) -> Callable[[], sqlite3.Connection]:
    return partial(connect, str(path))


def count(connection: sqlite3.Connection) -> int:
    number: int = single_value(connection, "SELECT count(*) FROM t")
    return number


def insert(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        connection.execute("INSERT INTO t VALUES (1)")


# ---- functions on a thread ----


async def test_functions_run_one_at_a_time_in_the_order_of_their_calls(path: Path) -> None:
    database = Database(at(path))
    running: list[int] = []
    order: list[int] = []

    def work(connection: sqlite3.Connection, number: int) -> None:
        running.append(number)
        insert(connection)
        order.append(number)
        assert running == [number]
        running.clear()

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(database.run(partial(work, number=number)))
    assert order == list(range(20))
    assert await database.run(count) == 20
    await database.aclose()


async def test_a_running_function_sees_that_its_caller_was_cancelled(path: Path) -> None:
    database, stop, started = Database(at(path)), StopSignal(), threading.Event()

    def work(connection: sqlite3.Connection) -> None:
        with transaction(connection):
            connection.execute("INSERT INTO t VALUES (1)")
            started.set()
            assert stop.wait(30)
            stop.check()

    task = asyncio.create_task(database.run(work, stop))
    await asyncio.to_thread(started.wait)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    with pytest.raises(WorkStoppedError):
        stop.check()
    assert await database.run(count) == 0
    await database.aclose()


async def test_a_function_is_called_again_while_another_connection_holds_the_lock(path: Path) -> None:
    database, calls = Database(at(path), busy_timeout_s=30), []

    with closing(connect(str(path))) as other:

        def work(connection: sqlite3.Connection) -> None:
            calls.append(1)
            if len(calls) == 2:
                other.execute("ROLLBACK")
            insert(connection)

        other.execute("BEGIN IMMEDIATE")
        await database.run(work)
        assert (len(calls), count(other)) == (2, 1)
    await database.aclose()


async def test_a_database_is_opened_again_after_it_was_closed(path: Path) -> None:
    database = Database(at(path))
    assert not database.close()
    await database.run(insert)
    assert database.close()
    await database.run(insert)
    await database.aclose()
    assert await database.run(count) == 2
    await database.aclose()


async def test_a_call_succeeds_if_another_thread_closes_the_database_at_the_same_moment(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, ended = Database(at(path)), ThreadPoolExecutor()
    ended.shutdown()
    submit = ThreadPoolExecutor.submit

    def closed_meanwhile(self: ThreadPoolExecutor, *args: Any) -> Any:
        monkeypatch.undo()
        return submit(ended, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", closed_meanwhile)
    assert await database.run(count) == 0
    await database.aclose()


async def test_closing_never_waits_for_a_running_function(path: Path) -> None:
    database, started, go_on = Database(at(path)), threading.Event(), threading.Event()

    def work(connection: sqlite3.Connection) -> None:
        started.set()
        assert go_on.wait(30)
        insert(connection)

    task = asyncio.create_task(database.run(work))
    await asyncio.to_thread(started.wait)
    assert database.close()
    go_on.set()
    await task
    assert await database.run(count) == 1
    await database.aclose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("is_private", [False, True], ids=["a file", "in memory"])
def test_parent_and_child_of_a_fork_may_both_go_on(path: Path, is_private: bool) -> None:
    database = Database(partial(connect, ":memory:") if is_private else at(path), is_private=is_private)
    if is_private:
        asyncio.run(database.run(lambda connection: connection.execute("CREATE TABLE t (n INTEGER)")))
    asyncio.run(database.run(insert))
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(database.run(insert))
            os._exit(asyncio.run(database.run(count)))
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    asyncio.run(database.run(insert))
    rows = os.waitstatus_to_exitcode(status), asyncio.run(database.run(count))
    assert rows == ((2, 2) if is_private else (2, 3))
    asyncio.run(database.aclose())


# ---- transactions ----


def test_any_error_rolls_back_the_transaction(path: Path) -> None:
    with closing(connect(str(path))) as connection, closing(connect(str(path))) as other:
        with pytest.raises(KeyboardInterrupt), transaction(connection):
            connection.execute("INSERT INTO t VALUES (1)")
            raise KeyboardInterrupt
        assert count(connection) == 0
        insert(other)
        with pytest.raises(ZeroDivisionError), transaction(connection):
            connection.execute("ROLLBACK")  # as SQLite does when the disk is full
            raise ZeroDivisionError


# ---- many rows in one step ----


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        pytest.param(0, [], id="no values"),
        pytest.param(2, [2], id="less than a batch"),
        pytest.param(3, [3], id="one batch"),
        pytest.param(7, [3, 3, 1], id="a smaller last batch"),
    ],
)
def test_batches_hold_all_values_in_order(count: int, sizes: list[int]) -> None:
    found = list(batched(iter(range(count)), 3))
    assert [len(piece) for piece in found] == sizes
    assert [value for piece in found for value in piece] == list(range(count))


def test_placeholders_are_for_values_or_for_rows_of_values() -> None:
    assert placeholders(3) == "?, ?, ?"
    assert f"({placeholders(0)})" == "()"
    assert placeholders(2, "(?, ?)") == "(?, ?), (?, ?)"


def test_concatenated_blobs_keep_every_byte_including_zeros() -> None:
    blobs = [bytes(range(256)), b"\0\0\0\0", b"", bytes(reversed(range(256))), b"\xed\xa0\x80\xff\xfe"]
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (blob BLOB)")
        connection.executemany("INSERT INTO t VALUES (?)", [(blob,) for blob in blobs])
        assert connection.execute(f"SELECT {concatenated('blob')} FROM t").fetchone() == (b"".join(blobs),)
        assert connection.execute(f"SELECT {concatenated('blob')} FROM t WHERE false").fetchone() == (None,)
