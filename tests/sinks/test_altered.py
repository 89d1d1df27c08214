"""Tables that are altered and files that are moved, before a run and during one."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from asyncembed import Embedder, PostgresSink, Record, SQLiteSink, ingest
from asyncembed.errors import RowRefusedError, SinkConfigError, SinkError
from asyncembed.report import IngestReport
from tests.fakes import FakeProvider
from tests.stores import OpenStore, run_sql

from .sink_rows import MODEL, hashes, row, rows

COLUMNS = {"id": "id", "model": "model", "embedding": "embedding"}


def records(count: int) -> list[Record]:
    return [Record(f"id {number}", f"text {number}") for number in range(count)]


async def altered_midway(sink: Any, alter: Callable[[], object]) -> tuple[IngestReport, SinkError | None]:
    """Ingest 30 records in batches of 10, one at a time, and alter something after the first."""
    embedder = Embedder("fake", provider=FakeProvider(latency_s=0), max_batch_size=10, concurrency=1)
    altered: list[int] = []

    def once(progress: Any) -> None:
        if progress.done >= 10 and not altered:
            altered.append(progress.done)
            alter()

    try:
        return await ingest(records(30), embedder, sink, on_progress=once), None
    except SinkError as error:
        return error.report, error


# ---- PostgreSQL, during a run ----


@pytest.mark.parametrize(
    "ddl",
    [
        pytest.param("ALTER TABLE embeddings ADD note text NOT NULL DEFAULT ''", id="another column"),
        pytest.param("ALTER TABLE embeddings ALTER embedding TYPE halfvec", id="half the precision"),
        pytest.param("ALTER TABLE embeddings ALTER embedding TYPE vector(4)", id="a fixed size"),
        pytest.param("ALTER TABLE embeddings ALTER content_hash TYPE varchar", id="another type of text"),
        pytest.param("CREATE INDEX ON embeddings USING hnsw ((embedding::vector(4)) vector_cosine_ops)", id="an index"),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["its own pool", "a pool with cached statements"])
async def test_a_run_goes_on_after_an_alteration_that_still_takes_its_rows(dsn: str, ddl: str, given: bool) -> None:
    async with asyncpg.create_pool(dsn, min_size=0, max_size=2) as pool, PostgresSink(pool if given else dsn) as sink:
        report, error = await altered_midway(sink, lambda: run_sql(dsn, ddl))
        assert error is None
        assert report.success_count == await sink.count() == 30
        again = await ingest(records(30), Embedder("fake", provider=FakeProvider(latency_s=0)), sink)
        assert (again.skipped_count, again.requests) == (30, 0)


@pytest.mark.parametrize(
    ("ddl", "words"),
    [
        pytest.param("ALTER TABLE embeddings DROP content_hash", "has no columns", id="a column less"),
        pytest.param("ALTER TABLE embeddings RENAME id TO key", "has no columns", id="a column renamed"),
        pytest.param("ALTER TABLE embeddings DROP CONSTRAINT embeddings_pkey", "no unique index", id="no key"),
        pytest.param("ALTER TABLE embeddings ADD lang int NOT NULL CHECK (lang > 0)", None, id="a column to be given"),
        pytest.param("ALTER TABLE embeddings RENAME TO old", "does not exist", id="renamed"),
        pytest.param("ALTER TABLE embeddings ALTER id TYPE bytea USING id::bytea", "id is bytea", id="no id any more"),
    ],
)
async def test_an_alteration_that_takes_no_rows_any_more_ends_the_run_and_keeps_the_stored_rows(
    dsn: str, ddl: str, words: str | None
) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare("fake", None)
        if words is None:
            ddl = ddl.replace("int", "int DEFAULT 1") + "; ALTER TABLE embeddings ALTER lang DROP DEFAULT"
        report, error = await altered_midway(sink, lambda: run_sql(dsn, *ddl.split("; ")))
        if words is None:  # the server refuses every row
            assert error is None
            assert {type(failure.error) for failure in report.failures} == {RowRefusedError}
        else:
            assert isinstance(error, SinkConfigError)
            assert words in str(error)
    assert report.success_count == 10
    assert report.failed_count == 20
    table = "old" if "RENAME TO" in ddl else "embeddings"
    assert run_sql(dsn, f"SELECT count(*) FROM {table}") == [(10,)]


async def test_a_constraint_added_during_a_run_refuses_only_its_own_rows(dsn: str) -> None:
    check = "ALTER TABLE embeddings ADD CHECK (text NOT IN ('text 15', 'text 22')) NOT VALID"
    async with PostgresSink(dsn) as sink:
        report, error = await altered_midway(sink, lambda: run_sql(dsn, check))
        assert error is None
        assert report.failed_ids == ["id 15", "id 22"]
        assert report.success_count == await sink.count() == 28


# ---- PostgreSQL, before a token is paid ----


@pytest.mark.parametrize(
    ("ddl", "words"),
    [
        pytest.param("id int GENERATED ALWAYS AS IDENTITY, model text", "non-DEFAULT value", id="generated ids"),
        pytest.param(
            "id int, model text GENERATED ALWAYS AS ('m') STORED", "non-DEFAULT value", id="a generated model"
        ),
        pytest.param("id serial, model text", None, id="ids with a default"),
    ],
)
async def test_columns_that_cannot_be_written_are_refused_before_anything_is_paid(
    dsn: str, ddl: str, words: str | None
) -> None:
    run_sql(dsn, f"CREATE TABLE docs ({ddl}, embedding vector(3), UNIQUE (id, model))")
    async with PostgresSink(dsn, table="docs", columns=COLUMNS) as sink:
        if words is None:
            await sink.prepare(MODEL, 3)
            assert await sink.write(MODEL, [row(7)]) == {}
        else:
            with pytest.raises(SinkConfigError, match=words):
                await sink.prepare(MODEL, 3)


@pytest.mark.parametrize(
    ("rights", "enough"),
    [
        ("SELECT", False),
        ("SELECT, INSERT", False),
        ("INSERT, UPDATE", False),
        ("SELECT, UPDATE", False),
        ("SELECT, INSERT, UPDATE", True),
    ],
)
async def test_missing_rights_are_reported_before_anything_is_paid(
    postgres: Any, bare_dsn: str, rights: str, enough: bool
) -> None:
    run_sql(
        bare_dsn,
        "CREATE EXTENSION vector",
        "CREATE TABLE docs (id int, model text, embedding vector(3), UNIQUE (id, model))",
        "DO $$ BEGIN CREATE ROLE reader LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        f"GRANT {rights} ON docs TO reader",
    )
    dsn = bare_dsn.replace("postgres@", "reader@")
    async with PostgresSink(dsn, table="docs", columns=COLUMNS) as sink:
        if enough:
            await sink.prepare(MODEL, 3)
            assert await sink.write(MODEL, [row(7)]) == {}
        else:
            with pytest.raises(SinkConfigError, match=r"permission denied for table docs .*see docs/sinks.md"):
                await sink.prepare(MODEL, 3)


async def test_a_table_whose_plans_depend_on_the_values_is_accepted(dsn: str) -> None:
    run_sql(
        dsn,
        "CREATE TABLE docs (id int PRIMARY KEY, embedding vector(3))",
        "INSERT INTO docs VALUES (7)",
        "CREATE RULE no AS ON UPDATE TO docs DO ALSO SELECT 1 / 0",  # the planner fails: SQLSTATE 22012
    )
    columns = {"id": "id", "embedding": "embedding"}
    async with PostgresSink(dsn, table="docs", columns=columns, update_only=True) as sink:
        await sink.prepare(MODEL, 3)
        run_sql(dsn, "DROP RULE no ON docs")
        assert await sink.write(MODEL, [row(7)]) == {}


async def test_a_replica_is_reported_before_anything_is_paid(dsn: str) -> None:
    run_sql(dsn, "CREATE TABLE docs (id int, model text, embedding vector(3), UNIQUE (id, model))")
    read_only = f"{dsn}&default_transaction_read_only=on"
    async with PostgresSink(read_only, table="docs", columns=COLUMNS, retry_for=0) as sink:
        with pytest.raises(SinkError, match=r"read-only transaction \(SQLSTATE 25006\)"):
            await sink.prepare(MODEL, 3)


# ---- SQLite ----


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "vectors.db"


def put_another_in_its_place(path: Path) -> None:
    path.rename(path.with_name("old.db"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE another (id)")


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda path: path.unlink(), id="deleted"),
        pytest.param(lambda path: path.rename(path.with_name("old.db")), id="renamed"),
        pytest.param(put_another_in_its_place, id="replaced"),
        pytest.param(lambda path: path.parent.rename(path.parent.with_name("there")), id="its folder renamed"),
    ],
)
async def test_rows_written_to_a_file_that_is_gone_are_not_counted_as_stored(
    path: Path, move: Callable[[Path], Any]
) -> None:
    async with SQLiteSink(path) as sink:
        report, error = await altered_midway(sink, lambda: move(path))
        assert error is not None
        assert "vectors.db was moved, replaced or deleted while it was open" in str(error)
        assert (report.success_count, report.failed_count) == (10, 20)


async def test_after_a_file_was_replaced_the_sink_can_be_closed_and_used_again(path: Path) -> None:
    sink = SQLiteSink(path)
    await sink.write(MODEL, [row("a")])
    put_another_in_its_place(path)
    with pytest.raises(SinkError, match="was moved"):
        await sink.write(MODEL, [row("b")])
    await sink.aclose()
    await sink.write(MODEL, [row("c")])
    assert [id async for id in sink.ids(MODEL)] == ["c"]
    await sink.aclose()


async def test_a_copy_without_its_log_is_an_older_consistent_state_and_the_next_run_does_the_rest(
    path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(5))
    async with SQLiteSink(path) as sink:
        await sink.write(MODEL, rows(20))
        shutil.copy(path, copy)  # without its log, which holds the last transaction
    async with SQLiteSink(copy) as sink:
        assert await sink.existing(MODEL, hashes(rows(20))) == {one.id for one in rows(5)}
        await sink.write(MODEL, rows(20))
        assert await sink.count() == 20
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_the_log_of_another_file_is_ignored(path: Path, tmp_path: Path) -> None:
    async with SQLiteSink(path) as sink, SQLiteSink(tmp_path / "other.db") as other:
        await sink.write(MODEL, [row("a")])
        await other.write(MODEL, [row("b"), row("c")])
        moved = tmp_path / "moved.db"
        shutil.copy(path.with_name("vectors.db-wal"), f"{moved}-wal")
        with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy(tmp_path / "other.db", moved)
    async with SQLiteSink(moved) as sink:
        assert [id async for id in sink.ids(MODEL)] in (["b", "c"], ["a"])
    with closing(sqlite3.connect(moved)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_a_trigger_that_rolls_everything_back_leaves_nothing_stored(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 3)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(
                "CREATE TRIGGER no BEFORE INSERT ON embeddings WHEN NEW.id = 'bad' "
                "BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
            )
        with pytest.raises(SinkError):
            await sink.write(MODEL, [row("a"), row("bad"), row("c")])
        assert await sink.count() == 0
        assert await sink.write(MODEL, [row("a")]) == {}
        assert await sink.count() == 1


async def test_a_row_that_is_too_large_is_refused_alone(path: Path) -> None:
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, 3)
        # SQLite's own limit is a gigabyte; it counts the row as well as each of its values
        await sink._file.write(lambda connection: connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000))
        refused = await sink.write(
            MODEL, [row("a"), row("b", text="b" * 100_001), row("c", text="c" * 99_990), row("d")]
        )
        assert set(refused) == {"b", "c"}
        assert [id async for id in sink.ids(MODEL)] == ["a", "d"]


# ---- both ----


async def test_a_table_that_is_emptied_during_a_run_takes_the_rest(open_store: OpenStore) -> None:
    async with open_store() as sink, open_store() as other:
        embedder = Embedder("fake", provider=FakeProvider(latency_s=0), max_batch_size=10, concurrency=1)
        await ingest(records(10), embedder, sink)
        assert await other.delete([f"id {number}" for number in range(10)], "fake") == 10
        report = await ingest(records(30), embedder, sink)
        assert report.success_count == await sink.count() == 30
