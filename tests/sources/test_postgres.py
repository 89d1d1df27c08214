"""`PostgresSource`: rows become records on a real server; invalid queries, lost connections."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import traceback
import tracemalloc
from contextlib import aclosing
from typing import Any
from urllib.parse import quote, quote_plus

import asyncpg
import pytest

from asyncembed import Embedder, PostgresSink, PostgresSource, Record, ingest
from asyncembed.errors import ConfigError, InvalidRecordError, SourceError
from tests.fakes import FakeProvider
from tests.stores import run_sql


async def read(source: PostgresSource) -> list[Any]:
    return [item async for item in source]


def backends(dsn: str) -> list[Any]:
    """The queries of connections that read as a source does."""
    return run_sql(
        dsn,
        "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND (query LIKE '%docs%' OR query = 'COMMIT')",
    )


@pytest.fixture
def docs(dsn: str) -> str:
    run_sql(dsn, "CREATE TABLE docs (id int, text text)", "INSERT INTO docs VALUES (1, 'one'), (2, 'two')")
    return dsn


async def test_rows_become_records_with_their_other_columns_as_metadata(docs: str) -> None:
    query = "SELECT id, text, id * 10 AS ten FROM docs ORDER BY id"
    assert await read(PostgresSource(docs, query)) == [Record(1, "one", {"ten": 10}), Record(2, "two", {"ten": 20})]
    assert await read(PostgresSource(docs, "TABLE docs")) == [Record(1, "one"), Record(2, "two")]


async def test_a_query_may_have_parameters_and_columns_of_other_names(docs: str) -> None:
    source = PostgresSource(
        docs, "SELECT id AS key, text AS body FROM docs WHERE id > $1", args=[1], id_field="key", text_field="body"
    )
    assert await read(source) == [Record(2, "two")]


async def test_title_and_content_are_joined(dsn: str) -> None:
    query = "VALUES ('a', 'Title', 'Content'), ('b', NULL, 'Only')"
    source = PostgresSource(dsn, f"SELECT * FROM ({query}) AS docs(id, title, content)")
    assert await read(source) == [Record("a", "Title\nContent"), Record("b", "Only", {"title": None})]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("NULL::int", None),
        ("true", True),
        ("1.5::float8", 1.5),
        ("12.50::numeric", "12.50"),
        ("'2024-02-29'::date", "2024-02-29"),
        ("'2024-02-29 12:30:00.5'::timestamp", "2024-02-29T12:30:00.500000"),
        ("'2024-02-29 12:30:00Z'::timestamptz", "2024-02-29T12:30:00+00:00"),
        ("'12:30'::time", "12:30:00"),
        ("'90 minutes'::interval", 5400.0),
        ("'6f1ed002-ab8d-4a5e-8b3c-9d7f5d2f0c11'::uuid", "6f1ed002-ab8d-4a5e-8b3c-9d7f5d2f0c11"),
        ("'\\xdeadbeef'::bytea", "deadbeef"),
        ("ARRAY[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("ARRAY['2024-02-29'::date]", ["2024-02-29"]),
        ("'{\"a\": [1, null]}'::jsonb", {"a": [1, None]}),
        ("'\"text\"'::json", "text"),
        ("'10.0.0.1'::inet", "10.0.0.1"),
        ("'[1,2]'::public.vector", "[1,2]"),
        ("ROW(1, 'x'::text)", [1, "x"]),
        ("ROW(1, '2024-02-29')::pair", {"n": 1, "d": "2024-02-29"}),
        ("'(1, 2)'::point", [1.0, 2.0]),
    ],
)
async def test_every_kind_of_value_becomes_json(dsn: str, sql: str, expected: Any) -> None:
    run_sql(dsn, "CREATE TYPE pair AS (n int, d date)")
    embedder = Embedder("fake", provider=FakeProvider(latency_s=0))
    source = PostgresSource(dsn, f"SELECT 1 AS id, 'text' AS text, {sql} AS value")
    async with PostgresSink(dsn) as sink:
        await ingest(source, embedder, sink)
        [hit] = await sink.search([1.0] * 4)
    assert hit.metadata == {"value": expected}


async def test_an_object_in_a_column_metadata_is_spread_into_the_metadata(dsn: str) -> None:
    source = PostgresSource(dsn, """SELECT 1 AS id, 't' AS text, 2 AS n, '{"a": 1}'::jsonb AS metadata""")
    assert await read(source) == [Record(1, "t", {"n": 2, "a": 1})]


@pytest.mark.parametrize(
    ("id", "expected"),
    [("'a'", "a"), ("7", 7), ("7::numeric", "7"), ("'6f1ed002-ab8d-4a5e-8b3c-9d7f5d2f0c11'::uuid", None)],
)
async def test_every_kind_of_key_becomes_an_id(dsn: str, id: str, expected: Any) -> None:
    [record] = await read(PostgresSource(dsn, f"SELECT {id} AS id, 't' AS text"))
    assert record == Record(expected or "6f1ed002-ab8d-4a5e-8b3c-9d7f5d2f0c11", "t")


async def test_a_row_that_is_no_record_fails_alone_with_its_number_and_id(dsn: str) -> None:
    rows = "(1, 'good'), (2, NULL), (NULL, 'x'), (4, ''), (5, 'good')"
    items = await read(PostgresSource(dsn, f"SELECT * FROM (VALUES {rows}) AS docs(id, text)"))
    assert [item for item in items if isinstance(item, Record)] == [Record(1, "good"), Record(5, "good")]
    assert [(str(item), item.record_id) for item in items if isinstance(item, Exception)] == [
        ('row 2: field "text" is missing or null', 2),
        ('row 3: field "id" is missing or null; an id is a str or an int', None),
        ('row 4: field "text" is empty', 4),
    ]


# ---- the rows of a table that have no vector yet ----


async def test_rows_without_a_vector_are_filled_and_the_next_run_finds_none(dsn: str) -> None:
    run_sql(dsn, "CREATE TABLE docs (id int PRIMARY KEY, text text, v vector)")
    run_sql(dsn, "INSERT INTO docs SELECT n, 'text ' || n FROM generate_series(1, 2500) AS n")
    provider = FakeProvider(latency_s=0)
    source = PostgresSource(dsn, "SELECT id, text FROM docs WHERE v IS NULL")
    columns = {"id": "id", "embedding": "v"}
    async with PostgresSink(dsn, table="docs", columns=columns, update_only=True) as sink:
        first = await ingest(source, Embedder("fake", provider=provider, max_batch_size=100), sink)
        second = await ingest(source, Embedder("fake", provider=provider), sink)
    assert (first.success_count, second.seen, len(provider.requests)) == (2_500, 0, 25)
    assert run_sql(dsn, "SELECT count(*) FROM docs WHERE v IS NULL") == [(0,)]


# ---- memory, connections, pools ----


async def test_a_large_result_is_read_in_bounded_memory(dsn: str) -> None:
    query = "SELECT n AS id, repeat('x', 1000) || n AS text FROM generate_series(1, 30000) AS n"
    count = 0
    async for _ in PostgresSource(dsn, "SELECT 1 AS id, 'warm' AS text"):
        pass
    tracemalloc.start()
    try:
        async for _ in PostgresSource(dsn, query):
            count += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 30_000
    assert peak < 6_000_000  # of 30 MB


async def test_a_query_that_would_change_something_is_refused_by_the_server(docs: str) -> None:
    with pytest.raises((ConfigError, SourceError), match="read-only transaction"):
        await read(PostgresSource(docs, "DELETE FROM docs RETURNING id, text"))
    assert run_sql(docs, "SELECT count(*) FROM docs") == [(2,)]


async def test_leaving_early_leaves_no_connection(docs: str) -> None:
    source = PostgresSource(docs, "SELECT n AS id, 'x' AS text FROM docs, generate_series(1, 100000) AS n")
    async with aclosing(aiter(source)) as items:  # type: ignore[type-var]  # it is a generator
        async for _ in items:
            break
    while backends(docs):  # noqa: ASYNC110  # only the server knows
        await asyncio.sleep(0)


async def test_cancelled_at_any_step_leaves_no_connection_and_no_task(docs: str) -> None:
    source = PostgresSource(docs, "SELECT n AS id, 'x' AS text FROM docs, generate_series(1, 2000) AS n")
    for steps in range(0, 40, 2):
        task = asyncio.create_task(read(source))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert asyncio.all_tasks() == {asyncio.current_task()}
    while backends(docs):  # noqa: ASYNC110  # only the server knows
        await asyncio.sleep(0)


async def test_a_pool_that_was_handed_in_is_returned_unchanged(docs: str) -> None:
    async with asyncpg.create_pool(docs, min_size=1, max_size=1) as pool:
        source = PostgresSource(pool, "SELECT id, text FROM docs ORDER BY id")
        assert await read(source) == await read(source) == [Record(1, "one"), Record(2, "two")]
        async with aclosing(aiter(source)) as items:  # type: ignore[type-var]  # it is a generator
            async for _ in items:
                break
        assert await pool.fetchval("SHOW transaction_read_only") == "off"
        assert await pool.fetchval("SELECT count(*) FROM docs") == 2


# ---- errors ----


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT id FROM docs", "has the columns id; it needs id and text, or id, title and content"),
        ("SELECT text FROM docs", "has the columns text; it needs id and text"),
        ("SELECT id, id, text FROM docs", "has several columns named id: name them apart with AS"),
        ("SELECT id, text FROM nothing", 'relation "nothing" does not exist'),
        ("SELEKT", "syntax error"),
        ("SELECT id, text FROM docs; SELECT 1", "multiple commands"),
        ("SELECT id, text FROM docs WHERE id = $1", "has 1 parameters, and args= has 0 values"),
    ],
)
async def test_an_invalid_query_is_an_error_before_anything_is_paid(docs: str, query: str, message: str) -> None:
    provider = FakeProvider(latency_s=0)
    async with PostgresSink(docs) as sink:
        with pytest.raises(ConfigError, match=message):
            await ingest(PostgresSource(docs, query), Embedder("fake", provider=provider), sink)
    assert provider.requests == []


async def test_an_unreachable_server_is_a_config_error_without_the_password() -> None:
    source = PostgresSource("postgresql://me:s3cret@127.0.0.1:1/db", "SELECT 1 AS id, 'a' AS text")
    assert repr(source) == "PostgresSource(the query in db on 127.0.0.1:1)"
    with pytest.raises(ConfigError, match=r"the query in db on 127\.0\.0\.1:1.*cannot be reached") as caught:
        await source.check()
    assert "s3cret" not in str(caught.value)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(source)


async def test_a_lost_connection_ends_the_run_with_its_report_and_a_rerun_does_the_rest(docs: str) -> None:
    run_sql(docs, "INSERT INTO docs SELECT n, 'text ' || n FROM generate_series(3, 20000) AS n")
    provider = FakeProvider(latency_s=0)
    source = PostgresSource(docs, "SELECT id, text FROM docs")
    ended: list[Any] = []

    def end_the_source(progress: Any) -> None:
        if progress.done >= 1_000 and not ended:
            ended.extend(
                run_sql(
                    docs,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE query = 'SELECT id, text FROM docs' AND pid <> pg_backend_pid()",
                )
            )

    async with PostgresSink(docs) as sink:
        embedder = Embedder("fake", provider=provider, max_batch_size=100)
        with pytest.raises(SourceError, match="the query in") as caught:
            await ingest(source, embedder, sink, on_progress=end_the_source)
        report = caught.value.report
        assert ended == [(True,)]
        assert 1_000 <= report.success_count == await sink.count() < 20_000
        assert report.seen == report.success_count + report.failed_count
        again = await ingest(source, embedder, sink)
        assert again.success_count == 20_000 - report.success_count


async def test_a_row_that_cannot_be_computed_ends_the_run_and_is_not_quoted(docs: str) -> None:
    run_sql(docs, "INSERT INTO docs VALUES (3, 'a secret')")
    source = PostgresSource(docs, "SELECT id, CASE WHEN id = 3 THEN text::int::text ELSE text END AS text FROM docs")
    with pytest.raises(SourceError, match="SQLSTATE 22P02") as caught:
        await read(source)
    assert "secret" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        pytest.param("id = $1", "a secret", id="a text for a number"),
        pytest.param("text = $1", {"a secret": 1}, id="a dict for a text"),
        pytest.param("id = ANY($1)", ["a secret"], id="a text among numbers"),
    ],
)
async def test_a_value_that_the_driver_cannot_encode_is_not_quoted(docs: str, condition: str, value: Any) -> None:
    source = PostgresSource(docs, f"SELECT id, text FROM docs WHERE {condition}", args=[value])
    with pytest.raises(ConfigError, match=r"in the driver: look at .* args=") as caught:
        await read(source)
    assert "a secret" not in "".join(traceback.format_exception(caught.value))


# ---- addresses ----


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda query: query, id="as it is"),
        pytest.param(quote, id="percent-encoded"),
        pytest.param(quote_plus, id="form-encoded"),
    ],
)
async def test_the_query_in_an_address_may_be_plain_or_encoded(docs: str, write: Any) -> None:
    query = "SELECT id, text FROM docs WHERE text LIKE '%tw%' AND id & 2 = 2 AND 'a+b' <> '%41'"
    assert await read(PostgresSource.from_url(f"{docs}&query={write(query)}")) == [Record(2, "two")]


async def test_options_may_follow_an_encoded_query(docs: str) -> None:
    address, _, options = docs.partition("?")
    source = PostgresSource.from_url(f"{address}?query=TABLE%20docs&{options}")
    assert len(await read(source)) == 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("postgresql://me:s3cret@host/db", "needs a query"),
        ("postgresql://me:s3cret@host/db?query=", "the query is empty"),
        ("postgresql://me:s3/cret@host/db?query=TABLE docs", "the address is not"),
    ],
)
def test_an_invalid_address_is_refused_and_not_shown(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PostgresSource.from_url(address)
    assert "s3" not in str(caught.value)


async def test_a_source_that_is_neither_address_nor_pool_is_refused(docs: str) -> None:
    with pytest.raises(ConfigError, match="takes an address or an asyncpg Pool, not int"):
        PostgresSource(5, "TABLE docs")  # type: ignore[arg-type]  # that is the test


async def test_a_row_with_a_number_that_json_does_not_have_fails_alone(dsn: str) -> None:
    embedder = Embedder("fake", provider=FakeProvider(latency_s=0))
    rows = "(1, 'a', 'NaN'::float8), (2, 'b', 1.5)"
    source = PostgresSource(dsn, f"SELECT * FROM (VALUES {rows}) AS docs(id, text, value)")
    async with PostgresSink(dsn) as sink:
        report = await ingest(source, embedder, sink)
    assert (report.success_count, report.failed_ids) == (1, [1])
    assert isinstance(report.failures[0].error, InvalidRecordError)


def test_the_error_for_the_missing_postgres_extra_says_how_to_install_it() -> None:
    for wanted in ("asyncembed.open_sink('postgresql://h/d')", "asyncembed.PostgresSource"):
        code = f"import sys; sys.modules['asyncpg'] = None; import asyncembed; {wanted}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stderr.endswith(
            'ConfigError: PostgreSQL needs asyncpg and pgvector: pip install "asyncembed[postgres]"\n'
        )


@pytest.mark.parametrize("limit", ["statement_timeout", "transaction_timeout", "idle_in_transaction_session_timeout"])
async def test_the_limits_of_a_role_do_not_end_a_long_read(bare_dsn: str, limit: str) -> None:
    name = run_sql(bare_dsn, "SELECT current_database()")[0][0]
    run_sql(bare_dsn, f"ALTER DATABASE {name} SET {limit} = '200ms'")
    query = "SELECT n AS id, 'text' || pg_sleep(0.001) AS text FROM generate_series(1, 600) n"
    assert len(await read(PostgresSource(bare_dsn, query))) == 600


@pytest.mark.parametrize("value", ["'0044-03-15 BC'::date", "'24:00'::time"])
async def test_the_error_for_a_value_that_python_cannot_hold_says_what_to_do(dsn: str, value: str) -> None:
    source = PostgresSource(dsn, f"SELECT 1 AS id, 'a' AS text, {value} AS ides")
    with pytest.raises(SourceError, match="cast its column to text"):
        await read(source)
