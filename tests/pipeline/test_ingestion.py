"""`pipeline.ingest` into real stores: every case on every sink."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder, Record, SQLiteSink, ingest
from asyncembed.errors import (
    AsyncEmbedError,
    BadRequestError,
    DeadlineError,
    InvalidRecordError,
    InvalidTextError,
    QuotaError,
    SinkConfigError,
    SinkError,
)
from asyncembed.report import IngestReport, Progress
from asyncembed.types import Row
from tests.fakes import FakeProvider, Script, vector_of
from tests.stores import OpenStore


def make(script: Script | None = None, **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script, latency_s=0)
    return Embedder("fake", provider=provider, **options), provider


def records(count: int, first: int = 0) -> list[Record]:
    return [Record(f"id {number}", f"text {number}") for number in range(first, first + count)]


def sent(provider: FakeProvider) -> int:
    return sum(map(len, provider.requests))


async def stored(sink: Any, texts: dict[str, str]) -> None:
    """Check that the store holds these ids with the vectors of these texts, and no other."""
    assert await sink.count() == len(texts)
    hits = {hit.id: hit for hit in await sink.search(np.ones(4, np.float32), k=len(texts) + 1)}
    assert {name: hit.text for name, hit in hits.items()} == texts
    ones = np.ones(4) / 2
    for name, hit in hits.items():
        vector = vector_of(texts[name]).astype(np.float64)
        assert hit.score == pytest.approx(float(vector @ ones / np.linalg.norm(vector)), abs=1e-5)


async def test_records_of_every_form_are_stored_with_the_vectors_of_their_texts(open_store: OpenStore) -> None:
    embedder, _ = make()
    number = uuid.uuid4()
    forms = [
        Record("a", "first", {"page": 1}),
        ("b", "second"),
        {"id": "c", "text": "third"},
        {"id": 4, "title": "Title", "content": "fourth"},
        {"id": number, "text": "fifth", "metadata": {"tags": ["x"]}},
        (np.int64(6), "sixth"),
    ]
    async with open_store() as sink:
        report = await ingest(forms, embedder, sink)

        assert (report.success_count, report.failed_count, report.skipped_count) == (6, 0, 0)
        assert report.total_tokens == sum(map(len, ["first", "second", "third", "Title\nfourth", "fifth", "sixth"]))
        await stored(
            sink,
            {"a": "first", "b": "second", "c": "third", "4": "Title\nfourth", str(number): "fifth", "6": "sixth"},
        )


async def test_a_second_run_sends_nothing(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(5_000), embedder, sink)
        requests = len(provider.requests)

        report = await ingest(records(5_000), embedder, sink)

        assert (report.success_count, report.skipped_count, report.requests) == (0, 5_000, 0)
        assert len(provider.requests) == requests


async def test_changed_and_new_texts_are_embedded_and_no_others(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(100), embedder, sink)
        provider.requests.clear()

        changed = [*records(99), Record("id 99", "other"), Record("id 100", "new")]
        report = await ingest(changed, embedder, sink)

        assert (report.success_count, report.skipped_count) == (2, 99)
        assert provider.requests == [["other", "new"]]
        await stored(sink, {str(record.id): record.text for record in changed})


async def test_everything_is_embedded_anew_on_request(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(10), embedder, sink)
        report = await ingest(records(10), embedder, sink, skip_existing=False)

        assert report.success_count == 10
        assert sent(provider) == 20
        assert await sink.count() == 10


async def test_another_model_is_stored_beside(open_store: OpenStore) -> None:
    async with open_store() as sink:
        for model in ("one", "two"):
            report = await ingest(records(3), Embedder(model, provider=FakeProvider(latency_s=0)), sink)
            assert report.success_count == 3
        assert await sink.count() == 6
        assert await sink.count(model="one") == 3


async def test_other_dimensions_are_refused_before_anything_is_sent(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest(records(1), embedder, sink)
        provider = FakeProvider(latency_s=0)
        other = Embedder("fake", provider=provider, dimensions=8)

        with pytest.raises(SinkConfigError, match=r"4.*8|8.*4"):
            await ingest(records(2), other, sink)

        assert provider.requests == []


async def test_bad_records_fail_alone_with_their_ids_and_reasons(open_store: OpenStore) -> None:
    embedder, _ = make(lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None)
    unreadable = InvalidRecordError("line 7 of x.jsonl is broken")
    mixed: list[Any] = [
        Record("good 1", "fine"),
        Record("empty", ""),
        Record("none", None),  # type: ignore[arg-type]
        Record("number", 5),  # type: ignore[arg-type]
        Record("surrogate", "a\ud800"),
        Record("nul", "a\0b"),
        Record("n\0l", "text"),
        Record("metadata", "text", {"a": object()}),
        Record("nan", "text", {"a": float("nan")}),
        Record(1.5, "a float for an id"),  # type: ignore[arg-type]
        {"text": "no id"},
        {"id": "no text"},
        None,
        unreadable,
        Record("poison", "poison"),
        Record("good 2", "also fine"),
    ]
    async with open_store() as sink:
        report = await ingest(mixed, embedder, sink)

        assert report.success_count == 2
        assert report.failed_ids == [
            "empty", "none", "number", "surrogate", "nul", "n\0l", "metadata", "nan",
            None, None, None, None, None, "poison",
        ]  # fmt: skip
        assert [failure.index for failure in report.failures] == list(range(1, 15))
        assert report.failures[12].error is unreadable
        assert all(isinstance(failure.error, AsyncEmbedError) for failure in report.failures)
        assert isinstance(report.failures[0].error, InvalidTextError)
        assert report.success_count + report.failed_count + report.skipped_count == report.seen == len(mixed)
        await stored(sink, {"good 1": "fine", "good 2": "also fine"})


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Record("x" * 2_001, "bad"), id="an id too long for an index"),
        pytest.param(Record("b\ud800d", "bad"), id="half a surrogate pair in the id"),
        pytest.param(Record("b\0d", "bad"), id="NUL in the id"),
        pytest.param(Record(10**4_400, "bad"), id="a number that has no str"),
        pytest.param(Record("bad", "b\0d"), id="NUL in the text"),
        pytest.param(Record("bad", "bad", {"a": ["\0"]}), id="NUL in the metadata"),
        pytest.param(Record("bad", "bad", {"\ud800": 1}), id="half a surrogate pair in the metadata"),
    ],
)
async def test_what_no_store_takes_is_not_paid_for(open_store: OpenStore, bad: Record) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([Record("good", "fine"), bad], embedder, sink)

        assert (report.success_count, report.failed_count) == (1, 1)
        assert isinstance(report.failures[0].error, InvalidRecordError)
        assert bad.text not in str(report.failures[0].error)
        assert provider.requests == [["fine"]]


async def test_metadata_that_only_spell_nul_are_stored(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest([Record("a", "text", {"regex": r"[^\u0000]"})], embedder, sink)
        (hit,) = await sink.search(await embedder.embed_one("text"), k=1)
        assert hit.metadata == {"regex": r"[^\u0000]"}


class Watched(Mapping[str, int]):
    """Metadata that note which thread reads them."""

    def __init__(self, readers: list[int]) -> None:
        self._readers = readers

    def __getitem__(self, key: str) -> int:
        return {"a": 1}[key]

    def __iter__(self) -> Iterator[str]:
        self._readers.append(threading.get_ident())
        return iter("a")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(("turn_s", "in_threads"), [(60.0, 0), (0.0, 92)], ids=["quick records", "slow records"])
async def test_only_records_that_take_long_to_check_are_checked_in_a_thread(
    monkeypatch: pytest.MonkeyPatch, turn_s: float, in_threads: int
) -> None:
    monkeypatch.setattr("asyncembed.pipeline.ingestion.TURN_S", turn_s)
    readers: list[int] = []
    embedder, _ = make()
    sink = BrokenSink(batches=10)
    report = await ingest([Record(number, f"text {number}", Watched(readers)) for number in range(100)], embedder, sink)
    assert report.success_count == 100
    assert len({row.metadata for row in sink.rows}) == 1
    assert [row.id for row in sink.rows] == list(range(100))
    elsewhere = sum(reader != threading.get_ident() for reader in readers)
    assert elsewhere == in_threads  # the first eight are checked before it is known how long they take


async def test_ingest_of_nothing_is_a_report_of_zeros(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([], embedder, sink)
        assert (report.seen, report.requests, report.total_tokens) == (0, 0, 0)
    assert provider.requests == []


@pytest.mark.parametrize("gap", [0, 1, 999, 1_000, 3_000])
async def test_of_one_id_the_last_record_wins_wherever_they_stand(open_store: OpenStore, gap: int) -> None:
    embedder, _ = make(max_batch_size=500)
    async with open_store() as sink:
        report = await ingest([Record("twice", "old"), *records(gap), Record("twice", "new")], embedder, sink)

        assert report.seen == gap + 2
        assert report.failed_count == 0
        await stored(sink, {"twice": "new", **{str(record.id): record.text for record in records(gap)}})


async def test_the_same_record_twice_is_one_input_and_one_row(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([("a", "same"), ("a", "same")], embedder, sink)
        assert (report.success_count, report.skipped_count) == (1, 1)
        assert provider.requests == [["same"]]
        await stored(sink, {"a": "same"})


async def test_a_number_and_its_digits_are_one_id(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest([(5, "number"), ("5", "digits")], embedder, sink)
        await stored(sink, {"5": "digits"})


async def test_equal_texts_of_different_records_are_sent_once_and_stored_for_each(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([("a", "same"), ("b", "same"), ("c", "other")], embedder, sink)
        assert report.success_count == 3
        assert provider.requests == [["same", "other"]]
        await stored(sink, {"a": "same", "b": "same", "c": "other"})


async def test_progress_adds_up_and_ends_at_the_total(open_store: OpenStore) -> None:
    embedder, _ = make(max_batch_size=100)
    seen: list[Progress] = []
    async with open_store() as sink:
        await ingest([*records(1_000), ("bad", "")], embedder, sink, on_progress=seen.append)

    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (1_001, 1_001, 1)


async def test_a_progress_callback_that_raises_harms_nothing(open_store: OpenStore, caplog: Any) -> None:
    embedder, _ = make(max_batch_size=10)
    calls: list[Progress] = []

    def broken(progress: Progress) -> None:
        calls.append(progress)
        raise TimeoutError

    async with open_store() as sink:
        report = await ingest(records(50), embedder, sink, on_progress=broken)

    assert report.success_count == 50
    assert len(calls) == 1
    assert "on_progress" in caplog.text


async def test_a_fatal_answer_keeps_what_is_stored_and_a_rerun_pays_for_the_rest_only(open_store: OpenStore) -> None:
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
        assert sent(provider) == 70
        await stored(sink, {str(record.id): record.text for record in records(100)})


class BrokenSink:
    """A store that takes so many batches and then no more."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.rows: list[Row] = []

    async def prepare(self, model: str, dimensions: int | None) -> None: ...

    async def existing(self, model: str, hashes: Any) -> set[Any]:
        return set()

    async def write(self, model: str, rows: Sequence[Row]) -> dict[Any, AsyncEmbedError]:
        await asyncio.sleep(0)
        if self.batches == 0:
            raise SinkError("the disk is full")
        self.batches -= 1
        self.rows.extend(rows)
        return {}


async def test_a_store_that_takes_no_more_ends_the_run_with_an_honest_report() -> None:
    embedder, provider = make(max_batch_size=10, concurrency=2)
    sink = BrokenSink(batches=3)

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
async def test_an_error_of_a_store_that_is_not_ours_is_raised_as_it_is(where: str, error: Exception) -> None:
    class Foreign(BrokenSink):
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
async def test_nobody_who_waits_for_a_slot_sends_when_a_store_has_failed(error: Exception) -> None:
    class Full(BrokenSink):
        async def write(self, model: str, rows: Sequence[Row]) -> Any:
            await asyncio.sleep(0)
            raise error

    embedder, provider = make(max_batch_size=10, concurrency=1)
    with pytest.raises(type(error)):
        await ingest(records(100), embedder, Full(batches=0))
    assert sent(provider) == 10


async def test_a_run_that_is_asked_to_end_stores_what_is_under_way_and_says_so(open_store: OpenStore) -> None:
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
        assert sent(provider) == report.success_count


async def test_a_silent_source_is_left_when_the_run_is_asked_to_end(open_store: OpenStore) -> None:
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


async def test_what_waits_for_company_is_sent_when_the_source_falls_silent(open_store: OpenStore) -> None:
    embedder, _ = make()
    first_is_stored = asyncio.Event()

    async def source() -> AsyncIterator[Record]:
        yield Record("a", "text")
        await first_is_stored.wait()
        yield Record("b", "text b")

    def on_progress(progress: Progress) -> None:
        if progress.done:
            first_is_stored.set()

    async with open_store() as sink:
        report = await ingest(source(), embedder, sink, on_progress=on_progress)
    assert report.success_count == 2


async def test_an_error_of_the_source_is_raised_as_it_is_after_storing_what_came_before(
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


async def test_the_deadline_ends_the_run_with_a_report(open_store: OpenStore) -> None:
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


@pytest.mark.parametrize("step", range(1, 60, 2))
async def test_cancelled_anywhere_only_whole_batches_are_stored_and_nothing_is_left(
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


async def test_memory_does_not_grow_with_the_number_of_records(open_store: OpenStore) -> None:
    embedder, provider = make(max_batch_size=200)

    def source(first: int, count: int) -> Iterator[Record]:
        for number in range(first, first + count):
            provider.requests.clear()  # the fake's own memory does grow
            yield Record(number, f"text {number} " * 20)

    async def peak(count: int, first: int) -> int:
        gc.collect()
        tracemalloc.start()
        await ingest(source(first, count), embedder, sink)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    async with open_store() as sink:
        await peak(2_000, 0)
        small = await peak(4_000, 10_000)
        # at times all batches are in memory at once, whatever their number; growth would be there each time
        large = min([await peak(16_000, first) for first in (100_000, 200_000)])
    assert large < 2 * small  # of four times as many records


# ---- how a run ends ----


@pytest.mark.parametrize("deadline", [0.03 * step for step in range(1, 9)])
async def test_a_report_tells_of_what_is_stored_and_of_nothing_else_whenever_the_deadline_comes(
    open_store: OpenStore, deadline: float
) -> None:
    # a batch whose COMMIT was under way was told as failed, and was in the store
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


class Blocked:
    """A sink that does not come back from one of its calls, until it is cancelled."""

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
async def test_a_store_that_does_not_come_back_does_not_keep_a_run_from_ending(
    open_store: OpenStore, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.sending.context.STORING_S", 0.05)
    monkeypatch.setattr("asyncembed.pipeline.ingestion.STORING_S", 0.05)
    embedder, _ = make()
    stop = asyncio.Event()
    async with open_store() as sink:
        await ingest(records(3), embedder, sink)
        blocked = Blocked(sink, call)
        run = asyncio.create_task(ingest(records(3, first=3), embedder, blocked, stop=stop, prune=True))
        await blocked.reached.wait()
        stop.set()
        report = await run
        assert report.seen == report.success_count == await sink.count() - 3 == (3 if call == "delete" else 0)
        assert report.failures == []


async def test_changes_that_are_far_apart_go_out_together(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(20_000), embedder, sink)
        provider.requests.clear()
        some = [
            Record(record.id, record.text + (" changed" if number % 1_500 == 0 else ""))
            for number, record in enumerate(records(20_000))
        ]
        report = await ingest(some, embedder, sink)
    assert (report.success_count, report.requests) == (14, 1)


class Lazy(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise ConnectionError("the row is gone: secret text")

    def __iter__(self) -> Iterator[str]:
        return iter(("id", "text"))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param({"id": 1, "title": np.array([1, 2]), "content": "x"}, id="an array for a title"),
        pytest.param({"id": 1, "title": 0, "content": "x"}, id="a number for a title"),
        pytest.param(Lazy(), id="a mapping that raises"),
        pytest.param(dict, id="a class"),
    ],
)
async def test_a_record_that_cannot_be_read_fails_alone(open_store: OpenStore, odd: Any) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        report = await ingest([("a", "one"), odd, ("b", "two")], embedder, sink)
        assert (report.success_count, report.failed_count) == (2, 1)
        assert report.failures[0].index == 1
        assert "secret" not in str(report.failures[0].error)
    embedder, _ = make()
    assert [item.error is None async for item in embedder.stream([("a", "one"), odd, ("b", "two")])] == [
        True,
        False,
        True,
    ]


class Uncounted(list[Any]):
    def __len__(self) -> int:
        raise ValueError("not known yet")


async def test_a_source_that_does_not_know_its_length_has_none(open_store: OpenStore) -> None:
    embedder, _ = make()
    told: list[Progress] = []
    async with open_store() as sink:
        report = await ingest(Uncounted(records(3)), embedder, sink, on_progress=told.append)
    assert report.success_count == 3
    assert told[-1].total is None


async def test_few_texts_of_many_records_do_not_empty_the_source(tmp_path: Path) -> None:
    taken = 0
    taken_at_first: list[int] = []

    def endless() -> Iterator[Record]:
        nonlocal taken
        for number in range(20_000):
            taken += 1
            yield Record(number, f"text {number % 3}")

    def script(number: int, texts: Sequence[str]) -> None:
        taken_at_first.append(taken)

    embedder = Embedder("fake", provider=FakeProvider(script, latency_s=0.1), max_batch_size=64, concurrency=2)
    async with embedder, SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest(endless(), embedder, sink)
        assert report.success_count == await sink.count() == 20_000
    assert taken_at_first[0] <= embedder.max_in_flight + 2 * 1_000
    assert max(later - earlier for earlier, later in pairwise(taken_at_first)) <= embedder.max_in_flight + 2 * 1_000


@pytest.mark.parametrize("sink", [None, "vectors.db", object()])
async def test_what_is_no_sink_is_refused_with_what_to_pass(sink: Any) -> None:
    with pytest.raises(TypeError, match=r"open_sink"):
        await ingest(records(1), Embedder("fake", provider=FakeProvider()), sink)


async def test_a_callback_that_would_have_to_be_awaited_is_refused(tmp_path: Path) -> None:
    async def tell(progress: object) -> None: ...

    embedder = Embedder("fake", provider=FakeProvider())
    with pytest.raises(TypeError, match="coroutine function"):
        await ingest(records(1), embedder, SQLiteSink(tmp_path / "vectors.db"), on_progress=tell)
    with pytest.raises(TypeError, match="coroutine function"):
        await embedder.embed(["a"], on_progress=tell)
