"""Only in PostgreSQL: stored bytes, rights, the user's tables, indexes, pools that were handed in, addresses."""

from __future__ import annotations

import asyncio
import pickle
import traceback
from collections.abc import Callable
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
import pytest
from pgvector.asyncpg import register_vector

from asyncembed import Embedder, ingest
from asyncembed.errors import RowRefusedError, SinkConfigError, SinkError
from asyncembed.sinks import PostgresSink
from tests.fakes import FakeProvider
from tests.stores import address, run_sql

from .sink_rows import MODEL, hashes, nearest, row, rows, vec

UUIDS = [UUID(int=number) for number in (7, 3, 5)]


# ---- the stored rows ----


async def test_a_vector_is_stored_as_pgvector_stores_it(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row(7, vec(1, -2.5, 0.1), "text", '{"a": [1, null]}')])
    ((key, model, numbers, raw, digest, text, metadata),) = run_sql(
        dsn,
        "SELECT id, model, embedding::text, vector_send(embedding), content_hash, text, metadata::text FROM embeddings",
    )
    assert numbers == "[1,-2.5,0.1]"
    assert raw == bytes.fromhex("0003 0000 3f800000 c0200000 3dcccccd")  # size, unused, big-endian float32
    assert (key, model, text, metadata) == ("7", MODEL, "text", '{"a": [1, null]}')
    assert digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"  # printf text | sha256sum


async def test_a_replaced_row_keeps_its_created_at(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row("a")])
        run_sql(dsn, "UPDATE embeddings SET created_at = '2001-01-01', updated_at = '2001-01-01'")
        await sink.write(MODEL, [row("a", text="new")])
    assert run_sql(
        dsn, "SELECT extract(year FROM created_at)::int, extract(year FROM updated_at) > 2001 FROM embeddings"
    ) == [(2001, True)]


async def test_metadata_that_only_jsonb_refuses_is_refused_alone(dsn: str) -> None:
    # valid JSON, and stored by SQLite; a numeric has at most 131,072 digits before the point
    bad = row("bad", metadata='{"n": 1e140000}')
    async with PostgresSink(dsn) as sink:
        refused = await sink.write(MODEL, [*rows(50, dimensions=3), bad, *rows(90, dimensions=3)[50:]])
        assert list(refused) == ["bad"]
        assert await sink.count() == 90


async def test_a_row_that_a_trigger_refuses_is_refused_alone_and_its_text_is_not_shown(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        run_sql(
            dsn,
            """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.id IN ('id-00003', 'id-00077') THEN RAISE EXCEPTION 'no: %', NEW.text; END IF; RETURN NEW; END $$""",
            "CREATE TRIGGER refuse BEFORE INSERT ON embeddings FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        refused = await sink.write(MODEL, rows(100))
        assert set(refused) == {"id-00003", "id-00077"}
        for error in refused.values():
            assert isinstance(error, RowRefusedError)
            assert "text of" not in "".join(traceback.format_exception(error))
        assert await sink.count() == 98


# ---- extension, rights, tables ----


async def test_a_missing_extension_is_created_and_serves_the_same_sink(bare_dsn: str) -> None:
    async with PostgresSink(bare_dsn) as sink:
        with pytest.raises(SinkConfigError, match="ingest into it first"):
            await sink.count()
        await sink.prepare(MODEL, 8)
        await sink.write(MODEL, rows(3))
        assert await sink.count() == 3


async def test_an_extension_that_another_process_creates_meanwhile_serves_the_same_sink(bare_dsn: str) -> None:
    async with PostgresSink(bare_dsn) as sink:
        with pytest.raises(SinkConfigError, match="ingest into it first"):
            await sink.count()  # through a connection without the codec of pgvector
        run_sql(bare_dsn, "CREATE EXTENSION vector")
        await sink.prepare(MODEL, 8)
        await sink.write(MODEL, rows(3))
        assert await sink.count() == 3


async def test_many_processes_may_start_at_once_on_an_empty_database(bare_dsn: str) -> None:
    async def one(number: int) -> None:
        async with PostgresSink(bare_dsn) as sink:
            await sink.prepare(MODEL, 8)
            await sink.write(MODEL, rows(10))

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(one(number))
    assert run_sql(bare_dsn, "SELECT count(*) FROM embeddings") == [(10,)]


@pytest.fixture
def low_dsn(postgres: Any, bare_dsn: str) -> str:
    """The database of `bare_dsn` for a user without any rights of its own."""
    run_sql(
        bare_dsn,
        "DO $$ BEGIN CREATE ROLE low LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    )
    return bare_dsn.replace("postgres@", "low@")


async def test_the_error_for_a_user_who_may_not_create_the_extension_names_the_statement_to_run(low_dsn: str) -> None:
    async with PostgresSink(low_dsn) as sink:
        with pytest.raises(SinkConfigError, match=r"have an administrator run CREATE EXTENSION vector"):
            await sink.prepare(MODEL, 3)


async def test_missing_rights_to_create_the_table_are_an_error(low_dsn: str, bare_dsn: str) -> None:
    run_sql(bare_dsn, "CREATE EXTENSION vector")
    async with PostgresSink(low_dsn) as sink:
        with pytest.raises(SinkConfigError, match=r"permission denied for schema public .*rights"):
            await sink.prepare(MODEL, 3)


async def test_rights_on_the_rows_are_enough_if_the_tables_exist(low_dsn: str, bare_dsn: str) -> None:
    async with PostgresSink(bare_dsn) as sink:
        await sink.prepare(MODEL, None)
    run_sql(bare_dsn, "GRANT SELECT, INSERT, UPDATE, DELETE ON embeddings, asyncembed_models TO low")
    async with PostgresSink(low_dsn) as sink:
        await sink.prepare(MODEL, 8)
        assert await sink.write(MODEL, rows(3)) == {}
        assert len(await sink.search(rows(1)[0].vector)) == 3
        assert await sink.delete(["id-00001"], MODEL) == 1


async def test_the_extension_may_be_in_a_schema_outside_of_the_search_path(bare_dsn: str) -> None:
    run_sql(bare_dsn, 'CREATE SCHEMA "Ext Ra"', 'CREATE EXTENSION vector SCHEMA "Ext Ra"')
    stored = rows(40)
    async with PostgresSink(bare_dsn) as sink:
        await sink.prepare(MODEL, 8)
        await sink.write(MODEL, stored)
        await sink.create_index()
        hits = await sink.search(stored[3].vector, k=7)
    assert [hit.id for hit in hits] == nearest(stored, stored[3].vector, 7)


async def test_a_table_may_be_in_a_schema_and_have_any_plain_name(dsn: str) -> None:
    schema = dsn.rpartition("=")[2].partition(",")[0]
    async with PostgresSink(dsn, table=f"{schema}.Select") as sink:
        await sink.write(MODEL, rows(2))
        await sink.create_index()
    assert run_sql(dsn, 'SELECT count(*) FROM "Select"') == [(2,)]


async def test_the_error_for_a_missing_schema_names_it(dsn: str) -> None:
    async with PostgresSink(dsn, table="nowhere.docs") as sink:
        with pytest.raises(SinkConfigError, match=r'table \'nowhere.docs\' in .* schema "nowhere" does not exist'):
            await sink.prepare(MODEL, 3)


@pytest.mark.parametrize("table", ["a.b.c", 'x".y', "a.", "public.asyncembed_models"])
def test_a_table_name_that_is_not_a_plain_identifier_in_a_schema_is_refused(table: str) -> None:
    with pytest.raises(SinkConfigError, match="name"):
        PostgresSink("postgresql://localhost/db", table=table)


@pytest.mark.parametrize(
    ("ddl", "complaint"),
    [
        pytest.param("CREATE TABLE embeddings (id text)", r"has no columns \['content_hash', ", id="other columns"),
        pytest.param("CREATE VIEW embeddings AS SELECT 1 AS id", r"has no columns", id="a view"),
        pytest.param(
            "CREATE TABLE embeddings (id text, model text, embedding vector(3), content_hash text, text text, "
            "metadata jsonb, created_at timestamptz, updated_at timestamptz)",
            r"no unique index on exactly \(id, model\)",
            id="no key",
        ),
        pytest.param(
            "CREATE TABLE embeddings (id text, model text, embedding real[], content_hash bytea, text text, "
            "metadata json, created_at timestamptz, updated_at timestamptz, lang text NOT NULL, UNIQUE (model, id))",
            r"embedding is real\[\], not vector .* content_hash is bytea, not text; metadata is json, not jsonb; "
            r"lang must be given",
            id="other types",
        ),
        pytest.param(
            "CREATE TABLE embeddings (id date, model text, embedding vector, content_hash text, text text, "
            "metadata jsonb, created_at timestamptz, updated_at timestamptz, PRIMARY KEY (id, model))",
            r"id is date, not a text, an integer or a uuid",
            id="an id of another type",
        ),
        pytest.param(
            "CREATE TABLE embeddings (id text, model text, embedding vector, content_hash text, text text, "
            "metadata jsonb, created_at timestamptz, updated_at timestamptz, "
            "UNIQUE (id, model) DEFERRABLE INITIALLY DEFERRED)",
            "no unique index",
            id="a key that ON CONFLICT cannot use",
        ),
    ],
)
async def test_a_table_that_does_not_fit_is_refused_with_all_problems(dsn: str, ddl: str, complaint: str) -> None:
    run_sql(dsn, ddl)
    async with PostgresSink(dsn) as sink:
        with pytest.raises(SinkConfigError, match=complaint):
            await sink.prepare(MODEL, 3)


async def test_a_column_of_another_size_is_refused_before_anything_is_paid(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, None)
        run_sql(dsn, "ALTER TABLE embeddings ALTER embedding TYPE vector(3)")
        with pytest.raises(SinkConfigError, match="3 dimensions for model 'model-a', and these have 1536"):
            await sink.prepare(MODEL, 1_536)


async def test_more_dimensions_than_pgvector_stores_are_refused(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        with pytest.raises(SinkConfigError, match="up to 16000 dimensions; 'model-a' has 16001"):
            await sink.prepare(MODEL, 16_001)


async def test_a_table_that_vanishes_is_an_error_and_created_again_by_the_next_prepare(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, rows(1))
        run_sql(dsn, "DROP TABLE embeddings")
        with pytest.raises(SinkConfigError, match=r"table .embeddings. in .* does not exist: ingest"):
            await sink.write(MODEL, rows(1))
        await sink.prepare(MODEL, 8)
        await sink.write(MODEL, rows(2))
        assert await sink.count() == 2


# ---- the user's tables ----

SECTIONS = {"id": "section_id", "model": "model_name", "embedding": "embedding", "created_at": "created_at"}


def section_table(id_type: str) -> str:
    return (
        f"CREATE TABLE section_embeddings (section_id {id_type} NOT NULL, embedding vector(3) NOT NULL, "
        "model_name text NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), UNIQUE (section_id, model_name))"
    )


@pytest.mark.parametrize(
    ("id_type", "ids"),
    [
        ("bigint", [2**63 - 1, -5, 10]),
        ("integer", [3, 1, 2]),
        ("uuid", UUIDS),
        ("text", ["c", "a", "b"]),
        ("varchar(5)", ["c", "a", "b"]),
    ],
)
async def test_the_users_table_is_filled_and_searched_by_its_own_names(dsn: str, id_type: str, ids: Any) -> None:
    run_sql(dsn, section_table(id_type))
    stored = [row(id, vec(1, number, 0)) for number, id in enumerate(ids)]
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        await sink.prepare(MODEL, 3)
        assert await sink.write(MODEL, stored) == {}
        run_sql(dsn, "UPDATE section_embeddings SET created_at = '2001-01-01'")
        assert await sink.write(MODEL, stored) == {}
        assert await sink.existing(MODEL, hashes([*stored, row(99), row("no id of that kind")])) == set(ids)
        hits = await sink.search(vec(1, 0, 0))
        assert [(hit.id, hit.text, hit.metadata) for hit in hits] == [(str(id), None, None) for id in ids]
        assert {id async for id in sink.ids(MODEL)} == {str(id) for id in ids}
        assert (await sink.models(), await sink.count()) == ({MODEL: 3}, 3)
        assert await sink.delete(ids[:1], MODEL) == 1
    assert run_sql(dsn, "SELECT DISTINCT extract(year FROM created_at)::int, model_name FROM section_embeddings") == [
        (2001, MODEL)
    ]


async def test_ids_that_the_column_cannot_hold_are_refused_alone(dsn: str) -> None:
    run_sql(dsn, section_table("integer"))
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        refused = await sink.write(MODEL, [row(1), row("x"), row(2**31), row("٣"), row("1_0"), row(2)])
        assert set(refused) == {"x", 2**31, "٣", "1_0"}
        assert [id async for id in sink.ids(MODEL)] == ["1", "2"]


@pytest.mark.parametrize(
    ("id_type", "good", "bad", "words"),
    [
        ("bigint", [1, "-7"], ["seven", 2**63], "it is no bigint"),
        ("uuid", [UUIDS[0]], ["seven", 5], "it is no uuid"),
        ("text", ["seven", 5], [], ""),
    ],
)
async def test_ids_that_the_column_cannot_hold_are_not_paid_for(
    dsn: str, id_type: str, good: list[Any], bad: list[Any], words: str
) -> None:
    run_sql(dsn, section_table(id_type))
    provider = FakeProvider(latency_s=0)
    embedder = Embedder("fake", provider=provider)
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        run_sql(dsn, "ALTER TABLE section_embeddings ALTER embedding TYPE vector(4)")
        report = await ingest([(id, f"text of {id}") for id in (*bad, *good)], embedder, sink)
        assert report.failed_ids == bad
        assert all(words in str(failure.error) for failure in report.failures)
        assert [text for request in provider.requests for text in request] == [f"text of {id}" for id in good]
        assert report.success_count == await sink.count() == len(good)


async def test_two_spellings_of_one_id_are_one_row(dsn: str) -> None:
    run_sql(dsn, section_table("uuid"))
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        await sink.write(MODEL, [row(UUIDS[0], vec(1, 0, 0)), row(str(UUIDS[0]).upper(), vec(0, 1, 0))])
        assert await sink.existing(MODEL, {str(UUIDS[0]).upper(): ""}) == {str(UUIDS[0]).upper()}
    assert run_sql(dsn, "SELECT embedding::text FROM section_embeddings") == [("[0,1,0]",)]


@pytest.mark.parametrize("when", ["", " DEFERRABLE INITIALLY DEFERRED"], ids=["at once", "at the commit"])
async def test_a_row_without_its_section_is_refused_alone(dsn: str, when: str) -> None:
    run_sql(
        dsn,
        "CREATE TABLE sections (id bigint PRIMARY KEY)",
        "INSERT INTO sections SELECT generate_series(1, 60)",
        section_table(f"bigint REFERENCES sections{when}"),
    )
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        refused = await sink.write(MODEL, [row(number) for number in (*range(1, 61), 99)])
        assert str(refused[99]).endswith(
            "ForeignKeyViolationError of constraint 'section_embeddings_section_id_fkey' (SQLSTATE 23503)"
        )
        assert (set(refused), await sink.count()) == ({99}, 60)


async def test_the_users_table_is_created_with_its_names_if_it_is_missing(dsn: str) -> None:
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        await sink.prepare(MODEL, 3)
        await sink.write(MODEL, [row("a")])
    assert run_sql(dsn, "SELECT section_id, model_name, embedding::text FROM section_embeddings") == [
        ("a", MODEL, "[1,2,3]")
    ]
    assert run_sql(dsn, "SELECT to_regclass('asyncembed_models')") == [(None,)]


async def test_a_table_without_a_column_for_the_model_holds_one_size(dsn: str) -> None:
    columns = {"id": "id", "embedding": "v", "content_hash": "hash", "updated_at": "changed"}
    async with PostgresSink(dsn, table="plain", columns=columns) as sink:
        await sink.prepare(MODEL, 3)
        await sink.write(MODEL, [row("a"), row("b", vec(3, 2, 1))])
        assert await sink.existing(MODEL, hashes([row("a"), row("b", text="changed")])) == {"a"}
        assert [hit.id for hit in await sink.search(vec(3, 2, 1), model="whatever it was")] == ["b", "a"]
        assert (await sink.models(), await sink.count("x")) == ({"": 3}, 2)
        with pytest.raises(SinkConfigError, match="3 dimensions"):
            await sink.prepare("other", 4)


async def test_an_untyped_column_in_the_users_table_keeps_the_size_of_its_rows(dsn: str) -> None:
    run_sql(dsn, section_table("text").replace("vector(3)", "vector"))
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        await sink.write("old", rows(2, dimensions=4))
        await sink.write("new", rows(2, dimensions=6))
        assert await sink.models() == {"old": 4, "new": 6}
        for attempt in (sink.write("old", rows(1, dimensions=6)), sink.prepare("new", 4)):
            with pytest.raises(SinkConfigError, match="dimensions"):
                await attempt


@pytest.mark.parametrize(
    "columns",
    [{"id": "a"}, {"id": "a", "embedding": "b", "vector": "c"}, {"id": "a b", "embedding": "c"}, {}],
    ids=["no embedding", "an unknown role", "a name with a space", "nothing"],
)
def test_invalid_columns_are_refused(columns: dict[str, str]) -> None:
    with pytest.raises(SinkConfigError, match="column"):
        PostgresSink("postgresql://localhost/db", columns=columns)


async def test_a_row_that_overflows_half_precision_is_refused_alone(dsn: str) -> None:
    run_sql(dsn, section_table("text").replace("vector(3)", "halfvec(3)"))
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        refused = await sink.write(MODEL, [row("a", vec(1, 2, 65_504)), row("b", vec(1, 2, 70_000)), row("c")])
        assert list(refused) == ["b"]
        await sink.create_index()
        assert [hit.id for hit in await sink.search(vec(1, 2, 3))] == ["c", "a"]


# ---- filling rows that exist ----

FILL = {"id": "id", "embedding": "embedding", "text": "body"}


@pytest.fixture
def articles(dsn: str) -> str:
    run_sql(
        dsn,
        "CREATE TABLE articles (id bigint PRIMARY KEY, body text, embedding vector(3))",
        "INSERT INTO articles SELECT n, 'body ' || n FROM generate_series(1, 5) n",
    )
    return dsn


async def test_existing_rows_are_filled_and_none_is_added(articles: str) -> None:
    columns = {"id": "id", "embedding": "embedding"}
    async with PostgresSink(articles, table="articles", columns=columns, update_only=True) as sink:
        await sink.prepare(MODEL, 3)
        assert await sink.existing(MODEL, {1: "", 2: ""}) == set()
        refused = await sink.write(MODEL, [row(2), row(99), row(1)])
        assert list(refused) == [99]
        assert "is not in table 'articles'" in str(refused[99])
        assert await sink.existing(MODEL, {1: "", 2: "", 3: ""}) == {1, 2}
        assert await sink.delete([1, 3], MODEL) == 1
    assert run_sql(articles, "SELECT id, body, embedding::text FROM articles ORDER BY id") == [
        (1, "body 1", None),
        (2, "body 2", "[1,2,3]"),
        *((number, f"body {number}", None) for number in (3, 4, 5)),
    ]


async def test_a_table_that_is_only_filled_is_not_created(dsn: str) -> None:
    async with PostgresSink(dsn, table="articles", columns=FILL, update_only=True) as sink:
        with pytest.raises(SinkConfigError, match="does not exist, and update_only= fills only rows that exist"):
            await sink.prepare(MODEL, 3)


def test_update_only_needs_columns() -> None:
    with pytest.raises(SinkConfigError, match="update_only needs columns="):
        PostgresSink("postgresql://localhost/db", update_only=True)


# ---- search and indexes ----


async def with_languages(sink: PostgresSink) -> None:
    for lang in "ab":
        some = [row(f"{lang}-{n}", vec(1, n, 0), metadata=f'{{"lang": "{lang}", "n": {n}}}') for n in range(5)]
        await sink.write(MODEL, some)


async def test_a_search_may_be_limited_by_metadata(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await with_languages(sink)
        assert [hit.id for hit in await sink.search(vec(1, 0, 0), k=2, where={"lang": "b"})] == ["b-0", "b-1"]
        assert [hit.id for hit in await sink.search(vec(1, 0, 0), where={"lang": "a", "n": 3})] == ["a-3"]
        assert await sink.search(vec(1, 0, 0), where={"lang": "'; DROP TABLE embeddings; --"}) == []


async def test_a_search_may_be_limited_by_sql_whose_values_are_parameters(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await with_languages(sink)
        hits = await sink.search(
            vec(1, 0, 0), where="metadata->>'lang' = $1 AND (metadata->'n')::int > $2 OR id = $3", args=["b", 3, "a-0"]
        )
        assert [hit.id for hit in hits] == ["a-0", "b-4"]
        with pytest.raises(SinkConfigError, match='column "missing" does not exist'):
            await sink.search(vec(1, 0, 0), where="missing = 1")


async def test_a_condition_on_metadata_needs_a_metadata_column(dsn: str) -> None:
    run_sql(dsn, section_table("text"))
    async with PostgresSink(dsn, table="section_embeddings", columns=SECTIONS) as sink:
        await sink.write(MODEL, [row("a")])
        with pytest.raises(SinkConfigError, match="no column for metadata"):
            await sink.search(vec(1, 2, 3), where={"lang": "b"})


async def until_an_index_was_used(dsn: str) -> None:
    used = "SELECT coalesce(sum(idx_scan), 0) > 0 FROM pg_stat_user_indexes WHERE indexrelname ~ 'hnsw'"
    while run_sql(dsn, used) != [(True,)]:  # noqa: ASYNC110  # backends report it when they end, or a moment later
        await asyncio.sleep(0)


@pytest.mark.parametrize("dimensions", [8, 2_100], ids=["vector", "halfvec beyond 2,000 dimensions"])
async def test_an_index_is_used_and_finds_the_rows_of_the_exact_search(dsn: str, dimensions: int) -> None:
    stored = rows(200, dimensions)
    async with PostgresSink(dsn) as sink:
        await sink.write("other", rows(20, dimensions=5))
        await sink.write(MODEL, stored)
        exact = await sink.search(stored[5].vector, k=10, model=MODEL)
        await sink.create_index(MODEL)
        await sink.create_index(MODEL)
    async with PostgresSink(f"{dsn}&enable_seqscan=off&enable_sort=off") as sink:
        found = await sink.search(stored[5].vector, k=10, model=MODEL)
    assert [hit.id for hit in exact] == nearest(stored, stored[5].vector, 10)
    assert found == exact
    await until_an_index_was_used(dsn)


async def test_a_pool_with_cached_plans_uses_the_index_too(dsn: str) -> None:
    settings = "&enable_seqscan=off&enable_sort=off&plan_cache_mode=force_generic_plan"
    async with asyncpg.create_pool(f"{dsn}{settings}", min_size=0, max_size=1) as pool, PostgresSink(pool) as sink:
        await sink.write(MODEL, rows(50))
        await sink.create_index()
        await sink.search(rows(1)[0].vector)
    await until_an_index_was_used(dsn)


async def test_a_search_by_index_returns_k_hits_even_if_few_rows_fulfil_its_condition(dsn: str) -> None:
    flags = ('{"rare": true}', *['{"rare": false}'] * 99)
    stored = [row(one.id, one.vector, metadata=flags[n % 100]) for n, one in enumerate(rows(2_000))]
    async with PostgresSink(f"{dsn}&enable_seqscan=off&enable_sort=off") as sink:
        await sink.write(MODEL, stored)
        await sink.create_index(m=4, ef_construction=16)
        hits = await sink.search(stored[1].vector, k=10, where={"rare": True})
    assert len(hits) == 10


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
async def test_an_index_is_built_for_each_metric(dsn: str, metric: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write("it's a \\ model", rows(3))
        await sink.create_index(metric=metric)
    ((definition,),) = run_sql(
        dsn, "SELECT indexdef FROM pg_indexes WHERE indexdef ~ 'hnsw' AND tablename = 'embeddings'"
    )
    operators = {"cosine": "vector_cosine_ops", "inner_product": "vector_ip_ops", "l2": "vector_l2_ops"}[metric]
    assert f"(((embedding)::vector(8)) {operators})" in definition
    assert "it''s a" in definition


async def test_an_index_whose_build_was_interrupted_is_built_again(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, rows(3))
        await sink.create_index()
        run_sql(dsn, "UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text ~ 'hnsw'")
        await sink.create_index()
    assert run_sql(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid::regclass::text ~ 'hnsw'") == [(True,)]


async def test_an_impossible_index_is_refused_with_advice(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 4_001)
        with pytest.raises(SinkConfigError, match="is empty: load it first"):
            await sink.create_index()
        await sink.write(MODEL, rows(1, dimensions=4_001))
        with pytest.raises(SinkConfigError, match=r"indexes up to 4000 dimensions; 'model-a' has 4001: ask the model"):
            await sink.create_index()
        with pytest.raises(SinkConfigError, match="metric 'cosin' is none of"):
            await sink.create_index(metric="cosin")


async def test_the_error_for_an_index_over_a_partitioned_table_contains_the_statement_to_run(dsn: str) -> None:
    table = "CREATE TABLE parted (id text, model text, embedding vector(3), PRIMARY KEY (id, model))"
    run_sql(dsn, f"{table} PARTITION BY HASH (id)")
    for number in range(2):
        run_sql(dsn, f"CREATE TABLE part_{number} PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER {number})")
    async with PostgresSink(dsn, table="parted", columns={name: name for name in ("id", "model", "embedding")}) as sink:
        await sink.write(MODEL, [row(str(number), vec(1, number, 0)) for number in range(20)])
        with pytest.raises(SinkConfigError, match=r"parted.* is partitioned") as caught:
            await sink.create_index()
        run_sql(dsn, str(caught.value).rpartition("yourself: ")[2])
        assert [hit.id for hit in await sink.search(vec(1, 0, 0), k=3)] == ["0", "1", "2"]


# ---- pools that were handed in ----


async def test_a_pool_that_was_handed_in_is_neither_closed_nor_changed(dsn: str) -> None:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        async with PostgresSink(pool) as sink:
            await sink.prepare(MODEL, 8)
            for _ in range(8):  # PostgreSQL makes a general plan of a cached statement after five executions
                await sink.write(MODEL, rows(5))
                assert len(await sink.search(rows(1)[0].vector)) == 5
                assert pool.get_idle_size() == 1
        assert not pool.is_closing()
        assert isinstance(await pool.fetchval("SELECT embedding FROM embeddings LIMIT 1"), str)


async def test_the_codec_of_a_pool_that_was_handed_in_is_queried_once(dsn: str) -> None:
    queries: list[str] = []

    async def init(connection: Any) -> None:
        connection.add_query_logger(lambda record: queries.append(record.query))

    async with asyncpg.create_pool(dsn, min_size=1, max_size=1, init=init) as pool, PostgresSink(pool) as sink:
        for _ in range(3):
            assert await sink.write(MODEL, rows(5)) == {}
        assert sum("SELECT '[1]'::" in query for query in queries) == 1
        assert sum(query.startswith("INSERT INTO") for query in queries) >= 3


async def test_the_codecs_of_a_pool_that_was_handed_in_do_not_matter(dsn: str) -> None:
    async def init(connection: Any) -> None:
        await register_vector(connection)
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(kind, encoder=repr, decoder=len, schema="pg_catalog")

    async with asyncpg.create_pool(dsn, min_size=0, init=init) as pool, PostgresSink(pool) as sink:
        await sink.write(MODEL, [row("a", metadata='{"a": 1}')])
        (hit,) = await sink.search(vec(1, 2, 3), where={"a": 1})
        assert hit.metadata == {"a": 1}
        assert not isinstance(await pool.fetchval("SELECT embedding FROM embeddings"), str)


async def test_a_refused_row_does_not_leave_a_pool_that_was_handed_in_with_our_codec(dsn: str) -> None:
    run_sql(dsn, section_table("text").replace("NOT NULL,", "NOT NULL CHECK (section_id <> 'bad'),", 1))
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
        async with PostgresSink(pool, table="section_embeddings", columns=SECTIONS) as sink:
            assert list(await sink.write(MODEL, [row("a"), row("bad")])) == ["bad"]
        assert isinstance(await pool.fetchval("SELECT embedding FROM section_embeddings"), str)


async def test_the_error_for_a_codec_that_cannot_encode_arrays_names_the_pool_and_no_row(dsn: str) -> None:
    async def init(connection: Any) -> None:
        await connection.set_type_codec("vector", encoder=str.upper, decoder=len, schema="public")

    async with asyncpg.create_pool(dsn, min_size=0, init=init) as pool, PostgresSink(pool) as sink:
        with pytest.raises(SinkConfigError, match="the codecs of a pool handed in"):
            await sink.write(MODEL, rows(3))
        assert await sink.count() == 0


async def test_a_connection_instead_of_a_pool_is_refused(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    with pytest.raises(SinkConfigError, match=r"an address or an asyncpg\.Pool, not a Connection"):
        PostgresSink(connection)
    await connection.close()


async def test_a_pool_that_was_closed_is_an_error(dsn: str) -> None:
    pool = await asyncpg.create_pool(dsn, min_size=0)
    await pool.close()
    with pytest.raises(SinkError, match="pool is closed"):
        await PostgresSink(pool, retry_for=0).count()


# ---- addresses and secrets ----


@pytest.fixture
def guarded(postgres: Any) -> str:
    """A user whose password has special characters; returns it encoded."""
    run_sql(
        address(postgres, "postgres"),
        "DO $$ BEGIN CREATE ROLE guarded LOGIN PASSWORD 'p/w#?@:%41'; "
        "EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    )
    return "p%2Fw%23%3F%40%3A%2541"


async def test_a_password_with_every_special_character_works_when_it_is_encoded(dsn: str, guarded: str) -> None:
    async with PostgresSink(dsn.replace("postgres@", f"guarded:{guarded}@")) as sink:
        with pytest.raises(SinkConfigError, match="permission denied"):
            await sink.prepare(MODEL, 3)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda dsn: dsn.replace("postgres@", "guarded:SECRET@"), id="wrong password"),
        pytest.param(lambda dsn: dsn.replace("postgres@", "unknown:SECRET@"), id="unknown user"),
        pytest.param(lambda dsn: dsn.replace("s@/shared", "s:SECRET@/nothing"), id="unknown database"),
        pytest.param(lambda dsn: "postgresql://u:SECRET@127.0.0.1:1/db", id="no server"),
        pytest.param(lambda dsn: "postgresql://u:SECRET@no.such.host.invalid/db", id="no such host"),
        pytest.param(lambda dsn: "postgresql://u:pw@h/db?sslmode=SECRET", id="an unknown option"),
    ],
)
async def test_a_wrong_address_is_an_error_at_once_and_without_the_password(
    dsn: str, guarded: str, change: Callable[[str], str]
) -> None:
    async with PostgresSink(change(dsn)) as sink:
        with pytest.raises(SinkConfigError) as caught:
            await sink.prepare(MODEL, 3)
        assert "table 'embeddings' in " in str(caught.value)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value)) + repr(sink) + repr(vars(caught.value))


@pytest.mark.parametrize("password", ["SEC/RET", "SEC#RET", "SEC?RET", "SEC@RET", "1?SECRET"])
def test_a_password_that_is_not_encoded_is_refused_without_being_shown(password: str) -> None:
    with pytest.raises(SinkConfigError, match="write / as %2F") as caught:
        PostgresSink(f"postgresql://user:{password}@host/db")
    assert "SEC" not in str(caught.value)
    assert "RET" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://u:p:w@h/db",
        "postgres://h1:1,h2:2/db",
        "postgresql://[::1]:5433/db",
        "postgresql:///db?host=/run/pg",
        "postgresql://",
    ],
)
def test_every_kind_of_address_that_asyncpg_takes_is_accepted(address: str) -> None:
    assert "PostgresSink(table 'embeddings' in " in repr(PostgresSink(address))


def test_a_sink_shows_its_database_but_not_its_password() -> None:
    sink = PostgresSink("postgresql://user:SECRET@db.example:5433/docs?sslmode=require", table="t")
    assert repr(sink) == "PostgresSink(table 't' in docs on db.example:5433)"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(sink)


@pytest.mark.parametrize("option", [{"pool_size": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"retry_for": -1}])
def test_invalid_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(SinkConfigError, match=next(iter(option))):
        PostgresSink("postgresql://localhost/db", **option)


async def test_numpy_arrays_of_any_kind_become_the_same_bytes(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, [row("a", np.array([1.5, -2.0], ">f4")), row("b", np.array([1.5, 0, -2.0])[::2])])
    assert run_sql(dsn, "SELECT DISTINCT embedding::text FROM embeddings") == [("[1.5,-2]",)]
