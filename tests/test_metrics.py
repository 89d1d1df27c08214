"""`metrics` and `watching` through `Embedder`: what `stats()` counts, and what an observer is told."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

import asyncembed
from asyncembed import Embedder, Observer, Record, SQLiteSink, Stats, ingest
from asyncembed.errors import (
    AsyncEmbedError,
    BadRequestError,
    ConfigError,
    OverloadedError,
    QuotaError,
    RateLimitedError,
    ServerError,
    TransportError,
)
from asyncembed.metrics import Counters, RequestFinished, RequestStarted
from tests.fakes import FakeProvider, Script

SECRET = "the patient's name"


def make(script: Script | None = None, *, latency_s: float = 1.0, **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script, latency_s)
    return Embedder("fake", provider=provider, **options), provider


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


class Recorder:
    """An observer that keeps all it is told."""

    def __init__(self) -> None:
        self.started: list[RequestStarted] = []
        self.finished: list[RequestFinished] = []
        self.events: list[tuple[Any, ...]] = []

    def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], object]:
        self.started.append(started)
        return self.finished.append

    def caller(self) -> object:
        task = asyncio.current_task()
        return task and task.get_name()

    def queued(self, model: str, seconds: float, /) -> None:
        self.events.append(("queued", model, seconds))

    def paused(self, model: str, seconds: float, everybody: bool, /) -> None:
        self.events.append(("paused", model, seconds, everybody))

    def cached(self, model: str, hits: int, misses: int, /) -> None:
        self.events.append(("cached", model, hits, misses))


# ---- what is counted


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(20))
async def test_counts_are_the_sums_of_what_results_say(seed: int) -> None:
    chance = random.Random(seed)
    passing = [ServerError("HTTP 500"), TransportError("cut"), RateLimitedError("slow down", retry_after_s=1.0)]

    def script(number: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        if "text 13" in sent:
            return BadRequestError("no")
        return chance.choice(passing) if chance.random() < 0.2 else None

    embedder, provider = make(script, max_batch_size=50, max_retries=30)

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


async def test_counts_agree_with_a_report_of_ingest(tmp_path: Path) -> None:
    def script(number: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        return BadRequestError("no") if "text 13" in sent else None

    embedder, _ = make(script, latency_s=0.0, max_batch_size=10)
    async with SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest([Record(number, text) for number, text in enumerate(texts(50))], embedder, sink)

    stats = embedder.stats()
    assert (stats.texts, stats.texts_failed) == (report.success_count, report.failed_count) == (49, 1)
    assert (stats.requests, stats.retries, stats.tokens) == (report.requests, report.retries, report.total_tokens)


@pytest.mark.virtual_time
async def test_a_new_embedder_has_done_nothing() -> None:
    embedder, _ = make()
    assert embedder.stats() == Stats()
    assert embedder.stats().batch_fill is None
    assert embedder.stats().mean_request_s is None


@pytest.mark.virtual_time
async def test_a_snapshot_does_not_change() -> None:
    embedder, _ = make(lambda number, _: ServerError("HTTP 500") if number == 0 else None)
    await embedder.embed(["a"])
    before = embedder.stats()
    kept = asdict(before)

    await embedder.embed(["b"])

    assert asdict(before) == kept
    assert embedder.stats().requests == before.requests + 1
    with pytest.raises(FrozenInstanceError):
        before.requests = 0  # type: ignore[misc]


@pytest.mark.virtual_time
async def test_equal_texts_of_one_call_are_one() -> None:
    embedder, _ = make()
    await embedder.embed(["a", "b", "a"] * 20)
    assert embedder.stats().texts == 2


@pytest.mark.virtual_time
async def test_a_text_that_stands_in_for_others_is_not_counted_as_embedded_twice() -> None:
    # a batch that keeps failing makes the engine send a text that has passed before
    embedder, provider = make(
        lambda _, sent: ServerError("HTTP 500") if "poison" in sent else None, max_batch_size=4, concurrency=1
    )
    result = await embedder.embed([*texts(50), "poison"])

    assert result.failed_indices == [50]
    assert sum(map(len, provider.requests)) > 51 + 4  # some were sent more often
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
async def test_a_batch_is_as_full_as_the_limit_that_binds_it(
    options: dict[str, int], sent: list[str], fill: float
) -> None:
    embedder, _ = make(**options)
    await embedder.embed(sent)
    assert embedder.stats().batch_fill == pytest.approx(fill)


@pytest.mark.virtual_time
async def test_waiting_for_a_slot_is_told_from_being_held_up_by_the_rate() -> None:
    embedder, _ = make(concurrency=1, max_batch_size=40, latency_s=2.0)
    await embedder.embed(texts(120))

    stats = embedder.stats()
    assert stats.waited_s == pytest.approx(2.0 + 2.0, abs=0.01)  # the second and the third, each for the one before
    assert stats.held_s == 0


@pytest.mark.virtual_time
async def test_a_pause_and_a_backoff_are_counted_each_in_its_own_place() -> None:
    def script(number: int, _: Sequence[str]) -> AsyncEmbedError | None:
        return {0: RateLimitedError("slow down", retry_after_s=20.0), 1: ServerError("HTTP 500")}.get(number)

    embedder, _ = make(script)
    await embedder.embed(["a"])

    stats = embedder.stats()
    assert (stats.refusals, stats.pauses) == (1, 1)
    assert 20.0 <= stats.held_s <= 21.01
    assert stats.waited_s == pytest.approx(stats.held_s, abs=0.01)
    assert 0.5 <= stats.backoff_s <= 1.0  # the second failure in a row


@pytest.mark.virtual_time
async def test_a_limit_of_the_users_own_holds_requests_up() -> None:
    embedder, _ = make(max_batch_size=1, requests_per_minute=1, latency_s=0.0)
    await embedder.embed(["a", "b", "c"])

    # the second is held for a minute, and the third, when it is first, for another
    assert embedder.stats().held_s == pytest.approx(120, rel=0.02)
    assert embedder.stats().waited_s == pytest.approx(180, rel=0.02)


@pytest.mark.virtual_time
async def test_an_answer_to_another_request_does_not_shorten_what_one_was_held() -> None:
    embedder, _ = make(max_batch_size=1, requests_per_minute=1, latency_s=30.0)
    await embedder.embed(["a", "b"])
    assert embedder.stats().held_s == pytest.approx(60, rel=0.02)


@pytest.mark.virtual_time
async def test_the_time_in_which_calls_gather_is_their_queue_time() -> None:
    embedder, _ = make()
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):  # two shared requests may be under way at once
            group.create_task(embedder.embed_one(name))
            await asyncio.sleep(0.25)
        for name in ("c", "d", "d"):
            group.create_task(embedder.embed_one(name))
        await asyncio.sleep(0)
        assert embedder.stats().gathering == 2  # texts: who asks for an equal one waits for the same

    stats = embedder.stats()
    assert stats.calls_queued == 5
    assert stats.queue_max_s == pytest.approx(0.5, abs=0.01)  # until the first request is answered
    assert stats.queue_s == pytest.approx(3 * 0.5, abs=0.01)
    assert (stats.requests, stats.texts) == (3, 4)


@pytest.mark.virtual_time
async def test_calls_that_are_turned_away_are_counted() -> None:
    embedder, _ = make(max_waiting=2)
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):
            group.create_task(embedder.embed_one(name))
        await asyncio.sleep(0.5)
        with pytest.raises(OverloadedError):
            await embedder.embed_one("c")

    stats = embedder.stats()
    assert (stats.overloads, stats.calls_queued, stats.texts) == (1, 2, 2)


@pytest.mark.virtual_time
async def test_the_present_is_told_while_it_lasts() -> None:
    embedder, provider = make(concurrency=2, max_batch_size=40)
    running = asyncio.create_task(embedder.embed(texts(200)))
    await asyncio.sleep(0.5)

    now = embedder.stats()
    assert (now.requests, now.succeeded) == (2, 0)
    assert now.under_way == provider.in_flight == 2
    assert now.waiting == 1  # the worker beyond the slots
    await running
    assert embedder.stats().under_way == embedder.stats().waiting == 0


@pytest.mark.virtual_time
async def test_a_pause_is_told_as_long_as_it_lasts() -> None:
    embedder, _ = make(lambda number, _: RateLimitedError("slow", retry_after_s=10.0) if number == 0 else None)
    running = asyncio.create_task(embedder.embed(["a"]))
    await asyncio.sleep(6.0)  # answered after one second

    assert 5.0 <= embedder.stats().paused_for_s <= 5.6
    assert ", paused for 5." in str(embedder.stats())
    await running
    assert embedder.stats().paused_for_s == 0


@pytest.mark.virtual_time
async def test_a_request_that_nobody_waits_for_is_cancelled_and_no_failure() -> None:
    embedder, _ = make()
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
async def test_a_run_that_is_stopped_counts_its_texts_as_failed() -> None:
    embedder, _ = make(lambda *_: QuotaError("no money"), max_batch_size=40, concurrency=1)
    with pytest.raises(QuotaError):
        await embedder.embed(texts(400))
    assert embedder.stats().texts_failed == 400
    assert embedder.stats().failures == {"QuotaError": 1}


def test_the_counts_of_all_loops_are_summed_also_of_those_that_are_closed() -> None:
    embedder, _ = make(latency_s=0.0)

    for _ in range(3):
        asyncio.run(embedder.embed(texts(10)))
    threads = [threading.Thread(target=lambda: asyncio.run(embedder.embed(texts(10)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (embedder.stats().requests, embedder.stats().texts) == (7, 70)


async def test_another_thread_may_ask_while_requests_run() -> None:
    embedder, provider = make(latency_s=0.0, max_batch_size=1)
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


def test_adding_tallies_adds_every_field() -> None:
    one = Counters(**{each.name: 2 for each in fields(Counters) if each.name != "failures"}, failures={"A": 1, "B": 2})
    other = Counters(**{each.name: 3 for each in fields(Counters) if each.name != "failures"}, failures={"B": 3})

    one.add(other)

    expected = {each.name: 5 for each in fields(Counters)} | {"failures": {"A": 1, "B": 5}, "queue_max_s": 3}
    assert asdict(one) == expected


def test_a_snapshot_is_two_lines_to_read() -> None:
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


# ---- what an observer is told


@pytest.mark.virtual_time
async def test_an_observer_is_told_of_each_request_and_of_its_end() -> None:
    def script(number: int, _: Sequence[str]) -> AsyncEmbedError | None:
        return ServerError("HTTP 503", status=503) if number == 0 else None

    observer = Recorder()
    embedder, _ = make(script, observer=observer, max_batch_size=100)
    await embedder.embed(texts(50))

    first, second = observer.started
    assert (first.model, first.address, first.inputs, first.fill) == ("fake", None, 50, 0.5)
    assert (first.is_retry, second.is_retry) == (False, True)
    assert first.callers is None
    failure, success = observer.finished
    assert [failure.elapsed_s, success.elapsed_s] == pytest.approx([1.0, 1.0])
    assert (failure.error, failure.status, failure.tokens) == ("ServerError", 503, None)
    assert (success.error, success.status, success.tokens) == (None, None, sum(map(len, texts(50))))
    assert success.dimensions == 4
    [(kind, model, seconds, everybody)] = observer.events
    assert (kind, model, everybody) == ("paused", "fake", False)
    assert seconds == embedder.stats().backoff_s


@pytest.mark.virtual_time
async def test_a_shared_request_names_all_its_callers_in_the_order_they_came() -> None:
    observer = Recorder()
    embedder, _ = make(observer=observer)
    async with asyncio.TaskGroup() as group:
        for name in ("x", "y", "z"):
            group.create_task(embedder.embed_one(name), name=name)

    [started] = observer.started
    assert list(started.callers or ()) == ["x", "y", "z"]
    assert [event[0] for event in observer.events] == ["queued"] * 3


@pytest.mark.virtual_time
async def test_a_cancelled_request_ends_for_the_observer_too() -> None:
    observer = Recorder()
    embedder, _ = make(observer=observer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await embedder.embed_one("a")
    assert [finished.error for finished in observer.finished] == ["CancelledError"]


@pytest.mark.virtual_time
async def test_nothing_an_observer_is_told_holds_a_text() -> None:
    observer = Recorder()
    embedder, _ = make(lambda number, _: ServerError(f"no: {SECRET}") if number < 2 else None, observer=observer)
    await embedder.embed([SECRET] * 2)
    await embedder.embed_one(SECRET)

    assert len(observer.finished) == 4
    told = f"{observer.started}{observer.finished}{observer.events}{embedder.stats()!r}{embedder.stats()}"
    assert SECRET not in told


class Broken(Recorder):
    """Raises whatever it is told, or when a request has ended."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.calls = 0
        self._name = name

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "__dict__").get("_name"):
            return self._raise
        return super().__getattribute__(name)

    def _raise(self, *_: object) -> None:
        self.calls += 1
        raise LookupError("broken")


@pytest.mark.virtual_time
@pytest.mark.parametrize("name", ["request", "finish", "caller", "queued", "paused"])
async def test_an_observer_that_raises_harms_no_call_and_is_logged_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Broken(name)
    if name == "finish":
        observer.request = lambda started: observer._raise  # type: ignore[method-assign,assignment]
    embedder, _ = make(lambda number, _: ServerError("HTTP 500") if number == 0 else None, observer=observer)

    with caplog.at_level(logging.ERROR, "asyncembed"):
        assert not (await embedder.embed(texts(40))).failures
        for text in ("a", "b"):
            await embedder.embed_one(text)

    assert observer.calls >= 1
    [record] = caplog.records
    assert "the observer raised" in record.message
    assert embedder.stats().requests == 4


def test_an_observer_without_all_methods_is_refused_at_once() -> None:
    class Half:
        def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], object]:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Half"):
        make(observer=Half())
    with pytest.raises(ConfigError):
        make(observer=Recorder)  # the class, and not one of it
    assert isinstance(Recorder(), Observer)


@pytest.mark.virtual_time
async def test_lookups_in_a_cache_are_counted_and_told() -> None:
    observer = Recorder()
    embedder, provider = make(observer=observer, cache=True)
    first = await embedder.embed(texts(50))
    second = await embedder.embed([*texts(50), "new"])

    stats = embedder.stats()
    assert stats.cache_hits == first.cache_hits + second.cache_hits == 50
    assert stats.cache_misses == first.cache_misses + second.cache_misses == 51
    assert stats.texts == sum(map(len, provider.requests)) == 51  # what the cache answers is not embedded
    told = [event[2:] for event in observer.events if event[0] == "cached"]
    assert [sum(counts) for counts in zip(*told, strict=True)] == [50, 51]


def test_what_is_told_cannot_be_changed_by_who_is_told() -> None:
    finished = RequestFinished(elapsed_s=1.0)
    with pytest.raises(FrozenInstanceError):
        finished.tokens = 5  # type: ignore[misc]
    assert replace(finished, tokens=5).tokens == 5


# ---- log records

PACKAGE = Path(asyncembed.__file__).parent
CALL = re.compile(r"^\s+logger\.(debug|info|warning|error|exception)\(", re.MULTILINE)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_whoever_logs_is_in_the_table_with_its_levels(path: Path) -> None:
    levels = {"ERROR" if name == "exception" else name.upper() for name in CALL.findall(path.read_text())}
    name = ".".join(("asyncembed", *path.relative_to(PACKAGE).with_suffix("").parts))
    table = (PACKAGE.parent / "docs" / "observability.md").read_text()
    rows = re.findall(rf"^\| `{re.escape(name)}` (.*\n(?:\| \| .*\n)*)", table, re.MULTILINE)
    assert {level for row in rows for level in re.findall(r"^\|? ?\| (\w+) \|", row, re.MULTILINE)} == levels
