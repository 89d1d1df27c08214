"""`ingest(..., prune=True)`: rows that the source no longer has are deleted, and no others."""

from __future__ import annotations

import asyncio
import sqlite3
import tracemalloc
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asyncembed import Embedder, PostgresSink, QuotaError, Record, SQLiteSink, ingest
from asyncembed.errors import ConfigError, DeadlineError, InvalidRecordError, SinkError
from asyncembed.pipeline.pruning import Pruning
from asyncembed.report import Progress
from tests.fakes import FakeProvider, Script
from tests.steps import Steps
from tests.stores import OpenStore, run_sql


def make(script: Script | None = None, *, model: str = "fake", **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script, latency_s=0)
    return Embedder(model, provider=provider, **options), provider


def records(*numbers: int) -> list[Record]:
    return [Record(f"id {number}", f"text {number}") for number in numbers]


async def ids(sink: Any, model: str = "fake") -> list[str]:
    return [id async for id in sink.ids(model)]


async def test_rows_whose_ids_are_not_in_the_source_are_deleted(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        first = await ingest(records(1, 2, 3), embedder, sink, prune=True)
        assert (first.success_count, first.pruned_count) == (3, 0)

        report = await ingest(records(2, 4), embedder, sink, prune=True)

        assert (report.success_count, report.skipped_count, report.pruned_count) == (1, 1, 1 + 1)
        assert await ids(sink) == ["id 2", "id 4"]
        assert provider.requests[1:] == [["text 4"]]
        assert ", 2 pruned;" in str(report)


async def test_nothing_is_pruned_by_default(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1, 2), embedder, sink)
        report = await ingest(records(2), embedder, sink)
        assert report.pruned_count is None
        assert "pruned" not in str(report)
        assert await ids(sink) == ["id 1", "id 2"]


async def test_rows_of_other_models_stay(open_store: OpenStore) -> None:
    one, _ = make()
    other, _ = make(model="other")
    async with open_store() as sink:
        await ingest(records(1, 2), one, sink)
        await ingest(records(2), other, sink, prune=True)
        assert (await ids(sink), await ids(sink, "other")) == (["id 1", "id 2"], ["id 2"])


async def test_an_empty_source_deletes_every_row(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1, 2), embedder, sink)
        assert (await ingest([], embedder, sink, prune=True)).pruned_count == 2
        assert await ids(sink) == []


async def test_many_pages_of_ids_are_pruned_while_they_are_listed(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.sinks.contract.IDS_PER_PAGE", 700)
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(*range(3_500)), embedder, sink)
        report = await ingest(records(*range(0, 3_500, 7)), embedder, sink, prune=True)
        assert (report.skipped_count, report.pruned_count) == (500, 3_000)
        assert sorted(await ids(sink)) == sorted(f"id {number}" for number in range(0, 3_500, 7))


async def test_neither_a_rerun_nor_pruning_takes_a_step_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    embedder, _ = make()
    async with SQLiteSink(":memory:") as sink:
        await ingest(records(*range(4_000)), embedder, sink)
        steps.count = 0
        report = await ingest(records(*range(2_000)), embedder, sink, prune=True)
        assert (report.skipped_count, report.pruned_count) == (2_000, 2_000)
    assert 0 < steps.count < 200


# ---- failed records are still in the source ----


async def test_the_row_of_a_failed_record_stays(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1, 2, 3), embedder, sink)
        unread = InvalidRecordError("is broken")
        unread.record_id = "id 3"
        report = await ingest([Record("id 1", ""), unread, Record("half \ud800", "a")], embedder, sink, prune=True)
        assert (report.failed_count, report.pruned_count) == (3, 1)
        assert await ids(sink) == ["id 1", "id 3"]


async def test_the_id_of_a_refused_row_counts_as_seen(open_store: OpenStore) -> None:
    embedder, _ = make()
    long = "x" * 3_000
    async with open_store() as sink:
        await ingest(records(1), embedder, sink)
        report = await ingest([Record(long, "a"), *records(1)], embedder, sink, prune=True)
        assert (report.failed_ids, report.pruned_count) == ([long], 0)


@pytest.mark.parametrize("broken", [InvalidRecordError("line 2 is broken"), {"text": "without an id"}, 5])
async def test_nothing_is_pruned_if_a_record_failed_without_an_id(
    open_store: OpenStore, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1, 2), embedder, sink)
        report = await ingest([*records(1), broken], embedder, sink, prune=True)
        assert report.pruned_count is None
        assert await ids(sink) == ["id 1", "id 2"]
    assert caplog.messages == ["nothing was pruned: 1 records failed without an id, and any row might be theirs"]


# ---- pruning needs a complete pass ----


async def test_a_stopped_run_prunes_nothing(open_store: OpenStore) -> None:
    stop = asyncio.Event()
    embedder, _ = make(max_batch_size=10, concurrency=1)

    def soon(progress: Progress) -> None:
        if progress.done >= 20:
            stop.set()

    async with open_store() as sink:
        await ingest(records(-1), embedder, sink)
        report = await ingest(records(*range(500)), embedder, sink, prune=True, stop=stop, on_progress=soon)
        assert report.pruned_count is None
        assert "id -1" in await ids(sink)


async def test_a_fatal_error_of_the_provider_prunes_nothing(open_store: OpenStore) -> None:
    embedder, _ = make(lambda number, texts: QuotaError("no money") if number else None)
    async with open_store() as sink:
        await ingest(records(1), embedder, sink)
        with pytest.raises(QuotaError) as caught:
            await ingest(records(2), embedder, sink, prune=True)
        assert caught.value.report.pruned_count is None
        assert await ids(sink) == ["id 1"]


async def test_a_source_that_fails_prunes_nothing(open_store: OpenStore) -> None:
    async def source() -> AsyncIterator[Record]:
        yield records(2)[0]
        raise OSError("the disk is gone")

    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1), embedder, sink)
        with pytest.raises(OSError, match="the disk is gone"):
            await ingest(source(), embedder, sink, prune=True)
        assert "id 1" in await ids(sink)


async def test_a_run_that_reaches_its_deadline_prunes_nothing(open_store: OpenStore) -> None:
    async def source() -> AsyncIterator[Record]:
        yield records(2)[0]
        await asyncio.Event().wait()

    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1), embedder, sink)
        with pytest.raises(DeadlineError):
            await ingest(source(), embedder, sink, prune=True, deadline=0.05)
        assert "id 1" in await ids(sink)


async def test_a_run_stopped_while_it_prunes_has_pruned_whole_pages_and_reports_how_many(open_store: OpenStore) -> None:
    stop = asyncio.Event()
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(*range(3_000)), embedder, sink)
        delete = sink.delete

        async def delete_and_stop(gone: Any, model: str) -> int:
            deleted: int = await delete(gone, model)
            stop.set()
            for _ in range(5):  # until the run has noticed it
                await asyncio.sleep(0)
            return deleted

        sink.delete = delete_and_stop
        report = await ingest(records(0), embedder, sink, prune=True, stop=stop)
        assert 0 < report.pruned_count < 2_999
        assert await sink.count() == 3_000 - report.pruned_count


async def test_a_store_that_fails_during_pruning_ends_the_run_with_its_report(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:

        async def refuse(gone: Any, model: str) -> int:
            raise SinkError("the disk is full")

        await ingest(records(1), embedder, sink)
        sink.delete = refuse
        with pytest.raises(SinkError, match="the disk is full") as caught:
            await ingest(records(2), embedder, sink, prune=True)
        assert caught.value.report.success_count == 1


# ---- sinks, ids, memory ----


async def test_a_sink_that_cannot_list_its_ids_is_refused_before_anything_is_sent() -> None:
    class Plain:
        async def prepare(self, model: str, dimensions: int | None) -> None:
            raise AssertionError

        existing = write = prepare

    embedder, provider = make()
    with pytest.raises(ConfigError, match="Plain has no stored_id, ids, delete"):
        await ingest(records(1), embedder, Plain(), prune=True)  # type: ignore[arg-type]  # that is the test
    assert provider.requests == []


async def test_ids_are_compared_as_their_column_stores_them(dsn: str) -> None:
    number, given = uuid.uuid4(), uuid.uuid4()
    run_sql(dsn, "CREATE TABLE numbers (n bigint UNIQUE, v vector)", "CREATE TABLE uuids (u uuid UNIQUE, v vector)")
    embedder, _ = make()
    async with PostgresSink(dsn, table="numbers", columns={"id": "n", "embedding": "v"}) as sink:
        await ingest([(7, "a"), (8, "b")], embedder, sink)
        assert (await ingest([("007", "a"), ("x", "b")], embedder, sink, prune=True)).pruned_count == 1
        assert await ids(sink) == ["7"]
    async with PostgresSink(dsn, table="uuids", columns={"id": "u", "embedding": "v"}) as sink:
        await ingest([(number, "a"), (given, "b")], embedder, sink)
        assert (await ingest([(str(number).upper(), "a")], embedder, sink, prune=True)).pruned_count == 1
        assert await ids(sink) == [str(number)]


async def test_with_update_only_pruning_clears_vectors_and_keeps_rows(dsn: str) -> None:
    run_sql(dsn, "CREATE TABLE docs (id int PRIMARY KEY, v vector)", "INSERT INTO docs VALUES (1), (2)")
    embedder, _ = make()
    async with PostgresSink(dsn, table="docs", columns={"id": "id", "embedding": "v"}, update_only=True) as sink:
        await ingest([(1, "a"), (2, "b")], embedder, sink)
        assert (await ingest([(2, "b")], embedder, sink, prune=True)).pruned_count == 1
    assert run_sql(dsn, "SELECT id, v IS NULL FROM docs ORDER BY id") == [(1, True), (2, False)]


async def test_seen_ids_are_not_kept_in_memory(tmp_path: Any) -> None:
    async with SQLiteSink(tmp_path / "v.db") as sink:
        pruning = Pruning(sink, "fake")
        tracemalloc.start()
        try:
            for first in range(0, 50_000, 1_000):
                await pruning.see([f"{'long ' * 20}{number}" for number in range(first, first + 1_000)])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            pruning.close()
    assert peak < 2_000_000  # of 7 MB of ids


async def test_a_run_cancelled_while_it_remembers_ids_leaves_no_task_behind(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        for steps in range(0, 60, 3):
            task = asyncio.create_task(ingest(records(*range(steps, 200)), embedder, sink, prune=True))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        report = await ingest(records(5), embedder, sink, prune=True)
        assert await ids(sink) == ["id 5"]
        assert report.success_count + report.skipped_count == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_full_folder_for_temporary_files_is_an_error_with_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def full(database: str, **options: Any) -> sqlite3.Connection:
        connection = connect(database, **options)
        if not database:
            connection.execute("PRAGMA max_page_count = 8")
        return connection

    monkeypatch.setattr(sqlite3, "connect", full)
    embedder, _ = make()
    async with SQLiteSink(":memory:") as sink:
        with pytest.raises(SinkError, match="temporary files") as caught:
            await ingest(records(*range(9_000)), embedder, sink, prune=True)
        assert caught.value.report.success_count == await sink.count()
