"""`metrics` through `Embedder`: what `stats()` counts."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

import asyncembed
from asyncembed import Record, SQLiteSink, Stats, ingest
from asyncembed.errors import (
    AsyncEmbedError,
    BadRequestError,
    OverloadedError,
    QuotaError,
    RateLimitedError,
    ServerError,
    TransportError,
)
from asyncembed.metrics import Counters, RequestFinished
from tests.fakes import make_embedder, texts

# ---- counts


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(20))
async def test_stats_are_the_sums_of_all_results(seed: int) -> None:
    chance = random.Random(seed)
    passing = [ServerError("HTTP 500"), TransportError("cut"), RateLimitedError("slow down", retry_after_s=1.0)]

    def script(number: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        if "text 13" in sent:
            return BadRequestError("no")
        return chance.choice(passing) if chance.random() < 0.2 else None

    embedder, provider = make_embedder(script, max_batch_size=50, max_retries=30)

    results = [await embedder.embed(texts(chance.randint(40, 300))) for _ in range(3)]

    stats = embedder.stats()
    assert stats.requests == len(provider.requests) == sum(result.requests for result in results)
    assert stats.retries == sum(result.retries for result in results)
    assert stats.tokens == sum(result.total_tokens for result in results)
    assert stats.texts == sum(len(result) - len(result.failures) for result in results)
    assert stats.texts_failed == sum(len(result.failures) for result in results) == 3
    assert stats.requests == stats.succeeded + sum(stats.failures.values())
    assert stats.failures["BadRequestError"] >= 3
    assert stats.refusals == stats.failures.get("RateLimitedError", 0)
    assert stats.request_s == pytest.approx(stats.requests * 1.0, abs=1e-3)
    assert (stats.under_way, stats.waiting, stats.gathering, stats.cancelled) == (0, 0, 0, 0)


async def test_stats_agree_with_the_report_of_ingest(tmp_path: Path) -> None:
    def script(number: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        return BadRequestError("no") if "text 13" in sent else None

    embedder, _ = make_embedder(script, latency_s=0.0, max_batch_size=10)
    async with SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest([Record(number, text) for number, text in enumerate(texts(50))], embedder, sink)

    stats = embedder.stats()
    assert (stats.texts, stats.texts_failed) == (report.success_count, report.failed_count) == (49, 1)
    assert (stats.requests, stats.retries, stats.tokens) == (report.requests, report.retries, report.total_tokens)


@pytest.mark.virtual_time
async def test_the_stats_of_a_new_embedder_are_zero() -> None:
    embedder, _ = make_embedder()
    assert embedder.stats() == Stats()
    assert embedder.stats().batch_fill is None
    assert embedder.stats().mean_request_s is None


@pytest.mark.virtual_time
async def test_a_snapshot_does_not_change() -> None:
    embedder, _ = make_embedder(lambda number, _: ServerError("HTTP 500") if number == 0 else None)
    await embedder.embed(["a"])
    before = embedder.stats()
    kept = asdict(before)

    await embedder.embed(["b"])

    assert asdict(before) == kept
    assert embedder.stats().requests == before.requests + 1
    with pytest.raises(FrozenInstanceError):
        before.requests = 0  # type: ignore[misc]


@pytest.mark.virtual_time
async def test_duplicate_texts_of_a_call_count_once() -> None:
    embedder, _ = make_embedder()
    await embedder.embed(["a", "b", "a"] * 20)
    assert embedder.stats().texts == 2


@pytest.mark.virtual_time
async def test_a_text_that_is_sent_again_as_a_probe_counts_once() -> None:
    # while a batch keeps failing, a text that has succeeded is sent again as a probe
    embedder, provider = make_embedder(
        lambda _, sent: ServerError("HTTP 500") if "poison" in sent else None, max_batch_size=4, concurrency=1
    )
    result = await embedder.embed([*texts(50), "poison"])

    assert result.failed_indices == [50]
    assert sum(map(len, provider.requests)) > 51 + 4  # some were sent more than once
    assert (embedder.stats().texts, embedder.stats().texts_failed) == (50, 1)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("options", "sent", "fill"),
    [
        pytest.param({"max_batch_size": 40}, texts(40), 1.0, id="full of inputs"),
        pytest.param({"max_batch_size": 160}, texts(40), 0.25, id="a quarter of the inputs"),
        pytest.param({"max_batch_size": 40}, texts(60), 0.75, id="one full, one half full"),
        pytest.param({"max_tokens_per_batch": 1_000}, ["x" * 500], 0.5, id="half of the tokens, few of the inputs"),
    ],
)
async def test_batch_fill_is_measured_by_the_limit_that_binds(
    options: dict[str, int], sent: list[str], fill: float
) -> None:
    embedder, _ = make_embedder(**options)
    await embedder.embed(sent)
    assert embedder.stats().batch_fill == pytest.approx(fill)


@pytest.mark.virtual_time
async def test_waiting_for_a_slot_is_not_counted_as_held_by_the_rate() -> None:
    embedder, _ = make_embedder(concurrency=1, max_batch_size=40, latency_s=2.0)
    await embedder.embed(texts(120))

    stats = embedder.stats()
    assert stats.waited_s == pytest.approx(
        2.0 + 2.0, abs=0.01
    )  # the second and the third request, each for the one before
    assert stats.held_s == 0


@pytest.mark.virtual_time
async def test_a_pause_and_a_backoff_are_counted_separately() -> None:
    def script(number: int, _: Sequence[str]) -> AsyncEmbedError | None:
        return {0: RateLimitedError("slow down", retry_after_s=20.0), 1: ServerError("HTTP 500")}.get(number)

    embedder, _ = make_embedder(script)
    await embedder.embed(["a"])

    stats = embedder.stats()
    assert (stats.refusals, stats.pauses) == (1, 1)
    assert 20.0 <= stats.held_s <= 21.01
    assert stats.waited_s == pytest.approx(stats.held_s, abs=0.01)
    assert 0.5 <= stats.backoff_s <= 1.0  # the second failure in a row


@pytest.mark.virtual_time
async def test_waiting_for_a_limit_of_the_user_is_counted_as_held() -> None:
    embedder, _ = make_embedder(max_batch_size=1, requests_per_minute=1, latency_s=0.0)
    await embedder.embed(["a", "b", "c"])

    # the second is held for a minute, and the third, when it is first, for another
    assert embedder.stats().held_s == pytest.approx(120, rel=0.02)
    assert embedder.stats().waited_s == pytest.approx(180, rel=0.02)


@pytest.mark.virtual_time
async def test_a_reply_to_another_request_does_not_shorten_the_held_time() -> None:
    embedder, _ = make_embedder(max_batch_size=1, requests_per_minute=1, latency_s=30.0)
    await embedder.embed(["a", "b"])
    assert embedder.stats().held_s == pytest.approx(60, rel=0.02)


@pytest.mark.virtual_time
async def test_the_time_until_a_shared_request_is_sent_is_queue_time() -> None:
    embedder, _ = make_embedder()
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):  # two shared requests may be in flight at a time
            group.create_task(embedder.embed_one(name))
            await asyncio.sleep(0.25)
        for name in ("c", "d", "d"):
            group.create_task(embedder.embed_one(name))
        await asyncio.sleep(0)
        assert embedder.stats().gathering == 2  # texts: duplicates count once

    stats = embedder.stats()
    assert stats.calls_queued == 5
    assert stats.queue_max_s == pytest.approx(0.5, abs=0.01)  # until the first request is answered
    assert stats.queue_s == pytest.approx(3 * 0.5, abs=0.01)
    assert (stats.requests, stats.texts) == (3, 4)


@pytest.mark.virtual_time
async def test_refused_calls_are_counted() -> None:
    embedder, _ = make_embedder(max_waiting=2)
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):
            group.create_task(embedder.embed_one(name))
        await asyncio.sleep(0.5)
        with pytest.raises(OverloadedError):
            await embedder.embed_one("c")

    stats = embedder.stats()
    assert (stats.overloads, stats.calls_queued, stats.texts) == (1, 2, 2)


@pytest.mark.virtual_time
async def test_stats_show_requests_in_flight_and_waiting() -> None:
    embedder, provider = make_embedder(concurrency=2, max_batch_size=40)
    running = asyncio.create_task(embedder.embed(texts(200)))
    await asyncio.sleep(0.5)

    now = embedder.stats()
    assert (now.requests, now.succeeded) == (2, 0)
    assert now.under_way == provider.in_flight == 2
    assert now.waiting == 1  # one batch more than there are slots
    await running
    assert embedder.stats().under_way == embedder.stats().waiting == 0


@pytest.mark.virtual_time
async def test_stats_show_a_pause_until_it_ends() -> None:
    embedder, _ = make_embedder(lambda number, _: RateLimitedError("slow", retry_after_s=10.0) if number == 0 else None)
    running = asyncio.create_task(embedder.embed(["a"]))
    await asyncio.sleep(6.0)  # the refusal comes after one second

    assert 5.0 <= embedder.stats().paused_for_s <= 5.6
    assert ", paused for 5." in str(embedder.stats())
    await running
    assert embedder.stats().paused_for_s == 0


@pytest.mark.virtual_time
async def test_a_cancelled_request_does_not_count_as_a_failure() -> None:
    embedder, _ = make_embedder()
    running = asyncio.create_task(embedder.embed(texts(40)))
    await asyncio.sleep(0.25)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    stats = embedder.stats()
    assert (stats.requests, stats.cancelled, stats.succeeded, stats.failures) == (1, 1, 0, {})
    assert stats.request_s == pytest.approx(0.25, abs=0.01)
    assert stats.mean_request_s == stats.request_s
    assert stats.under_way == 0


@pytest.mark.virtual_time
async def test_a_stopped_call_counts_its_texts_as_failed() -> None:
    embedder, _ = make_embedder(lambda *_: QuotaError("no money"), max_batch_size=40, concurrency=1)
    with pytest.raises(QuotaError):
        await embedder.embed(texts(400))
    assert embedder.stats().texts_failed == 400
    assert embedder.stats().failures == {"QuotaError": 1}


def test_stats_sum_all_event_loops_including_closed_ones() -> None:
    embedder, _ = make_embedder(latency_s=0.0)

    for _ in range(3):
        asyncio.run(embedder.embed(texts(10)))
    threads = [threading.Thread(target=lambda: asyncio.run(embedder.embed(texts(10)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (embedder.stats().requests, embedder.stats().texts) == (7, 70)


async def test_another_thread_may_read_stats_while_requests_run() -> None:
    embedder, provider = make_embedder(latency_s=0.0, max_batch_size=1)
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(embedder.stats().requests)

    watching = asyncio.create_task(asyncio.to_thread(watch))
    try:
        await embedder.embed(texts(200))
    finally:
        stop.set()
        await watching

    assert seen == sorted(seen)
    assert embedder.stats().requests == len(provider.requests) == 200


# ---- values


def test_adding_counters_adds_every_field() -> None:
    one = Counters(**{each.name: 2 for each in fields(Counters) if each.name != "failures"}, failures={"A": 1, "B": 2})
    other = Counters(**{each.name: 3 for each in fields(Counters) if each.name != "failures"}, failures={"B": 3})

    one.add(other)

    expected = {each.name: 5 for each in fields(Counters)} | {"failures": {"A": 1, "B": 5}, "queue_max_s": 3}
    assert asdict(one) == expected


def test_stats_are_printed_as_two_lines() -> None:
    stats = Stats(
        requests=1_200, retries=3, succeeded=1_197, failures={"ServerError": 1, "RateLimitedError": 2},
        texts=2_000_000, texts_failed=1, tokens=5_000_000, filled=1_140.0, request_s=600.0,
        under_way=8, waiting=2, gathering=17, paused_for_s=4.25,
    )  # fmt: skip
    assert str(stats).splitlines() == [
        "2,000,000 texts embedded, 1 failed; 1,200 requests of 0.500 s, 95% full, 5,000,000 tokens; "
        "3 retries (2 RateLimitedError, 1 ServerError)",
        "now 8 under way, 2 waiting, 17 texts gathering, paused for 4.2 s",
    ]
    assert str(Stats()).splitlines()[0] == "0 texts embedded, 0 failed; 0 requests, 0 tokens; 0 retries"


def test_events_for_an_observer_are_immutable() -> None:
    finished = RequestFinished(elapsed_s=1.0)
    with pytest.raises(FrozenInstanceError):
        finished.tokens = 5  # type: ignore[misc]
    assert replace(finished, tokens=5).tokens == 5


# ---- log records


PACKAGE = Path(asyncembed.__file__).parent


CALL = re.compile(r"^\s+logger\.(debug|info|warning|error|exception)\(", re.MULTILINE)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_that_logs_is_in_the_table_with_its_levels(path: Path) -> None:
    levels = {"ERROR" if name == "exception" else name.upper() for name in CALL.findall(path.read_text())}
    name = ".".join(("asyncembed", *path.relative_to(PACKAGE).with_suffix("").parts))
    table = (PACKAGE.parent / "docs" / "observability.md").read_text()
    rows = re.findall(rf"^\| `{re.escape(name)}` (.*\n(?:\| \| .*\n)*)", table, re.MULTILINE)
    assert {level for row in rows for level in re.findall(r"^\|? ?\| (\w+) \|", row, re.MULTILINE)} == levels
