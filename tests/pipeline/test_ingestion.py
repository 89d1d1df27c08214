"""`ingest` into real stores: what is embedded, what is skipped, and what is reported."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder, Record, SQLiteSink, ingest
from asyncembed.errors import SinkConfigError
from asyncembed.report import Progress
from tests.fakes import FakeProvider
from tests.pipeline.ingests import assert_stored, make, records, sent_texts
from tests.stores import OpenStore


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
        await assert_stored(
            sink,
            {"a": "first", "b": "second", "c": "third", "4": "Title\nfourth", str(number): "fifth", "6": "sixth"},
        )


async def test_ingest_of_no_records_reports_zeros(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([], embedder, sink)
        assert (report.seen, report.requests, report.total_tokens) == (0, 0, 0)
    assert provider.requests == []


# ---- skipping


async def test_a_second_ingest_sends_nothing(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(5_000), embedder, sink)
        requests = len(provider.requests)

        report = await ingest(records(5_000), embedder, sink)

        assert (report.success_count, report.skipped_count, report.requests) == (0, 5_000, 0)
        assert len(provider.requests) == requests


async def test_only_changed_and_new_texts_are_embedded(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(100), embedder, sink)
        provider.requests.clear()

        changed = [*records(99), Record("id 99", "other"), Record("id 100", "new")]
        report = await ingest(changed, embedder, sink)

        assert (report.success_count, report.skipped_count) == (2, 99)
        assert provider.requests == [["other", "new"]]
        await assert_stored(sink, {str(record.id): record.text for record in changed})


async def test_without_skip_existing_everything_is_embedded_again(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        await ingest(records(10), embedder, sink)
        report = await ingest(records(10), embedder, sink, skip_existing=False)

        assert report.success_count == 10
        assert sent_texts(provider) == 20
        assert await sink.count() == 10


async def test_rows_of_another_model_are_stored_beside_the_first(open_store: OpenStore) -> None:
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


# ---- duplicates


@pytest.mark.parametrize("gap", [0, 1, 999, 1_000, 3_000])
async def test_the_last_record_of_an_id_wins_at_any_distance(open_store: OpenStore, gap: int) -> None:
    embedder, _ = make(max_batch_size=500)
    async with open_store() as sink:
        report = await ingest([Record("twice", "old"), *records(gap), Record("twice", "new")], embedder, sink)

        assert report.seen == gap + 2
        assert report.failed_count == 0
        await assert_stored(sink, {"twice": "new", **{str(record.id): record.text for record in records(gap)}})


async def test_a_duplicate_record_is_one_input_and_one_row(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([("a", "same"), ("a", "same")], embedder, sink)
        assert (report.success_count, report.skipped_count) == (1, 1)
        assert provider.requests == [["same"]]
        await assert_stored(sink, {"a": "same"})


async def test_a_number_and_its_digits_are_one_id(open_store: OpenStore) -> None:
    embedder, _ = make()
    async with open_store() as sink:
        await ingest([(5, "number"), ("5", "digits")], embedder, sink)
        await assert_stored(sink, {"5": "digits"})


async def test_duplicate_texts_of_different_records_are_sent_once_and_stored_for_each(open_store: OpenStore) -> None:
    embedder, provider = make()
    async with open_store() as sink:
        report = await ingest([("a", "same"), ("b", "same"), ("c", "other")], embedder, sink)
        assert report.success_count == 3
        assert provider.requests == [["same", "other"]]
        await assert_stored(sink, {"a": "same", "b": "same", "c": "other"})


# ---- progress


async def test_progress_adds_up_and_ends_at_the_total(open_store: OpenStore) -> None:
    embedder, _ = make(max_batch_size=100)
    seen: list[Progress] = []
    async with open_store() as sink:
        await ingest([*records(1_000), ("bad", "")], embedder, sink, on_progress=seen.append)

    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (1_001, 1_001, 1)


async def test_a_progress_callback_that_raises_is_logged_and_not_called_again(
    open_store: OpenStore, caplog: Any
) -> None:
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


class Uncounted(list[Any]):
    def __len__(self) -> int:
        raise ValueError("not known yet")


async def test_a_source_without_a_known_length_has_no_total(open_store: OpenStore) -> None:
    embedder, _ = make()
    seen: list[Progress] = []
    async with open_store() as sink:
        report = await ingest(Uncounted(records(3)), embedder, sink, on_progress=seen.append)
    assert report.success_count == 3
    assert seen[-1].total is None


# ---- batches and memory


async def test_a_partly_filled_batch_is_flushed_when_the_source_is_idle(open_store: OpenStore) -> None:
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


async def test_changes_that_are_far_apart_share_a_request(open_store: OpenStore) -> None:
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


async def test_few_texts_of_many_records_do_not_drain_the_source(tmp_path: Path) -> None:
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


async def test_memory_does_not_grow_with_the_number_of_records(open_store: OpenStore) -> None:
    embedder, provider = make(max_batch_size=200)

    def source(first: int, count: int) -> Iterator[Record]:
        for number in range(first, first + count):
            provider.requests.clear()  # or the fake provider's record would grow
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
        # a single run may happen to hold all its batches at once; real growth would be seen in each run
        large = min([await peak(16_000, first) for first in (100_000, 200_000)])
    assert large < 2 * small  # with four times as many records


# ---- arguments


@pytest.mark.parametrize("sink", [None, "vectors.db", object()])
async def test_an_object_that_is_not_a_sink_is_refused(sink: Any) -> None:
    with pytest.raises(TypeError, match=r"open_sink"):
        await ingest(records(1), Embedder("fake", provider=FakeProvider()), sink)


async def test_a_coroutine_function_as_progress_callback_is_refused(tmp_path: Path) -> None:
    async def on_progress(progress: object) -> None: ...

    embedder = Embedder("fake", provider=FakeProvider())
    with pytest.raises(TypeError, match="coroutine function"):
        await ingest(records(1), embedder, SQLiteSink(tmp_path / "vectors.db"), on_progress=on_progress)
    with pytest.raises(TypeError, match="coroutine function"):
        await embedder.embed(["a"], on_progress=on_progress)
