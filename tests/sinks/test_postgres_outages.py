"""The PostgreSQL sink in trouble: locks, deadlocks, lost connections and answers, restarts, black holes, full pools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest

from asyncembed.errors import SinkBusyError, SinkConfigError, SinkError
from asyncembed.sinks import PostgresSink
from tests.stores import address, control, run_sql

from .proxy import Pooler, Proxy
from .sink_rows import MODEL, hashes, row, rows


@pytest.fixture
def socket(postgres: Any) -> Path:
    folder: Path = postgres.get_postmaster_info().socket_dir
    return folder / ".s.PGSQL.5432"


@pytest.fixture
async def proxy(socket: Path) -> AsyncIterator[Proxy]:
    async with Proxy(socket) as proxy:
        yield proxy


def through(stand_in: Proxy | Pooler, dsn: str) -> str:
    """The address of the same database through the stand-in."""
    return f"postgresql://postgres@127.0.0.1:{stand_in.port}/shared?search_path={dsn.rpartition('=')[2]}"


def fails_first(dsn: str, times: int, sqlstate: str) -> None:
    """Create a trigger that fails the first inserts; a sequence counts them, since it is not rolled back."""
    run_sql(
        dsn,
        "CREATE SEQUENCE tries",
        f"""CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('tries') <= {times} THEN RAISE EXCEPTION 'injected' USING ERRCODE = '{sqlstate}'; END IF;
        RETURN NULL; END $$""",
        "CREATE TRIGGER fail BEFORE INSERT ON embeddings FOR EACH STATEMENT EXECUTE FUNCTION fail()",
    )


# ---- errors that may pass ----


@pytest.mark.parametrize(
    "sqlstate",
    ["40001", "40P01", "55P03", "57014", "57P01", "53300", "25006", "08006"],
)
async def test_an_error_that_may_pass_is_retried(dsn: str, sqlstate: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        fails_first(dsn, 2, sqlstate)
        assert await sink.write(MODEL, rows(5)) == {}
        assert await sink.count() == 5


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [("40P01", SinkError), ("55P03", SinkBusyError), ("53300", SinkBusyError)],
)
async def test_an_error_that_does_not_pass_ends_the_write_with_nothing_stored(
    dsn: str, sqlstate: str, kind: type[SinkError]
) -> None:
    async with PostgresSink(dsn, retry_for=0.3) as sink:
        await sink.prepare(MODEL, 8)
        fails_first(dsn, 1_000, sqlstate)
        with pytest.raises(kind, match=rf"\(SQLSTATE {sqlstate}\); given up after trying for 0\.3 s") as caught:
            await sink.write(MODEL, rows(5))
        assert type(caught.value) is kind
        assert await sink.count() == 0
        assert run_sql(dsn, "SELECT last_value > 2 FROM tries") == [(True,)]


@pytest.mark.parametrize(("sqlstate", "hint"), [("53100", "its disk is full"), ("XX001", "XX001")])
async def test_an_error_that_will_not_pass_is_not_retried(dsn: str, sqlstate: str, hint: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        fails_first(dsn, 1_000, sqlstate)
        with pytest.raises(SinkError, match=hint):
            await sink.write(MODEL, rows(5))
    assert run_sql(dsn, "SELECT last_value FROM tries") == [(1,)]


async def test_eight_writers_of_the_same_ids_in_any_order_do_not_deadlock(dsn: str) -> None:
    stored = rows(200)
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    (before,) = run_sql(dsn, deadlocks)
    async with PostgresSink(dsn, pool_size=8, retry_for=0) as sink:
        await sink.prepare(MODEL, 8)

        async def one_writer(seed: int) -> None:
            for turn in range(5):
                order = np.random.default_rng((seed, turn)).permutation(200)
                assert await sink.write(MODEL, [stored[place] for place in order]) == {}

        async with asyncio.TaskGroup() as group:
            for seed in range(8):
                group.create_task(one_writer(seed))
        assert await sink.existing(MODEL, hashes(stored)) == {one.id for one in stored}
    assert run_sql(dsn, deadlocks) == [before]


async def test_several_fillers_of_the_same_rows_do_not_deadlock(dsn: str) -> None:
    run_sql(
        dsn,
        "CREATE TABLE articles (id bigint PRIMARY KEY, embedding vector(3))",
        "INSERT INTO articles SELECT generate_series(1, 100)",
    )
    columns = {"id": "id", "embedding": "embedding"}
    async with PostgresSink(dsn, table="articles", columns=columns, update_only=True, retry_for=0) as sink:
        await sink.prepare(MODEL, 3)
        async with asyncio.TaskGroup() as group:
            for seed in range(4):
                order = np.random.default_rng(seed).permutation(100) + 1
                group.create_task(sink.write(MODEL, [row(int(id)) for id in order]))
        assert await sink.count() == 100


async def test_only_one_of_several_writers_with_different_sizes_for_a_new_model_wins(dsn: str) -> None:
    outcomes: list[str] = []

    async def one_writer(dimensions: int) -> None:
        async with PostgresSink(dsn) as sink:
            await sink.prepare(MODEL, None)
            try:
                await sink.write(MODEL, [row(f"{dimensions}-{n}", np.ones(dimensions, np.float32)) for n in range(20)])
            except SinkConfigError:
                outcomes.append("refused")
            else:
                outcomes.append("stored")

    async with asyncio.TaskGroup() as group:
        for dimensions in (3, 4, 5):
            group.create_task(one_writer(dimensions))
    assert sorted(outcomes) == ["refused", "refused", "stored"]
    assert run_sql(dsn, "SELECT count(DISTINCT vector_dims(embedding)), count(*) FROM embeddings") == [(1, 20)]


async def test_another_size_waits_for_the_first_rows_of_a_new_model(dsn: str) -> None:
    async with PostgresSink(dsn) as sink, PostgresSink(dsn) as other:
        await sink.prepare(MODEL, 8)
        async with a_batch_in_the_middle(dsn, sink, lock="SHARE") as writing:  # its size is recorded, its rows wait
            late = asyncio.create_task(other.prepare(MODEL, 4))
            while not late.done() and not run_sql(dsn, f"SELECT 1 FROM {WAITING_FOR_SIZE}"):  # noqa: ASYNC110  # only the server knows
                await asyncio.sleep(0)
        assert await writing == {}
        with pytest.raises(SinkConfigError, match="8 dimensions for model 'model-a', and these have 4"):
            await late


WAITING_FOR_SIZE = "pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'asyncembed_models'"


# ---- lost connections, lost answers ----


@asynccontextmanager
async def a_batch_in_the_middle(
    dsn: str, sink: PostgresSink, lock: str = "ACCESS EXCLUSIVE"
) -> AsyncIterator[asyncio.Task[Any]]:
    """A write of 50 rows that waits for a lock inside its transaction."""
    async with (
        asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool,
        pool.acquire() as blocker,
        blocker.transaction(),
    ):
        await blocker.execute(f"LOCK TABLE embeddings IN {lock} MODE")
        writing = asyncio.create_task(sink.write(MODEL, rows(50)))
        while not run_sql(dsn, f"SELECT 1 FROM {WAITING}"):  # noqa: ASYNC110  # only the server knows
            await asyncio.sleep(0)
        yield writing


WAITING = "pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'INSERT INTO%'"


async def test_a_write_survives_the_end_of_its_backend_during_a_statement(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        async with a_batch_in_the_middle(dsn, sink) as writing:
            run_sql(dsn, f"SELECT pg_terminate_backend(pid) FROM {WAITING}")
        assert await writing == {}
        assert await sink.count() == 50


async def test_a_connection_that_breaks_between_two_calls_is_replaced(dsn: str, proxy: Proxy) -> None:
    async with PostgresSink(through(proxy, dsn)) as sink:
        await sink.prepare(MODEL, 8)
        for part in range(3):
            proxy.cut()
            await sink.write(MODEL, rows(30)[10 * part : 10 * part + 10])
        assert await sink.count() == 30
    assert proxy.connections > 3


async def test_a_commit_whose_answer_is_lost_is_repeated_without_duplicates(dsn: str, proxy: Proxy) -> None:
    async with PostgresSink(through(proxy, dsn)) as sink:
        await sink.prepare(MODEL, 8)
        proxy.lose_commits = 2
        assert await sink.write(MODEL, rows(20)) == {}
        assert proxy.lose_commits == 0
        assert await sink.count() == 20


async def test_a_commit_whose_answer_is_lost_is_an_error_if_it_cannot_be_repeated(dsn: str, proxy: Proxy) -> None:
    async with PostgresSink(through(proxy, dsn), retry_for=0) as sink:
        await sink.prepare(MODEL, 8)
        proxy.lose_commits = 1
        with pytest.raises(SinkError, match="given up"):
            await sink.write(MODEL, rows(20))
        assert await sink.count() == 20  # they are stored, only the answer was lost: a rerun skips them
        assert await sink.existing(MODEL, hashes(rows(20))) == {one.id for one in rows(20)}


async def test_a_batch_whose_connection_breaks_is_stored_once(dsn: str, proxy: Proxy) -> None:
    stored = rows(400, dimensions=1_000)
    async with PostgresSink(through(proxy, dsn)) as sink:
        await sink.prepare(MODEL, 1_000)
        writing = asyncio.create_task(sink.write(MODEL, stored))
        for _ in range(30):
            await asyncio.sleep(0)
        proxy.cut()
        assert await writing == {}
        assert await sink.count() == 400


async def test_a_write_into_a_black_hole_ends_at_the_timeout_even_if_the_send_buffers_are_full(
    dsn: str, proxy: Proxy
) -> None:
    stored = rows(2_000, dimensions=1_500)  # 12 MB, more than sockets hold
    async with PostgresSink(through(proxy, dsn), timeout=0.5, retry_for=0) as sink:
        await sink.prepare(MODEL, 1_500)
        proxy.let_through.clear()
        async with asyncio.timeout(4):  # eight times the timeout
            with pytest.raises(SinkBusyError, match=r"no answer on it, within 0\.5 s"):
                await sink.write(MODEL, stored)
        proxy.let_through.set()
    assert run_sql(dsn, "SELECT count(*) FROM embeddings") == [(0,)]


async def test_a_write_survives_a_black_hole_that_passes(dsn: str, proxy: Proxy) -> None:
    async with PostgresSink(through(proxy, dsn), timeout=0.3, retry_for=30) as sink:
        await sink.prepare(MODEL, 8)
        before = proxy.connections
        proxy.let_through.clear()
        writing = asyncio.create_task(sink.write(MODEL, rows(20)))
        while proxy.connections == before:  # noqa: ASYNC110  # a new connection shows the next attempt
            await asyncio.sleep(0)
        proxy.let_through.set()
        assert await writing == {}
        assert await sink.count() == 20


async def test_a_server_that_restarts_at_once_is_waited_for(dsn: str, postgres: Any) -> None:
    stored = rows(200)
    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 8)
        await sink.write(MODEL, stored[:100])

        async def write_the_rest() -> None:
            for start in range(100, 200, 10):
                await sink.write(MODEL, stored[start : start + 10])

        await asyncio.to_thread(control, postgres, "restart")
        await write_the_rest()
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(control, postgres, "restart"))
            group.create_task(write_the_rest())
        assert await sink.existing(MODEL, hashes(stored)) == {one.id for one in stored}


async def test_a_server_that_never_answered_is_not_waited_for(dsn: str) -> None:
    async with PostgresSink("postgresql://127.0.0.1:1/db", retry_for=3_600) as sink:
        with pytest.raises(SinkConfigError, match=r"db on 127\.0\.0\.1:1.*cannot be reached"):
            await sink.prepare(MODEL, 3)


async def test_a_primary_that_became_a_replica_is_left_for_a_new_connection(dsn: str, proxy: Proxy) -> None:
    run_sql(dsn, "DO $$ BEGIN CREATE ROLE failover LOGIN SUPERUSER; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    async with PostgresSink(through(proxy, dsn).replace("postgres@", "failover@")) as sink:
        await sink.prepare(MODEL, 8)
        run_sql(dsn, "ALTER ROLE failover SET default_transaction_read_only = on")  # read when a session begins
        proxy.cut()
        writing = asyncio.create_task(sink.write(MODEL, rows(3)))
        while proxy.connections < 3:  # noqa: ASYNC110  # until the second session was refused and closed
            await asyncio.sleep(0)
        run_sql(dsn, "ALTER ROLE failover SET default_transaction_read_only = off")
        assert await writing == {}


# ---- pools and poolers ----


async def test_a_pool_without_a_free_connection_is_waited_for_until_the_timeout(dsn: str) -> None:
    async with (
        asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool,
        PostgresSink(pool, timeout=0.2, retry_for=0) as sink,
    ):
        await sink.prepare(MODEL, 8)
        async with pool.acquire():
            with pytest.raises(SinkBusyError, match=r"no free connection.*within 0\.2 s"):
                await sink.write(MODEL, rows(3))
        assert await sink.write(MODEL, rows(3)) == {}


async def test_a_server_without_a_free_connection_is_retried(dsn: str) -> None:
    run_sql(
        dsn,
        "DO $$ BEGIN CREATE ROLE single LOGIN CONNECTION LIMIT 1; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        "GRANT ALL ON SCHEMA " + dsn.rpartition("=")[2].partition(",")[0] + " TO single",
    )
    single = dsn.replace("postgres@", "single@")
    taken = await asyncpg.connect(single)
    async with PostgresSink(single, retry_for=0.1) as sink:
        with pytest.raises(SinkBusyError, match="SQLSTATE 53300"):
            await sink.prepare(MODEL, 8)
    async with PostgresSink(single, pool_size=1) as sink:
        preparing = asyncio.create_task(sink.prepare(MODEL, 8))
        await asyncio.sleep(0)
        await taken.close()
        await preparing


async def test_a_sink_works_through_a_pooler_that_changes_the_backend_for_every_transaction(
    dsn: str, socket: Path
) -> None:
    stored = rows(60)
    async with Pooler(socket) as pooler, PostgresSink(through(pooler, dsn), pool_size=3) as sink:
        await sink.prepare(MODEL, 8)
        async with asyncio.TaskGroup() as group:
            for start in range(0, 60, 10):
                group.create_task(sink.write(MODEL, stored[start : start + 10]))
        assert await sink.existing(MODEL, hashes(stored)) == {one.id for one in stored}
        assert len(await sink.search(stored[0].vector, k=50)) == 50
        assert pooler.backends > 9


async def test_the_error_for_cached_statements_behind_a_pooler_names_the_option_to_change(
    dsn: str, socket: Path
) -> None:
    async with Pooler(socket) as pooler, asyncpg.create_pool(through(pooler, dsn), min_size=1, max_size=1) as pool:
        sink = PostgresSink(pool, retry_for=0)
        with pytest.raises(SinkConfigError, match="statement_cache_size=0"):
            for _ in range(3):
                await sink.prepare(MODEL, 8)


# ---- cancellation ----


async def test_a_cancelled_write_leaves_no_transaction_and_a_sink_that_works(dsn: str) -> None:
    async with PostgresSink(dsn, pool_size=1) as sink:
        await sink.prepare(MODEL, 8)
        async with a_batch_in_the_middle(dsn, sink) as writing:
            writing.cancel()
            await asyncio.wait([writing])  # although the lock is still held
            assert writing.cancelled()
        assert await sink.count() == 0
        await sink.write(MODEL, rows(5))
        assert await sink.count() == 5


async def test_closing_leaves_no_connection_and_no_task(dsn: str, postgres: Any) -> None:
    ours = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{dsn.rpartition('=')[2][:60]}'"
    named = f"{dsn}&application_name={dsn.rpartition('=')[2][:60]}"
    before = asyncio.all_tasks()
    async with PostgresSink(named) as sink:
        await sink.prepare(MODEL, 8)
        async with asyncio.TaskGroup() as group:
            for part in range(8):
                group.create_task(sink.write(MODEL, rows(80)[10 * part : 10 * part + 10]))
        ((connected,),) = run_sql(address(postgres, "shared"), ours)
        assert 1 <= connected <= 4
    while run_sql(address(postgres, "shared"), ours) != [(0,)]:  # noqa: ASYNC110  # backends end a moment later
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_one_sink_in_two_running_loops_is_an_error(dsn: str) -> None:
    async with PostgresSink(dsn) as sink:
        await sink.write(MODEL, rows(1))
        with pytest.raises(SinkError, match="another running event loop"):
            await asyncio.to_thread(lambda: asyncio.run(sink.count()))


def test_connections_are_closed_when_their_loop_ends(dsn: str) -> None:
    sink = PostgresSink(dsn)
    asyncio.run(sink.write(MODEL, rows(1)))
    named = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%COMMIT%' AND pid <> pg_backend_pid()"
    while run_sql(dsn, named) != [(0,)]:
        pass


async def test_a_sink_that_was_not_closed_warns(dsn: str) -> None:
    sink = PostgresSink(dsn)
    await sink.write(MODEL, rows(1))
    before = asyncio.all_tasks()
    with pytest.warns(ResourceWarning, match="was not closed: use `async with`"):
        del sink
    await asyncio.sleep(0)
    await asyncio.wait(asyncio.all_tasks() - before)  # the collector has asyncio close its connections


async def test_the_loop_stays_live_while_a_large_batch_is_written(dsn: str) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async with PostgresSink(dsn) as sink:
        await sink.prepare(MODEL, 1_500)
        ticking = asyncio.create_task(tick())
        await sink.write(MODEL, rows(1_000, dimensions=1_500))
        ticking.cancel()
    assert ticks > 20
