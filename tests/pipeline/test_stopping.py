"""How an `ingest` ends: errors of provider, sink and source, `stop`, the deadline, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from asyncembed import Record, ingest
from asyncembed.errors import DeadlineError, QuotaError, SinkError
from asyncembed.report import IngestReport, Progress
from asyncembed.types import Row
from tests.pipeline.ingests import LimitedSink, assert_stored, make, records, sent_texts
from tests.stores import OpenStore

# ---- errors


async def test_after_a_fatal_error_a_rerun_pays_only_for_the_rest(open_store: OpenStore) -> None:
    embedder, _ = make(
        lambda number, _: QuotaError("no money", status=429) if number == 3 else None,
        max_batch_size=10,
        concurrency=1,
    )
    async with open_store() as sink:
        with pytest.raises(QuotaError) as caught:
            await ingest(records(100), embedder, sink)

        report = caught.value.report
        assert report.success_count == await sink.count() == 30
        assert report.success_count + report.failed_count + report.skipped_count == report.seen

        again, provider = make(max_batch_size=10)
        assert (await ingest(records(100), again, sink)).skipped_count == 30
        assert sent_texts(provider) == 70
        await assert_stored(sink, {str(record.id): record.text for record in records(100)})


async def test_a_sink_error_ends_ingest_with_a_correct_report() -> None:
    embedder, provider = make(max_batch_size=10, concurrency=2)
    sink = LimitedSink(batches=3)

    with pytest.raises(SinkError, match="the disk is full") as caught:
        await ingest(records(1_000), embedder, sink)

    report: IngestReport = caught.value.report
    assert report.success_count == len(sink.rows) == 30
    assert report.success_count + report.failed_count == report.seen
    assert len(provider.requests) <= 10
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("where", ["prepare", "existing", "write"])
@pytest.mark.parametrize(
    "error", [TimeoutError("the store's own"), ExceptionGroup("the store's own", [ValueError(1)])], ids=["one", "group"]
)
async def test_a_foreign_error_of_a_sink_is_raised_unchanged(where: str, error: Exception) -> None:
    class Foreign(LimitedSink):
        pass

    async def broken(*_: Any) -> Any:
        await asyncio.sleep(0)
        raise error

    setattr(Foreign, where, broken)
    for deadline in (None, 60.0):
        embedder, _ = make(max_batch_size=10)
        with pytest.raises(type(error)) as caught:
            await ingest(records(100), embedder, Foreign(batches=3), deadline=deadline)
        assert caught.value is error
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("error", [SinkError("full"), RuntimeError("foreign")], ids=["ours", "foreign"])
async def test_no_queued_batch_is_sent_after_the_sink_has_failed(error: Exception) -> None:
    class Full(LimitedSink):
        async def write(self, model: str, rows: Sequence[Row]) -> Any:
            await asyncio.sleep(0)
            raise error

    embedder, provider = make(max_batch_size=10, concurrency=1)
    with pytest.raises(type(error)):
        await ingest(records(100), embedder, Full(batches=0))
    assert sent_texts(provider) == 10


async def test_an_error_of_the_source_is_raised_unchanged_after_storing_the_records_before_it(
    open_store: OpenStore,
) -> None:
    def source() -> Iterator[Record]:
        yield from records(2_500)
        raise KeyError("the source broke")

    embedder, _ = make(max_batch_size=100)
    async with open_store() as sink:
        with pytest.raises(KeyError, match="the source broke"):
            await ingest(source(), embedder, sink)
        assert await sink.count() == 2_500
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert (await ingest(records(2_500), embedder, sink)).skipped_count == 2_500


# ---- `stop`


async def test_a_stopped_ingest_stores_and_reports_batches_in_flight(open_store: OpenStore) -> None:
    stop = asyncio.Event()
    embedder, provider = make(max_batch_size=10, concurrency=2)
    provider.latency_s = 0.001

    def after_five(progress: Progress) -> None:
        if progress.done >= 50:
            stop.set()

    async with open_store() as sink:
        report = await ingest(records(1_000), embedder, sink, on_progress=after_five, stop=stop)

        assert report.failed_count == 0
        assert 50 <= report.success_count == await sink.count() <= 100
        assert sent_texts(provider) == report.success_count


async def test_a_stopped_ingest_does_not_wait_for_an_idle_source(open_store: OpenStore) -> None:
    stop = asyncio.Event()
    closed: list[bool] = []

    async def source() -> AsyncIterator[Record]:
        try:
            yield Record("a", "text")
            stop.set()
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    embedder, _ = make()
    async with open_store() as sink:
        report = await ingest(source(), embedder, sink, stop=stop)
    assert report.failed_count == 0
    assert closed == [True]


class HangingSink:
    """A sink with one method that hangs until it is cancelled."""

    def __init__(self, sink: Any, call: str) -> None:
        self._sink = sink
        self._call = call
        self.reached = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return self._block if name == self._call else getattr(self._sink, name)

    async def _block(self, *args: Any) -> None:
        self.reached.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("call", ["prepare", "existing", "write", "delete"])
async def test_a_hanging_store_does_not_keep_a_stopped_ingest_from_ending(
    open_store: OpenStore, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.sending.context.STORING_S", 0.05)
    monkeypatch.setattr("asyncembed.pipeline.ingestion.STORING_S", 0.05)
    embedder, _ = make()
    stop = asyncio.Event()
    async with open_store() as sink:
        await ingest(records(3), embedder, sink)
        blocked = HangingSink(sink, call)
        run = asyncio.create_task(ingest(records(3, first=3), embedder, blocked, stop=stop, prune=True))
        await blocked.reached.wait()
        stop.set()
        report = await run
        assert report.seen == report.success_count == await sink.count() - 3 == (3 if call == "delete" else 0)
        assert report.failures == []


# ---- the deadline


async def test_the_deadline_ends_ingest_with_a_report(open_store: OpenStore) -> None:
    embedder, provider = make(max_batch_size=1, concurrency=1)

    async def source() -> AsyncIterator[Record]:
        yield Record("a", "text")
        await asyncio.Event().wait()

    async with open_store() as sink:
        await sink.prepare("fake", None)
        with pytest.raises(DeadlineError) as caught:
            await ingest(source(), embedder, sink, deadline=0.8)
        assert caught.value.report.success_count == await sink.count() == 1
    assert len(provider.requests) == 1


@pytest.mark.parametrize("deadline", [0.03 * step for step in range(1, 9)])
async def test_at_any_deadline_the_report_agrees_with_the_store(open_store: OpenStore, deadline: float) -> None:
    # once, a batch that was being committed was reported as failed although it was stored
    embedder, _ = make(max_batch_size=50)
    source = (Record(number, f"text {number}") for number in range(100_000))
    async with open_store() as sink:
        await sink.prepare("fake", 4)
        with pytest.raises(DeadlineError) as caught:
            await ingest(source, embedder, sink, deadline=deadline)
        report = caught.value.report
        assert report.success_count == await sink.count()
        assert report.seen == report.success_count + report.failed_count
        stored = {int(id) async for id in sink.ids("fake")}
    assert stored.isdisjoint(report.failed_ids)


# ---- cancellation


@pytest.mark.parametrize("step", range(1, 60, 2))
async def test_ingest_cancelled_at_any_step_stores_whole_batches_and_leaves_no_task(
    open_store: OpenStore, step: int
) -> None:
    embedder, _ = make(max_batch_size=10, concurrency=3)
    async with open_store() as sink:
        await sink.prepare("fake", 4)
        before = asyncio.all_tasks()
        call = asyncio.create_task(ingest(records(200), embedder, sink))
        for _ in range(step):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert asyncio.all_tasks() == before
        assert await sink.count() % 10 == 0
        report = await ingest(records(200), embedder, sink)  # the store is not locked, the slots are free
        assert report.success_count + report.skipped_count == 200
        assert await sink.count() == 200
