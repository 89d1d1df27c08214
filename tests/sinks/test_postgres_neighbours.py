"""The PostgreSQL sink beside others: tables made by hand, triggers, policies, limits, migrations, the app's pools."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

import asyncpg
import numpy as np
import pytest

from asyncembed import Embedder, ingest
from asyncembed.errors import AsyncEmbedError, RowRefusedError, SinkConfigError, SinkError
from asyncembed.sinks import PostgresSink
from tests.fakes import FakeProvider
from tests.stores import run_sql

from .sink_rows import MODEL, hashes, nearest, row, rows, vec

SECTIONS = {"id": "section_id", "embedding": "embedding", "model": "model_name", "created_at": "created_at"}
OURS = """
    CREATE TABLE embeddings (
        id text NOT NULL, model text NOT NULL, embedding vector{size} NOT NULL, content_hash text, text text,
        metadata jsonb, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (id, model)
    )
"""


def refuse(dsn: str, what: str, table: str = "embeddings", when: str = "NEW.id = 'id-00003'") -> None:
    """Create a trigger that does `what` with the rows for which `when` is true."""
    run_sql(
        dsn,
        f"CREATE FUNCTION picky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {when} THEN {what}; END IF; "
        "RETURN NEW; END $$",
        f"CREATE TRIGGER picky BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION picky()",
    )


# ---- tables made by hand ----


@pytest.mark.parametrize("default", ["", " DEFAULT now()"], ids=["no default", "a default"])
async def test_mapped_times_are_set_with_and_without_a_default(dsn: str, default: str) -> None:
    run_sql(
        dsn,
        f"CREATE TABLE se (section_id bigint NOT NULL, embedding vector(3) NOT NULL, model_name text NOT NULL, "
        f"created_at timestamptz NOT NULL{default}, changed timestamptz, UNIQUE (section_id, model_name))",
    )
    async with PostgresSink(dsn, table="se", columns={**SECTIONS, "updated_at": "changed"}) as sink:
        await sink.prepare(MODEL, 3)
        assert await sink.write(MODEL, [row(1), row(2)]) == {}
        run_sql(dsn, "UPDATE se SET created_at = '2001-01-01', changed = '2001-01-01'")
        assert await sink.write(MODEL, [row(1)]) == {}
    years = "extract(year FROM created_at)::int, extract(year FROM changed)::int > 2001"
    assert run_sql(dsn, f"SELECT section_id, {years} FROM se ORDER BY 1") == [(1, 2001, True), (2, 2001, False)]


async def test_a_time_column_of_another_type_keeps_its_default(dsn: str) -> None:
    run_sql(
        dsn,
        "CREATE TABLE se (section_id bigint NOT NULL, embedding vector(3), model_name text NOT NULL, "
        "created_at bigint NOT NULL DEFAULT 7, UNIQUE (section_id, model_name))",
    )
    async with PostgresSink(dsn, table="se", columns=SECTIONS) as sink:
        await sink.prepare(MODEL, 3)
        assert await sink.write(MODEL, [row(1)]) == {}
        run_sql(dsn, "ALTER TABLE se ALTER created_at DROP DEFAULT")
        with pytest.raises(SinkConfigError, match="created_at must be given"):
            await sink.prepare(MODEL, 3)
    assert run_sql(dsn, "SELECT created_at FROM se") == [(7,)]


async def test_our_table_with_a_size_in_its_type_is_searched(dsn: str) -> None:
    run_sql(dsn, OURS.format(size="(8)"))
    stored = rows(20)
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        assert await sink.models() == {}
        await sink.write(MODEL, stored)
        assert await sink.models() == {MODEL: 8}
        assert [hit.id for hit in await sink.search(stored[3].vector, 3)] == nearest(stored, stored[3].vector, 3)
        with pytest.raises(SinkConfigError, match="vectors of 8 dimensions"):
            await sink.prepare("another", 4)


@pytest.mark.parametrize("how", ["renamed", "by hand", "without its models"])
async def test_rows_of_models_that_are_not_recorded_are_found(dsn: str, how: str) -> None:
    stored = rows(5)
    async with PostgresSink(dsn) as first:
        await first.prepare(MODEL, None if how == "by hand" else 8)
        if how != "by hand":
            await first.write(MODEL, stored)
    if how == "renamed":
        run_sql(dsn, "ALTER TABLE embeddings RENAME TO docs")
    elif how == "by hand":
        for one in stored:
            numbers = one.vector.tolist()
            run_sql(dsn, f"INSERT INTO embeddings (id, model, embedding) VALUES ('{one.id}', '{MODEL}', '{numbers}')")
    else:
        run_sql(dsn, "DROP TABLE asyncembed_models")
    async with PostgresSink(dsn, table="docs" if how == "renamed" else "embeddings") as sink:
        for model in (None, MODEL):
            found = await sink.search(stored[2].vector, 2, model=model)
            assert [hit.id for hit in found] == nearest(stored, stored[2].vector, 2)
        assert await sink.models() == {MODEL: 8}
        await sink.create_index()


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("model varchar(5)", "model holds 5 characters; 7 are needed"),
        ("content_hash varchar(32)", "hash holds 32 characters; 64"),
    ],
)
async def test_a_column_that_is_too_short_is_reported_before_anything_is_paid(
    dsn: str, column: str, words: str
) -> None:
    name, kind = column.split()
    run_sql(dsn, OURS.format(size=""), f"ALTER TABLE embeddings ALTER {name} TYPE {kind}")
    async with PostgresSink(dsn) as sink:
        with pytest.raises(SinkConfigError, match=words):
            await sink.prepare(MODEL, 3)


async def test_an_id_that_is_too_long_for_its_column_is_not_paid_for(dsn: str) -> None:
    run_sql(dsn, "CREATE TABLE se (section_id varchar(3) PRIMARY KEY, embedding vector(4))")
    provider = FakeProvider(latency_s=0)
    async with PostgresSink(dsn, table="se", columns={"id": "section_id", "embedding": "embedding"}) as sink:
        report = await ingest([("abc", "x"), ("abcd", "y"), ("ab  ", "z")], Embedder("fake", provider=provider), sink)
    assert (report.success_count, report.failed_ids) == (1, ["abcd", "ab  "])
    assert provider.requests == [["x"]]


async def test_an_index_over_the_old_size_of_a_model_is_reported_before_anything_is_paid(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, rows(5))
        await sink.write("another", rows(5, dimensions=4))
        await sink.create_index(MODEL)
        await sink.delete([f"id-{number:05}" for number in range(5)], MODEL)
        with pytest.raises(SinkConfigError, match=r"index over 8 dimensions of model 'model-a'.*DROP INDEX \S+_hnsw"):
            await sink.prepare(MODEL, 4)
        await sink.prepare("another", 4)  # the index is not over its rows


async def test_an_index_over_another_column_does_not_matter(dsn: str) -> None:
    run_sql(
        dsn,
        "CREATE TABLE se (id text PRIMARY KEY, titles vector, bodies vector)",
        "CREATE INDEX ON se USING hnsw ((titles::vector(8)) vector_cosine_ops)",
    )
    for column, size in (("bodies", 4), ("titles", 8)):
        async with PostgresSink(dsn, table="se", columns={"id": "id", "embedding": column}) as sink:
            await sink.prepare(MODEL, size)
            assert await sink.write(MODEL, rows(3, size)) == {}
    async with PostgresSink(dsn, table="se", columns={"id": "id", "embedding": "titles"}) as sink:
        run_sql(dsn, "UPDATE se SET titles = NULL")
        with pytest.raises(SinkConfigError, match="index over 8 dimensions"):
            await sink.prepare(MODEL, 4)


async def test_only_one_of_several_first_writers_with_different_sizes_wins(dsn: str) -> None:
    run_sql(dsn, "CREATE TABLE se (section_id text PRIMARY KEY, embedding vector)")
    columns = {"id": "section_id", "embedding": "embedding"}

    async def write(size: int) -> bool:
        async with PostgresSink(dsn, table="se", columns=columns) as sink:
            try:
                return not await sink.write(MODEL, [row(f"{size}-{n}", vec(*range(1, size + 1))) for n in range(50)])
            except SinkConfigError:
                return False

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(write(size)) for size in (3, 4, 5)]
    assert [task.result() for task in tasks].count(True) == 1
    assert run_sql(dsn, "SELECT count(*), count(DISTINCT vector_dims(embedding)) FROM se") == [(50, 1)]


async def test_filling_changes_neither_texts_nor_rows_of_other_models(dsn: str) -> None:
    run_sql(
        dsn,
        "CREATE TABLE se (id bigint, model text, body text, embedding vector(3), UNIQUE (id, model))",
        "INSERT INTO se VALUES (1, 'model-a', 'one', NULL), (1, 'model-b', 'one', '[9,9,9]'), (2, NULL, 'two', NULL), "
        "(3, 'model-b', 'three', '[9,9,9]')",
    )
    columns = {"id": "id", "embedding": "embedding", "model": "model", "text": "body"}
    async with PostgresSink(dsn, table="se", columns=columns, update_only=True) as sink:
        await sink.prepare(MODEL, 3)
        refused = await sink.write(MODEL, [row(number, text="another") for number in (1, 2, 3)])
    assert list(refused) == [3]
    assert run_sql(dsn, "SELECT id, model, body, embedding::text FROM se ORDER BY id, model") == [
        (1, "model-a", "one", "[1,2,3]"),
        (1, "model-b", "one", "[9,9,9]"),
        (2, "model-a", "two", "[1,2,3]"),
        (3, "model-b", "three", "[9,9,9]"),
    ]


async def test_two_spellings_of_one_id_are_one_record_and_paid_once(dsn: str) -> None:
    run_sql(dsn, "CREATE TABLE se (id bigint PRIMARY KEY, embedding vector(4), text text, content_hash text)")
    columns = {name: name for name in ("id", "embedding", "text", "content_hash")}
    provider = FakeProvider(latency_s=0)
    embedder = Embedder("fake", provider=provider, max_batch_size=1, concurrency=4)
    async with PostgresSink(dsn, table="se", columns=columns) as sink:
        first = await ingest([("007", "old"), (7, "new"), ("8", "x")], embedder, sink)
        again = await ingest([("007", "old"), (7, "new"), ("8", "x")], embedder, sink)
    assert (first.success_count, first.skipped_count, again.skipped_count) == (2, 1, 3)
    assert run_sql(dsn, "SELECT id, text FROM se ORDER BY id") == [(7, "new"), (8, "x")]
    assert sorted(provider.requests) == [["new"], ["x"]]


# ---- triggers and policies ----


@pytest.mark.parametrize("code", ["APP01", "45000", "38001", "21000", "55000", "42501", "42804", "0A000", "22023"])
async def test_a_row_is_refused_alone_and_not_shown_whatever_a_trigger_raises_about_it(dsn: str, code: str) -> None:
    stored = rows(10)
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        refuse(dsn, f"RAISE EXCEPTION 'bad: %', NEW.text USING ERRCODE = '{code}'")
        refused = await sink.write(MODEL, stored)
        assert await sink.count() == 9
    assert list(refused) == ["id-00003"]
    assert code in str(refused["id-00003"])
    assert "text of" not in str(refused["id-00003"])


async def test_an_error_about_the_server_that_a_trigger_raises_ends_the_write_without_showing_a_text(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        refuse(dsn, "RAISE EXCEPTION 'bad: %', NEW.text USING ERRCODE = 'XX000'")
        with pytest.raises(SinkError, match="XX000") as caught:
            await sink.write(MODEL, rows(10))
    assert "text of" not in everything(caught.value)


def everything(error: BaseException | None) -> str:
    """The text of an error, its causes and its contexts, whether they are shown or not."""
    text = ""
    while error is not None:
        text += "".join(traceback.format_exception(error)) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return text


async def test_a_refused_row_is_in_no_context_of_an_error(dsn: str) -> None:
    async with PostgresSink(dsn, timeout=0.5, retry_for=0) as sink:
        await sink.prepare(MODEL, 8)
        # refused for one row at first, then slow while that row is searched
        refuse(dsn, "RAISE EXCEPTION 'bad: %', NEW.text")
        run_sql(dsn, "CREATE SEQUENCE times")
        run_sql(
            dsn,
            "CREATE OR REPLACE FUNCTION picky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.id = 'id-00003' AND nextval('times') = 1 THEN RAISE EXCEPTION 'bad: %', NEW.text; END IF; "
            "IF nextval('times') > 9 THEN PERFORM pg_sleep(9); END IF; RETURN NEW; END $$",
        )
        with pytest.raises(SinkError) as caught:
            await sink.write(MODEL, rows(30))
    assert "text of" not in everything(caught.value)


async def test_a_row_that_a_policy_forbids_is_refused_alone(bare_dsn: str) -> None:
    async with PostgresSink(bare_dsn) as sink:
        await sink.prepare(MODEL, 8)
    run_sql(
        bare_dsn,
        "DO $$ BEGIN CREATE ROLE low LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        "GRANT SELECT, INSERT, UPDATE ON embeddings, asyncembed_models TO low",
        "ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY seen ON embeddings FOR SELECT USING (true)",
        "CREATE POLICY kept ON embeddings FOR INSERT WITH CHECK (id <> 'id-00003')",
        "CREATE POLICY kept_too ON embeddings FOR UPDATE USING (id <> 'id-00003')",
    )
    async with PostgresSink(bare_dsn.replace("postgres@", "low@")) as sink:
        await sink.prepare(MODEL, 8)
        assert list(await sink.write(MODEL, rows(10))) == ["id-00003"]
        assert await sink.count() == 9
        assert list(await sink.write(MODEL, rows(4)[3:])) == ["id-00003"]  # alone in its batch, too
        run_sql(bare_dsn, "REVOKE INSERT ON embeddings FROM low")
        with pytest.raises(SinkConfigError, match="permission denied"):  # which is not about rows
            await sink.write(MODEL, rows(30))


@pytest.mark.parametrize("when", ["an insert", "an update"])
async def test_a_row_that_a_trigger_leaves_out_is_not_reported_as_stored(dsn: str, when: str) -> None:
    stored = rows(10)
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        if when == "an update":
            await sink.write(MODEL, [row(one.id, one.vector, "another text") for one in stored])
        refuse(dsn, "RETURN NULL")
        refused = await sink.write(MODEL, stored)
        assert set(refused) == {"id-00003"}
        assert isinstance(refused["id-00003"], RowRefusedError)
        assert "left out by a trigger" in str(refused["id-00003"])
        assert len(await sink.existing(MODEL, hashes(stored))) == 9


# ---- other processes ----


async def until(connection: Any, condition: str) -> None:
    """Wait until the query has a row; another connection causes that, so there is no event to wait for."""
    while not await connection.fetchval(f"SELECT EXISTS ({condition})"):
        pass


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_many_sinks_may_start_at_once_under_any_default_isolation(bare_dsn: str, level: str) -> None:
    name = run_sql(bare_dsn, "SELECT current_database()")[0][0]
    run_sql(bare_dsn, f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")

    async def start(number: int) -> None:
        async with PostgresSink(bare_dsn) as sink:
            await sink.prepare(MODEL, 8)
            await sink.write(MODEL, [row(number, rows(1)[0].vector), row("same", rows(1)[0].vector)])

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(start(number))
    assert run_sql(bare_dsn, "SELECT count(*) FROM embeddings") == [(7,)]


@pytest.mark.parametrize(
    "ddl", [pytest.param("CREATE EXTENSION vector", id="extension"), pytest.param(OURS.format(size=""), id="table")]
)
async def test_a_migration_that_creates_the_same_objects_is_waited_for(bare_dsn: str, ddl: str) -> None:
    if "TABLE" in ddl:
        run_sql(bare_dsn, "CREATE EXTENSION vector")
    migration = await asyncpg.connect(bare_dsn)
    async with PostgresSink(bare_dsn) as sink:
        async with asyncio.TaskGroup() as group, migration.transaction():
            await migration.execute(ddl)
            preparing = group.create_task(sink.prepare(MODEL, 3))
            await until(migration, "SELECT FROM pg_locks WHERE NOT granted")
            assert not preparing.done()
        assert await sink.write(MODEL, [row("a")]) == {}
    await migration.close()


async def test_writers_and_deleters_of_the_same_rows_do_not_deadlock(dsn: str) -> None:
    before = run_sql(dsn, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    stored = rows(200)

    async def work(number: int) -> None:
        async with PostgresSink(dsn) as sink:
            for turn in range(6):
                if (number + turn) % 3:
                    await sink.write(MODEL, stored[::-1] if turn % 2 else stored)
                else:
                    await sink.delete([one.id for one in stored], MODEL)

    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, stored)
    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(work(number))
    run_sql(dsn, "SELECT pg_stat_force_next_flush()")
    assert run_sql(dsn, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == before


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
async def test_an_index_may_take_longer_than_the_limits_of_a_role(bare_dsn: str, limit: str) -> None:
    async with PostgresSink(bare_dsn) as sink:
        await sink.write(MODEL, rows(10))
    name = run_sql(bare_dsn, "SELECT current_database()")[0][0]
    other = await asyncpg.connect(bare_dsn)
    run_sql(bare_dsn, f"ALTER DATABASE {name} SET {limit} = '100ms'")
    async with PostgresSink(bare_dsn) as sink, asyncio.TaskGroup() as group, other.transaction():
        await other.execute(
            "UPDATE embeddings SET text = text"
        )  # the build of an index waits for the end of this transaction
        building = group.create_task(sink.create_index())
        await until(other, "SELECT FROM pg_locks WHERE NOT granted AND clock_timestamp() - waitstart > '0.3s'")
        assert not building.done()
    await other.close()
    assert run_sql(bare_dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid::regclass::text LIKE '%_hnsw'") == [
        (True,)
    ]


async def test_indexes_that_are_built_at_once_are_all_built(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, rows(500))
        async with asyncio.TaskGroup() as group:
            for metric in ("cosine", "inner_product", "l2"):
                group.create_task(sink.create_index(metric=metric))
    built = "SELECT count(*) FROM pg_index WHERE indrelid = 'embeddings'::regclass AND indisvalid AND NOT indisunique"
    assert run_sql(dsn, built) == [(3,)]


async def test_every_column_and_table_has_its_own_index(dsn: str) -> None:
    long = "x" * 50
    run_sql(dsn, "CREATE TABLE a (id text PRIMARY KEY, te vector(8), be vector(8))")
    for table, columns in (
        ("a", {"id": "id", "embedding": "te"}),
        ("a", {"id": "id", "embedding": "be"}),
        (f"{long}_one", None),
        (f"{long}_two", None),
    ):
        async with PostgresSink(dsn, table=table, columns=columns) as sink:
            await sink.write(MODEL, rows(3))
            await sink.create_index()
    assert run_sql(
        dsn, "SELECT count(*) FROM pg_indexes WHERE schemaname = current_schema AND indexdef LIKE '%hnsw%'"
    ) == [(4,)]


# ---- searching ----


async def test_a_search_by_index_finds_the_farthest_rows_if_only_they_fulfil_its_condition(dsn: str) -> None:
    query = vec(1, 0, 0, 0)
    near = [row(f"near-{n}", vec(1, n / 1e6, 0, 0)) for n in range(3_000)]
    far = [row(f"far-{n}", vec(-1, n, 0, 0), metadata='{"rare": true}') for n in range(10)]
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [*near, *far])
        await sink.create_index()
        run_sql(dsn, "ALTER ROLE CURRENT_USER SET hnsw.max_scan_tuples = 1")
        try:
            async with PostgresSink(dsn) as limited:
                found = await limited.search(query, 10, where={"rare": True})
        finally:
            run_sql(dsn, "ALTER ROLE CURRENT_USER RESET hnsw.max_scan_tuples")
    assert {hit.id for hit in found} == {one.id for one in far}


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e6, 1e30])
@pytest.mark.parametrize("dimensions", [8, 2_100])
async def test_a_query_vector_of_any_length_finds_the_same_rows(dsn: str, dimensions: int, scale: float) -> None:
    stored = rows(50, dimensions)
    query = stored[7].vector
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, stored)
        if dimensions > 2_000:
            await sink.create_index()
        found = await sink.search((query.astype(np.float64) * scale).astype(np.float32), 3)
    assert [hit.id for hit in found] == nearest(stored, query, 3)


@pytest.mark.parametrize(
    ("where", "args", "words"),
    [
        pytest.param({"w": float("nan")}, (), "JSON cannot hold", id="NaN"),
        pytest.param({"w": object()}, (), "JSON cannot hold", id="an object"),
        pytest.param({"w": "a\0"}, (), "NUL or half", id="NUL in a mapping"),
        pytest.param({"w": "\ud800"}, (), "NUL or half", id="half a pair"),
        pytest.param("id = 'a\0'", (), "NUL", id="NUL in SQL"),
        pytest.param(5, (), "where= is a int", id="a number"),
        pytest.param("id = $1", (), r"speaks of \$1; args= has 0", id="a value that is missing"),
    ],
)
async def test_an_invalid_condition_is_an_error(dsn: str, where: Any, args: Any, words: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row("a")])
        with pytest.raises(SinkConfigError, match=words):
            await sink.search(vec(1, 2, 3), where=where, args=args)


@pytest.mark.parametrize("where", [{}, "", "id = $1 -- the one", "text <> '$7' AND id = $1"])
async def test_a_condition_may_be_empty_or_end_in_a_comment(dsn: str, where: Any) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row("a")])
        args = ["a"] if "$1" in where else []
        assert [hit.id for hit in await sink.search(vec(1, 2, 3), where=where, args=args)] == ["a"]


async def test_numbers_too_long_for_pythons_int_are_read(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row("a", metadata='{"n": 1e5000}')])
        ((hit),) = await sink.search(vec(1, 2, 3))
        assert hit.metadata == {"n": float("inf")}


# ---- the app's pools ----


async def test_a_pool_that_is_not_open_is_an_error(dsn: str) -> None:
    pool = asyncpg.create_pool(dsn, min_size=0)
    sink = PostgresSink(pool)
    with pytest.raises(SinkError, match="not open yet: await it"):
        await sink.prepare(MODEL, 3)
    await pool
    await sink.prepare(MODEL, 3)
    await pool.close()
    with pytest.raises(SinkError, match="the pool is closed"):
        await sink.count()


def test_a_pool_of_another_event_loop_is_an_error(dsn: str) -> None:
    async def opened() -> Any:
        return await asyncpg.create_pool(dsn, min_size=1, max_size=1)

    with asyncio.Runner() as other:
        pool = other.run(opened())
        with asyncio.Runner() as here, pytest.raises(SinkError, match="belongs to another event loop"):
            here.run(PostgresSink(pool).prepare(MODEL, 3))
        other.run(pool.close())


async def test_a_refused_row_costs_a_pool_that_was_handed_in_no_connection(dsn: str) -> None:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        sink = PostgresSink(pool)
        await sink.prepare(MODEL, 8)
        refuse(dsn, "RAISE EXCEPTION 'no'")
        before = await pool.fetchval("SELECT pg_backend_pid()")
        assert list(await sink.write(MODEL, rows(10))) == ["id-00003"]
        assert await pool.fetchval("SELECT pg_backend_pid()") == before
        assert await pool.fetchval("SELECT '[1]'::vector") == "[1]"  # our codec is reset


async def test_the_apps_own_codecs_do_not_affect_ids(dsn: str) -> None:
    async def with_texts(connection: Any) -> None:
        await connection.set_type_codec("uuid", schema="pg_catalog", encoder=str, decoder=str)

    run_sql(dsn, "CREATE TABLE u (id uuid PRIMARY KEY, embedding vector(3), content_hash text)")
    columns = {"id": "id", "embedding": "embedding", "content_hash": "content_hash"}
    one = row("12345678-1234-5678-1234-567812345678")
    async with asyncpg.create_pool(dsn, min_size=0, init=with_texts) as pool:
        sink = PostgresSink(pool, table="u", columns=columns)
        assert await sink.write(MODEL, [one]) == {}
        assert await sink.existing(MODEL, hashes([one])) == {one.id}
        filling = PostgresSink(pool, table="u", columns=columns, update_only=True)
        assert await filling.write(MODEL, [one]) == {}


@pytest.mark.parametrize("timeout", [float("inf"), 3e6])
async def test_a_timeout_may_be_longer_than_the_servers_limit(dsn: str, timeout: float) -> None:
    async with PostgresSink(dsn, timeout=timeout) as sink:
        await sink.prepare(MODEL, 3)


@pytest.mark.parametrize("address", ["postgresql://u:[SECRET]@h/db", "postgresql://u:SE]CRET@h/db"])
def test_a_password_in_brackets_is_refused_and_in_no_context(address: str) -> None:
    with pytest.raises(AsyncEmbedError, match="%5B") as caught:
        PostgresSink(address)
    assert "SECRET" not in everything(caught.value)


async def test_values_that_the_driver_cannot_send_are_in_no_context(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row("a")])
        with pytest.raises(SinkError) as caught:
            await sink.search(
                vec(1, 2, 3), where="length(text) > $1", args=["".join(("TOP", "SECRET"))]
            )  # not as a traceback quotes it
    assert "TOPSECRET" not in everything(caught.value)
