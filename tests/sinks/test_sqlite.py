"""`SQLiteSink`, beyond the contract of all sinks: stored bytes, files, locks, threads."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from asyncembed.databases.sqlite import THREAD_NAME
from asyncembed.errors import RowRefusedError, SinkBusyError, SinkConfigError, SinkError
from asyncembed.sinks import SQLiteSink
from asyncembed.sinks.sqlite import table
from asyncembed.sinks.sqlite.file import PAGE_BYTES
from asyncembed.types import Row

from ..steps import Steps
from .sink_rows import MODEL, HeldRow, hashes, nearest, row, rows, vec


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "vectors.db"


def query_file(path: Path, sql: str, *parameters: object) -> list[Any]:
    """Query the file through another connection, without waiting for a lock."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        return connection.execute(sql, parameters).fetchall()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- stored bytes ----


async def test_a_vector_is_stored_as_exactly_its_little_endian_float32_bytes(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row(7, vec(1, -2.5, 0.1), "text", '{"a": 1}')])
    ((key, model, blob, digest, text, metadata),) = query_file(
        path, "SELECT id, model, embedding, content_hash, text, metadata FROM embeddings"
    )
    assert blob == bytes.fromhex("0000803f 000020c0 cdcccc3d")
    assert (key, model, text, metadata) == ("7", MODEL, "text", '{"a": 1}')
    assert digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"  # printf text | sha256sum


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param(np.array([1.5, -2.0], dtype=">f4"), id="big-endian"),
        pytest.param(np.array([1.5, -2.0], dtype=np.float64), id="float64"),
        pytest.param(np.array([1.5, 0, -2.0], dtype=np.float32)[::2], id="not contiguous"),
    ],
)
async def test_arrays_with_equal_numbers_are_stored_as_equal_bytes(path: Path, vector: Any) -> None:
    async with SQLiteSink(path) as sink:
        assert await sink.write(MODEL, [row("a", vector)]) == {}
    assert query_file(path, "SELECT embedding FROM embeddings") == [(bytes.fromhex("0000c03f 000000c0"),)]


async def test_a_replaced_row_keeps_its_created_at(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a")])
        query_file(path, "UPDATE embeddings SET created_at = 'then', updated_at = 'then'")
        await sink.write(MODEL, [row("a", text="new")])
    ((created, updated),) = query_file(path, "SELECT created_at, updated_at FROM embeddings")
    assert created == "then"
    assert updated.endswith("+00:00")


async def test_a_new_file_has_large_pages_and_a_write_ahead_log(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 3)
        assert query_file(path, "PRAGMA page_size") == [(16_384,)]
        assert query_file(path, "PRAGMA journal_mode") == [("wal",)]


async def test_rows_inserted_by_hand_define_the_dimensions_of_their_model(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, None)
        query_file(path, "INSERT INTO embeddings VALUES ('a', ?, NULL, ?, NULL, NULL, '', '')", MODEL, bytes(12))
        with pytest.raises(SinkConfigError, match="3 dimensions"):
            await sink.prepare(MODEL, 4)


@pytest.mark.parametrize(
    "ddl",
    [
        pytest.param("CREATE TABLE embeddings (id TEXT PRIMARY KEY, note TEXT)", id="other columns"),
        pytest.param("CREATE TABLE embeddings (id, model, content_hash, embedding, text, metadata)", id="no types"),
        pytest.param("CREATE VIEW embeddings AS SELECT 1 AS id", id="a view"),
    ],
)
async def test_a_table_of_another_program_is_refused_and_not_changed(path: Path, ddl: str) -> None:
    query_file(path, ddl)
    before = query_file(path, "SELECT sql FROM sqlite_master")
    async with SQLiteSink(path) as sink:
        with pytest.raises(SinkConfigError, match=r"table 'embeddings' in .*vectors.db .*another table name"):
            await sink.prepare(MODEL, 3)
    assert query_file(path, "SELECT sql FROM sqlite_master") == before


async def test_a_column_that_hides_the_rowid_is_refused(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a")])
        query_file(path, "ALTER TABLE embeddings ADD COLUMN RowId TEXT")
        with pytest.raises(SinkConfigError, match=r"do not fit: \['RowId'\]"):
            await sink.write(MODEL, [row("b")])


async def test_columns_with_a_default_may_be_added(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a")])
        query_file(path, "ALTER TABLE embeddings ADD COLUMN seen INTEGER NOT NULL DEFAULT 0")
        await sink.write(MODEL, [row("b")])
        assert await sink.count() == 2


async def test_only_the_rows_that_violate_a_users_constraint_are_refused(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 3)
        query_file(path, "ALTER TABLE embeddings ADD COLUMN short INTEGER CHECK (length(text) < 20)")
        query_file(path, "CREATE UNIQUE INDEX one_text ON embeddings (text)")
        refused = await sink.write(MODEL, [row("a"), row("b", text="b" * 30), row("c", text="text of a"), row("d")])
        assert set(refused) == {"b", "c"}
        assert all(isinstance(error, RowRefusedError) for error in refused.values())
        assert [id async for id in sink.ids(MODEL)] == ["a", "d"]


@pytest.mark.parametrize("when", ["INSERT", "UPDATE"])
async def test_a_row_that_a_trigger_leaves_out_is_reported_as_refused(path: Path, when: str) -> None:
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 8)
        if when == "UPDATE":
            await sink.write(MODEL, [row(one.id, one.vector, "another text") for one in rows(10)])
        ignore = f"BEFORE {when} ON embeddings WHEN NEW.id = 'id-00003' BEGIN SELECT RAISE(IGNORE); END"
        query_file(path, f"CREATE TRIGGER picky {ignore}")
        refused = await sink.write(MODEL, rows(10))
        assert list(refused) == ["id-00003"]
        assert "left out by a trigger" in str(refused["id-00003"])
        assert len(await sink.existing(MODEL, hashes(rows(10)))) == 9


async def test_a_blob_of_the_wrong_size_is_an_error_that_names_the_row(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a"), row("b")])
        query_file(path, "UPDATE embeddings SET embedding = x'0102' WHERE id = 'b'")
        with pytest.raises(SinkError, match=r"row 'b' .* 2 bytes where 3 float32"):
            await sink.search(vec(1, 2, 3))


# ---- search ----


async def test_a_search_holds_slices_in_memory_not_the_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SLICE_BYTES", 1 << 18)
    stored = rows(2_000, dimensions=1_024)  # 8 MB
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, stored)
        tracemalloc.start()
        try:
            hits = await sink.search(stored[1_234].vector, k=3)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert hits[0].id == "id-01234"
    assert peak < 3 << 20


async def test_the_slice_size_does_not_change_the_hits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [*rows(50), *(row(f"same-{number}", rows(1)[0].vector) for number in range(9))]
    async with SQLiteSink(path) as sink:
        await sink.write("other", [row("first", vec(1, 2, 3))])
        await sink.write(MODEL, stored)
        whole = await sink.search(rows(1)[0].vector, k=12, model=MODEL)
        for size in (1, 100, 320):
            monkeypatch.setattr(table, "SLICE_BYTES", size)
            assert await sink.search(rows(1)[0].vector, k=12, model=MODEL) == whole


async def test_no_call_takes_a_step_for_every_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # after each step another thread that computes holds the GIL for 5 ms: 2,000 rows were stored in 9 s
    steps = Steps(monkeypatch)
    stored = rows(2_000, 64)
    taken = {}
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 64)
        steps.count = 0
        assert await sink.write(MODEL, stored) == {}
        taken["write"], steps.count = steps.count, 0
        assert await sink.write(MODEL, stored) == {}
        taken["write again"], steps.count = steps.count, 0
        assert len(await sink.existing(MODEL, hashes(stored))) == 2_000
        taken["existing"], steps.count = steps.count, 0
        assert [hit.id for hit in await sink.search(stored[7].vector, 20)] == nearest(stored, stored[7].vector, 20)
        taken["search"], steps.count = steps.count, 0
        assert len([id async for id in sink.ids(MODEL)]) == 2_000
        taken["ids"], steps.count = steps.count, 0
        assert await sink.delete([one.id for one in stored], MODEL) == 2_000
        taken["delete"] = steps.count
    assert all(0 < count < 40 for count in taken.values()), taken


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1_000])
async def test_rows_and_refusals_are_the_same_for_any_number_of_rows_per_statement(
    path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROWS_PER_STATEMENT", count)
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 8)
        query_file(path, "ALTER TABLE embeddings ADD COLUMN short INTEGER CHECK (id NOT IN ('id-00003', 'id-00019'))")
        refused = await sink.write(MODEL, rows(30))
        assert set(refused) == {"id-00003", "id-00019"}
        assert [id async for id in sink.ids(MODEL)] == [f"id-{n:05}" for n in range(30) if n not in (3, 19)]


async def test_vectors_larger_than_a_statement_should_be_are_stored(path: Path) -> None:
    large = rows(3, table.BYTES_PER_STATEMENT // 4 + 1)
    async with SQLiteSink(path) as sink:
        assert await sink.write(MODEL, large) == {}
        assert [hit.id for hit in await sink.search(large[1].vector, 3)] == nearest(large, large[1].vector, 3)


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le", "UTF-16be"])
async def test_a_file_of_any_encoding_returns_the_stored_bytes(path: Path, encoding: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
        connection.execute("CREATE TABLE notes (note TEXT)")
    every_byte = np.frombuffer(bytes(range(256)) + bytes(reversed(range(256))), "<f4").reshape(2, 64)
    finite = np.where(np.isfinite(every_byte), every_byte, np.float32(1.5))
    stored = [row("ü 𝄞", finite[0], "text ü 𝄞", '{"ü": "𝄞"}'), row("b", finite[1])]
    async with SQLiteSink(path) as sink:
        assert await sink.write(MODEL, stored) == {}
        assert await sink.existing(MODEL, hashes(stored)) == {"ü 𝄞", "b"}
        assert [id async for id in sink.ids(MODEL)] == ["b", "ü 𝄞"]
        first, second = await sink.search(finite[0], 2)
        assert (first.id, first.text, first.metadata) == ("ü 𝄞", "text ü 𝄞", {"ü": "𝄞"})
        assert first.score == pytest.approx(1)
        assert [first.id, second.id] == nearest(stored, finite[0], 2)


async def test_reading_does_not_wait_for_a_writer(path: Path) -> None:
    held = HeldRow("held")
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(5, dimensions=3))
        writing = asyncio.create_task(sink.write(MODEL, [cast(Row, held)]))
        await asyncio.to_thread(held.reached.wait)
        try:
            assert await sink.existing(MODEL, hashes(rows(5, dimensions=3))) == {one.id for one in rows(5)}
            assert len(await sink.search(vec(1, 0, 0), k=9)) == 5
            assert not writing.done()
        finally:
            held.go_on.set()
        await writing
        assert await sink.count() == 6


# ---- locks ----


@pytest.fixture
def locker(path: Path) -> Iterator[sqlite3.Connection]:
    """Another writer that holds the lock of the file."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        yield connection


async def test_a_lock_held_for_too_long_is_a_busy_error_and_the_loop_stays_live(
    path: Path, locker: sqlite3.Connection
) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async with SQLiteSink(path, busy_timeout=0.2) as sink:
        ticking = asyncio.create_task(tick())
        with pytest.raises(SinkBusyError, match=r"vectors\.db is locked .*busy_timeout=0\.2 s"):
            await sink.write(MODEL, rows(3))
        ticking.cancel()
        locker.execute("ROLLBACK")
        await sink.write(MODEL, rows(3))
        assert await sink.count() == 3
    assert ticks > 50


async def test_a_lock_that_is_released_in_time_is_waited_for(path: Path, locker: sqlite3.Connection) -> None:
    async with SQLiteSink(path, busy_timeout=30) as sink:
        writing = asyncio.create_task(sink.write(MODEL, rows(3)))
        await until_a_thread_runs()
        locker.execute("ROLLBACK")
        assert await writing == {}


async def test_a_write_that_waits_for_a_lock_is_cancelled_without_delay(path: Path, locker: sqlite3.Connection) -> None:
    async with SQLiteSink(path, busy_timeout=3_600) as sink:
        writing = asyncio.create_task(sink.write(MODEL, rows(3)))
        await until_a_thread_runs()
        writing.cancel()
        await asyncio.wait([writing], timeout=30)
        assert writing.cancelled()


async def until_a_thread_runs() -> None:
    while not sink_threads():  # noqa: ASYNC110  # no event is set when it starts
        await asyncio.sleep(0)


async def test_a_write_holds_the_lock_from_its_first_statement_on(path: Path) -> None:
    held = HeldRow("held")
    async with SQLiteSink(path) as sink, SQLiteSink(path, busy_timeout=0) as other:
        await sink.prepare(MODEL, 3)
        writing = asyncio.create_task(sink.write(MODEL, [cast(Row, held)]))
        await asyncio.to_thread(held.reached.wait)  # it has only read until now
        try:
            with pytest.raises(SinkBusyError):
                await other.write(MODEL, [row("other")])
        finally:
            held.go_on.set()
        await writing
        assert [id async for id in sink.ids(MODEL)] == ["held"]


async def test_a_stored_batch_is_not_kept_in_memory(path: Path) -> None:
    vector = vec(1, 2, 3)
    alive = weakref.ref(vector)
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a", vector)])
        del vector
        while alive() is not None:  # noqa: ASYNC110  # the thread releases it a moment later
            await asyncio.sleep(0)


async def test_without_a_write_ahead_log_a_reader_blocks_a_write_only_while_it_reads(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("CREATE TABLE theirs (x)")
        reader.execute("INSERT INTO theirs VALUES (1)")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM theirs").fetchall()
        async with SQLiteSink(path, busy_timeout=0.1) as sink:
            with pytest.raises(SinkBusyError):
                await sink.write(MODEL, rows(3))
            reader.execute("COMMIT")
            await sink.write(MODEL, rows(3))
            assert await sink.count() == 3


# ---- cancellation ----


async def test_a_write_cancelled_between_two_rows_is_rolled_back_before_it_raises(path: Path) -> None:
    held = HeldRow("id-00001x")
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 3)
        writing = asyncio.create_task(sink.write(MODEL, [*rows(3, dimensions=3), cast(Row, held)]))
        await asyncio.to_thread(held.reached.wait)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            query_file(path, "BEGIN IMMEDIATE")
        writing.cancel()
        await asyncio.sleep(0)
        writing.cancel()  # a second time: this changes nothing
        await asyncio.sleep(0)
        assert not writing.done()
        held.go_on.set()
        await asyncio.wait([writing])
        assert writing.cancelled()
        query_file(path, "BEGIN IMMEDIATE")
        assert await sink.count() == 0


async def test_a_cancelled_write_leaves_the_queue_at_once_and_does_not_affect_others(path: Path) -> None:
    held = HeldRow("held")
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 3)
        first = asyncio.create_task(sink.write(MODEL, [cast(Row, held)]))
        await asyncio.to_thread(held.reached.wait)
        second = asyncio.create_task(sink.write(MODEL, [row("second")]))
        third = asyncio.create_task(sink.write(MODEL, [row("third")]))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        assert second.cancelled()
        assert not first.done()
        held.go_on.set()
        await first
        await third
        assert [id async for id in sink.ids(MODEL)] == ["held", "third"]


def test_an_event_loop_that_ends_during_a_write_rolls_it_back(path: Path) -> None:
    held = HeldRow("held")
    sink = SQLiteSink(path)

    async def leave_it_writing() -> None:
        await sink.prepare(MODEL, 3)
        task = asyncio.create_task(sink.write(MODEL, [cast(Row, held)]))
        await asyncio.to_thread(held.reached.wait)
        threading.Timer(0.05, held.go_on.set).start()
        assert not task.done()

    asyncio.run(leave_it_writing())  # cancels the task
    query_file(path, "BEGIN IMMEDIATE")
    assert asyncio.run(counted(sink)) == 0


async def counted(sink: SQLiteSink) -> int:
    async with sink:
        return await sink.count()


async def test_a_sink_cancelled_while_it_opens_can_be_used_and_closed(path: Path) -> None:
    for steps in range(8):
        async with SQLiteSink(path) as sink:
            opening = asyncio.create_task(sink.prepare(MODEL, 8))
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait([opening])
            await sink.write(MODEL, rows(3))


async def test_closing_leaves_no_thread_and_no_log(path: Path) -> None:
    before = threading.active_count()
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(3))
        await sink.search(rows(1)[0].vector)
        assert threading.active_count() > before
    assert sink_threads() == []
    assert names(path.parent) == ["vectors.db"]


def sink_threads() -> list[threading.Thread]:
    """The running threads of databases; those of `asyncio.to_thread` have another name."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


async def test_using_one_sink_in_two_running_loops_is_an_error(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(1))
        with pytest.raises(SinkError, match="another running event loop"):
            await asyncio.to_thread(lambda: asyncio.run(sink.count()))


# ---- files that cannot be used ----


@pytest.fixture
def notes(path: Path) -> str:
    path.write_text("precious notes " * 100)
    return "precious notes " * 100


async def test_a_file_that_is_no_database_is_refused_and_not_changed(path: Path, notes: str) -> None:
    async with SQLiteSink(path) as sink:
        for use in (sink.prepare(MODEL, 3), sink.write(MODEL, rows(1)), sink.search(vec(1, 2, 3))):
            with pytest.raises(SinkConfigError, match=r"vectors\.db is not an SQLite database"):
                await use
    with closing(path.open()) as file:
        assert file.read() == notes


async def test_a_folder_is_refused(tmp_path: Path) -> None:
    async with SQLiteSink(tmp_path) as sink:
        with pytest.raises(SinkConfigError, match="is a folder: name a file in it"):
            await sink.prepare(MODEL, 3)


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    async with SQLiteSink(tmp_path / "no" / "vectors.db") as sink:
        with pytest.raises(SinkConfigError, match=r"there is no folder .*no"):
            await sink.prepare(MODEL, 3)


async def test_reading_does_not_create_a_file(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        with pytest.raises(SinkConfigError, match=r"vectors\.db does not exist yet"):
            await sink.search(vec(1, 0, 0))
    assert names(path.parent) == []


@pytest.fixture
def read_only_folder() -> Iterator[Callable[[Path], Path]]:
    """Copies a file into a folder of another user, and returns the folder."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    as_root = os.geteuid() == 0

    def put(path: Path) -> Path:
        shutil.copy(path, folder)
        for file in [folder, *folder.iterdir()]:
            file.chmod(0o555)
        if as_root:  # which may write everywhere
            os.seteuid(65_534)
        return folder

    yield put
    if as_root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


async def test_a_read_only_file_can_be_searched_and_a_write_is_an_error(
    read_only_folder: Callable[[Path], Path], path: Path
) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a")])
    query_file(path, "PRAGMA journal_mode = DELETE")  # a write-ahead log needs a folder it can write to
    folder = read_only_folder(path)
    async with SQLiteSink(folder / "vectors.db") as sink:
        assert [hit.id for hit in await sink.search(vec(1, 2, 3))] == ["a"]
        with pytest.raises(SinkConfigError, match=r"is read-only: let this user write"):
            await sink.write(MODEL, [row("b")])
    async with SQLiteSink(folder / "new.db") as sink:
        with pytest.raises(SinkConfigError, match=r"new\.db cannot be opened: let this user"):
            await sink.prepare(MODEL, 3)


async def test_a_full_disk_stores_no_row_of_the_batch_and_a_retry_stores_all(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(3, dimensions=1_000))
        # a limit of one connection, so it must be the sink's
        await sink._file.write(lambda connection: connection.execute("PRAGMA max_page_count = 40").fetchall())
        with pytest.raises(SinkError, match=r"vectors\.db cannot grow: its disk is full"):
            await sink.write(MODEL, rows(500, dimensions=1_000))
        assert await sink.count() == 3
        await sink._file.write(lambda connection: connection.execute("PRAGMA max_page_count = 4000").fetchall())
        await sink.write(MODEL, rows(500, dimensions=1_000))
        assert await sink.count() == 500


async def test_a_damaged_file_is_an_error_that_says_what_to_do(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(200, dimensions=500))
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"\xff" * 8 * PAGE_BYTES)
    async with SQLiteSink(path) as sink:
        with pytest.raises(SinkError, match=r"vectors\.db is damaged: restore it"):
            await sink.search(rows(1, dimensions=500)[0].vector)


async def test_a_log_left_by_a_killed_process_is_recovered(path: Path, tmp_path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(20))
        moved = tmp_path / "moved"
        shutil.copytree(path.parent, moved)  # the state that a kill -9 leaves now
    assert "vectors.db-wal" in names(moved)
    async with SQLiteSink(moved / "vectors.db") as sink:
        assert await sink.existing(MODEL, hashes(rows(20))) == {one.id for one in rows(20)}
    assert query_file(moved / "vectors.db", "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("name", ["with space.db", "100%.db", "a?b.db", "a#b.db", "ü.db"])
async def test_special_characters_in_a_file_name_are_kept(tmp_path: Path, name: str) -> None:
    async with SQLiteSink(tmp_path / name) as sink:
        await sink.write(MODEL, [row("a")])
        assert await sink.count() == 1
    assert names(tmp_path) == [name]


async def test_a_relative_path_does_not_change_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    async with SQLiteSink("vectors.db") as sink:
        monkeypatch.chdir(tmp_path / "elsewhere")
        await sink.write(MODEL, [row("a")])
    assert (tmp_path / "vectors.db").exists()


async def test_a_store_in_memory_is_kept_until_it_is_closed() -> None:
    async with SQLiteSink(":memory:") as sink:
        await sink.write(MODEL, rows(3))
        assert (await sink.count(), len(await sink.search(rows(1)[0].vector))) == (3, 3)
    assert ":memory:" not in names(Path())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_file_moved_during_a_fork_is_noticed(path: Path, tmp_path: Path) -> None:
    sink = SQLiteSink(path)
    asyncio.run(sink.write(MODEL, rows(1)))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert names(path.parent) == ["vectors.db"]  # SQLite deletes the log when the last connection is closed
    path.rename(tmp_path / "moved.db")
    with pytest.raises(SinkError, match="was moved, replaced or deleted"):
        asyncio.run(sink.write(MODEL, rows(2)))
    asyncio.run(sink.aclose())


# ---- sinks that were not closed ----


def test_a_process_that_did_not_close_its_sink_ends_with_a_warning(path: Path) -> None:
    script = f"""
import asyncio, numpy
from asyncembed.sinks import SQLiteSink
from asyncembed.types import Row
sink = SQLiteSink({str(path)!r})
asyncio.run(sink.write("m", [Row("a", "t", numpy.ones(3, "f4"), "0")]))
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0
    assert "ResourceWarning: SQLiteSink(" in done.stderr
    assert "Traceback" not in done.stderr
    assert query_file(path, "SELECT id FROM embeddings") == [("a",)]


async def test_a_sink_that_was_not_closed_closes_its_file_when_it_is_collected(path: Path) -> None:
    sink = SQLiteSink(path)
    await sink.write(MODEL, rows(1))
    assert names(path.parent) != ["vectors.db"]
    with pytest.warns(ResourceWarning, match="was not closed: use `async with`"):
        del sink
    assert names(path.parent) == ["vectors.db"]  # SQLite deletes the log when the last connection is closed
    for thread in sink_threads():
        await asyncio.to_thread(thread.join, 30)
    assert sink_threads() == []


def test_a_sink_shows_its_file_and_table() -> None:
    assert repr(SQLiteSink("some/x.db", table="docs")) == "SQLiteSink('some/x.db', table='docs')"


def test_a_negative_busy_timeout_is_refused() -> None:
    with pytest.raises(SinkConfigError, match="busy_timeout is -1"):
        SQLiteSink("x.db", busy_timeout=-1)


# ---- files changed by another program, and options ----


async def test_the_undo_log_of_a_statement_is_kept_in_memory(path: Path) -> None:
    # else a full folder for temporary files fails every write, and is taken for a full disk
    async with SQLiteSink(path) as sink:
        found = await sink._file.write(lambda connection: connection.execute("PRAGMA temp_store").fetchone())
    assert found == (2,)


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le", "UTF-16be"])
async def test_every_id_is_listed_once_in_any_encoding(
    path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.sinks.contract.IDS_PER_PAGE", 7)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
        connection.execute("CREATE TABLE notes (note TEXT)")
    stored = [row(chr(0x41 + 37 * number) * 2) for number in range(1, 200)] + [
        row(name) for name in ("𝄞", "\ue000", "a")
    ]
    async with SQLiteSink(path) as sink:
        assert await sink.write(MODEL, stored) == {}
        listed = [id async for id in sink.ids(MODEL)]
    assert len(listed) == len(stored)
    assert set(listed) == {one.id for one in stored}


async def test_a_text_that_is_a_blob_is_none_and_invalid_metadata_is_an_error_that_does_not_quote_it(
    path: Path,
) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a"), row("b", vec(3, 2, 1))])
        query_file(path, "UPDATE embeddings SET text = x'00ff', rowid = -5 WHERE id = 'a'")
        (hit,) = await sink.search(vec(1, 2, 3), 1)
        assert (hit.id, hit.text) == ("a", None)
        query_file(path, "UPDATE embeddings SET metadata = 'secret' WHERE id = 'a'")
        with pytest.raises(SinkError, match="metadata that is no JSON") as caught:
            await sink.search(vec(1, 2, 3), 1)
    assert "secret" not in repr(caught.value)


def test_a_path_with_a_nul_character_is_refused() -> None:
    with pytest.raises(SinkConfigError, match="NUL"):
        SQLiteSink("a\0b.db")


async def test_prepare_refuses_a_file_that_cannot_be_written(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, [row("a")])
    with open(path, "r+b") as file:  # noqa: ASYNC230
        file.seek(18)
        file.write(b"\3")  # sqlite.org/fileformat2.html, 1.3.2: a write version above 2 means read-only
    async with SQLiteSink(path) as sink:
        with pytest.raises(SinkConfigError, match="read-only"):
            await sink.prepare(MODEL, None)
