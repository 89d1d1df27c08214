"""`ingest` through the real SDK, HTTP and stores, from a provider with many faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder, Record, ingest
from asyncembed.errors import AuthenticationError, QuotaError
from asyncembed.testing import (
    TEI,
    EmbeddingServer,
    Fault,
    InvalidKey,
    LoggedRequest,
    QuotaExceeded,
    Schedule,
    UnsupportedValue,
    embedding_of,
    first_of,
    mixed,
    poison,
    script,
)
from tests.stores import OpenStore

DIMENSIONS = 16


def embedder_at(server: EmbeddingServer, **options: Any) -> Embedder:
    return Embedder("fake", base_url=server.base_url, api_key="sk-test", **options)


def records(count: int) -> list[Record]:
    return [Record(f"id {number}", f"the text of number {number}") for number in range(count)]


async def check_rows(sink: Any, expected: list[Record]) -> None:
    """Every record is stored once, with the vector of its own text: that vector finds it first, with a score of 1."""
    assert await sink.count() == len(expected)
    for record in expected[:: max(1, len(expected) // 40)]:
        vector = embedding_of(record.text, dimensions=DIMENSIONS, model="fake")
        [hit] = await sink.search(vector, k=1)
        assert (hit.id, hit.text) == (record.id, record.text)
        assert hit.score == pytest.approx(1.0, abs=1e-5)


def sparing_single_texts(schedule: Schedule) -> Schedule:
    """Let no single text meet more than three faults: after five in a row it would be rejected (REJECT_AFTER)."""
    met: Counter[tuple[str, ...]] = Counter()

    def ask(request: LoggedRequest) -> Fault | None:
        fault = schedule(request)
        if request.inputs == 1 and fault is not None:
            met[request.texts] += 1
            return fault if met[request.texts] <= 3 else None
        return fault

    return ask


async def test_every_good_record_is_stored_once_when_a_third_of_the_requests_fail(open_store: OpenStore) -> None:
    poisons = {f"the text of number {number}" for number in (7, 2_500, 4_999)}
    bad_day = first_of(poison(poisons), sparing_single_texts(mixed(rate=0.3, seed=3)))
    good = [record for record in records(5_000) if record.text not in poisons]
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, faults=bad_day, keep_texts=False) as server,
        embedder_at(server, max_batch_size=100) as embedder,
        open_store() as sink,
    ):
        report = await ingest(records(5_000), embedder, sink)

        assert report.failed_ids == ["id 7", "id 2500", "id 4999"]
        assert (report.success_count, report.seen) == (4_997, 5_000)
        assert report.requests >= len(server.requests)  # a request on a connection that is cut may never be read
        await check_rows(sink, good)


async def test_a_text_that_always_breaks_the_server_fails_alone(open_store: OpenStore) -> None:
    broken = poison("the text of number 1000", UnsupportedValue())
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, faults=broken) as server,
        embedder_at(server) as embedder,
        open_store() as sink,
    ):
        report = await ingest(records(2_048), embedder, sink)

        assert report.failed_ids == ["id 1000"]
        assert len(server.requests) - 1 <= 30
        assert await sink.count() == 2_047


@pytest.mark.parametrize(
    ("fault", "error"), [(QuotaExceeded(), QuotaError), (InvalidKey(), AuthenticationError)], ids=["quota", "key"]
)
async def test_a_fatal_answer_during_a_run_costs_little_and_a_rerun_pays_only_for_the_rest(
    open_store: OpenStore, fault: Any, error: type[Exception]
) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, faults=script([None] * 5, then=fault)) as server,
        embedder_at(server, max_batch_size=50, concurrency=4) as embedder,
        open_store() as sink,
    ):
        with pytest.raises(error) as caught:
            await ingest(records(1_000), embedder, sink)

        report = caught.value.report  # type: ignore[attr-defined]
        assert report.success_count == await sink.count() == 250
        assert len(server.requests) <= 5 + 4
        assert report.success_count + report.failed_count + report.skipped_count == report.seen

        server.faults = script([])
        server.clear()
        assert (await ingest(records(1_000), embedder, sink)).skipped_count == 250
        assert sum(request.inputs for request in server.requests) == 750
        await check_rows(sink, records(1_000))


async def test_the_small_batch_limit_of_a_server_is_learned_and_used_fully(open_store: OpenStore) -> None:
    async with (
        EmbeddingServer(dialect=TEI, dimensions=DIMENSIONS) as server,
        embedder_at(server) as embedder,
        open_store() as sink,
    ):
        report = await ingest(records(3_000), embedder, sink)

        assert report.failed_count == 0
        refused = [request for request in server.requests if request.status != 200]
        assert len(refused) <= 8
        assert len(server.requests) - len(refused) <= 3_000 // 32 + 1 + 2
        await check_rows(sink, records(3_000))


async def test_a_job_over_a_rate_limit_ends_in_time_with_few_refusals(open_store: OpenStore) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, tokens_per_minute=600_000, filled=0, keep_texts=False) as server,
        embedder_at(server, max_batch_size=100) as embedder,
        open_store() as sink,
    ):
        loop = asyncio.get_running_loop()
        began = loop.time()
        report = await ingest(records(4_000), embedder, sink)

        weight = sum(request.weight for request in server.requests if request.status == 200)
        ideal_s = weight / 10_000
        refused = sum(request.status == 429 for request in server.requests)
        assert report.failed_count == 0
        assert loop.time() - began <= 1.10 * ideal_s + 0.5  # half a second for connections and vocabulary
        # the first eight requests are sent before any header has reported an empty bucket
        assert refused <= 0.02 * len(server.requests) + 8


async def test_two_concurrent_runs_into_one_store_do_not_break_each_other(open_store: OpenStore) -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS) as server,
        embedder_at(server, max_batch_size=50) as embedder,
        open_store() as one,
        open_store() as other,
    ):
        async with asyncio.TaskGroup() as group:
            for sink in (one, other):
                group.create_task(ingest(records(1_000), embedder, sink))
        await check_rows(one, records(1_000))


async def test_the_vectors_of_the_texts_are_returned_bit_by_bit() -> None:
    texts = [record.text for record in records(5_000)]
    async with EmbeddingServer(dimensions=DIMENSIONS) as server, embedder_at(server) as embedder:
        result = await embedder.embed(texts)
    expected = np.stack([embedding_of(text, dimensions=DIMENSIONS, model="fake") for text in texts])
    np.testing.assert_array_equal(result.embeddings, expected)
