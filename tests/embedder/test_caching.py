"""Hits, misses, duplicates and failures in one call, and in calls at once: the right vector in the right row."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncembed import Embedder, MemoryCache, Record, SQLiteCache, SQLiteSink, ingest
from asyncembed.batching.batch import Outcome
from asyncembed.batching.texts import Text
from asyncembed.embedder.caching import PUT_FIRST_S, CacheClient, CachingReceiver
from asyncembed.errors import (
    AllFailedError,
    BadRequestError,
    ConfigError,
    DeadlineError,
    FatalProviderError,
    QuotaError,
    SinkError,
    TransportError,
)
from asyncembed.report import EmbeddingResult, Progress
from asyncembed.sending.context import CallContext
from asyncembed.testing import EmbeddingServer, embedding_of
from asyncembed.types import ProviderInfo, Reply, Vectors
from tests.caches.keys import in_one_turn
from tests.embedder.test_cancellation import cancelled_at
from tests.fakes import FakeProvider, Script, vector_of

Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def a_slow_disk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is answered finds it in the file, however busy this machine is."""
    monkeypatch.setattr("asyncembed.embedder.caching.PUT_FIRST_S", 10.0)


def make(cache: Any, script: Script | None = None, **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script, latency_s=options.pop("latency_s", 0))
    provider.info = ProviderInfo(dimensions=options.pop("knows", 4))
    return Embedder("fake", provider=provider, cache=cache, **options), provider


def sent(provider: FakeProvider) -> list[str]:
    return [text for request in provider.requests for text in request]


def many(first: int = 0, last: int = 100) -> list[str]:
    """Too many for a call that shares requests."""
    return [f"text {number}" for number in range(first, last)]


def right(vectors: Any, texts: Sequence[str]) -> None:
    assert len(vectors) == len(texts)
    for vector, text in zip(vectors, texts, strict=True):
        np.testing.assert_array_equal(vector, vector_of(text))


class Recorded:
    """A cache of a user's own: a dict, and a list of what was asked."""

    def __init__(self) -> None:
        self.vectors: dict[bytes, Any] = {}
        self.asked: list[int] = []
        self.closed = False

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        self.asked.append(len(keys))
        await asyncio.sleep(0)
        return {key: self.vectors[key] for key in keys if key in self.vectors}

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        await asyncio.sleep(0)
        self.vectors.update({key: vector.copy() for key, vector in vectors.items()})

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture(params=["memory", "sqlite", "own"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    makes: dict[str, Make] = {
        "memory": MemoryCache,
        "sqlite": lambda: SQLiteCache(tmp_path / "cache.db"),
        "own": Recorded,
    }
    return makes[request.param]()


# ---- what is paid for


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_what_was_embedded_before_is_neither_sent_nor_billed(cache: Any, count: int) -> None:
    embedder, provider = make(cache)
    texts = many(0, count)
    first = await embedder.embed(texts)
    second = await embedder.embed([*texts, texts[0], "new"])

    assert sent(provider) == [*texts, "new"]
    right(first.embeddings, texts)
    right(second.embeddings, [*texts, texts[0], "new"])
    assert (first.cache_hits, first.cache_misses) == (0, count)
    assert (second.cache_hits, second.cache_misses) == (count, 1)
    assert (second.total_tokens, second.requests) == (len("new"), 1)
    await cache.aclose()


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_a_call_that_is_all_hits_sends_no_request_and_loads_no_vocabulary(
    cache: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, provider = make(cache)
    texts = [text * 1_000 for text in many(0, count)]
    await embedder.embed(texts)
    provider.requests.clear()

    async def none(_: str) -> Any:
        raise AssertionError("the vocabulary was loaded")

    monkeypatch.setattr("asyncembed.embedder.embedder.load_counter", none)
    result = await embedder.embed(texts)
    right(result.embeddings, texts)
    assert provider.requests == []
    assert (result.total_tokens, result.requests, result.cost_usd) == (0, 0, None)
    await cache.aclose()


async def test_embed_one_stream_and_ingest_use_the_same_vectors(cache: Any, tmp_path: Path) -> None:
    embedder, provider = make(cache)
    texts = many(0, 50)
    await embedder.embed(texts)
    provider.requests.clear()

    right([await embedder.embed_one(texts[7])], [texts[7]])
    right([item.vector async for item in embedder.stream(texts)], texts)
    async with SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest([(number, text) for number, text in enumerate(texts)], embedder, sink)
        hits = await sink.search(vector_of(texts[9]), k=1)

    assert provider.requests == []
    assert (report.success_count, report.cache_hits, report.cache_misses, report.total_tokens) == (50, 50, 0, 0)
    assert hits[0].text == texts[9]
    await cache.aclose()


async def test_what_embed_one_stream_and_ingest_embed_is_kept(cache: Any, tmp_path: Path) -> None:
    embedder, provider = make(cache)
    await embedder.embed_one("one")
    right([item.vector async for item in embedder.stream(["streamed"])], ["streamed"])
    async with SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest([("id", "ingested")], embedder, sink)
    assert (report.cache_hits, report.cache_misses) == (0, 1)
    provider.requests.clear()

    right((await embedder.embed(["one", "streamed", "ingested"])).embeddings, ["one", "streamed", "ingested"])
    assert provider.requests == []
    await cache.aclose()


async def test_a_text_that_fails_is_not_kept_and_a_job_without_a_cache_counts_nothing(cache: Any) -> None:
    bad = [True]
    embedder, _ = make(
        cache, lambda _, texts: BadRequestError("HTTP 400", status=400) if bad[0] and "poison" in texts else None
    )
    for texts in (["a", "poison"], [*many(), "poison"]):
        assert (await embedder.embed(texts)).failed_indices == [len(texts) - 1]
        with pytest.raises(AllFailedError):
            await embedder.embed(["poison"])
    bad[0] = False
    right([await embedder.embed_one("poison")], ["poison"])

    plain, _ = make(None)
    result = await plain.embed(many())
    assert (result.cache_hits, result.cache_misses) == (0, 0)
    await cache.aclose()


async def test_a_hit_in_memory_is_answered_without_waiting_for_anything() -> None:
    embedder, provider = make(True)
    await embedder.embed_one("a")
    assert in_one_turn(embedder.embed_one("a"))
    assert not in_one_turn(embedder.embed_one("b"))
    assert len(provider.requests) == 1


async def test_who_alters_a_vector_alters_only_his_own(cache: Any) -> None:
    embedder, _ = make(cache)
    for _ in range(3):
        vector = await embedder.embed_one("a")
        right([vector], ["a"])
        vector[:] = 0
        result = await embedder.embed(["a", "b", "a"])
        right(result.embeddings, ["a", "b", "a"])
        result.embeddings[:] = 0
        async for item in embedder.stream(["a"]):
            assert item.vector is not None
            right([item.vector], ["a"])
            item.vector[:] = 0
    await cache.aclose()


# ---- keys


@pytest.mark.parametrize(
    ("option", "value"),
    [("dimensions", 3), ("too_long", "mean"), ("max_tokens_per_text", 5_000), ("max_tokens_per_batch", 6_000)],
)
async def test_what_decides_a_vector_is_part_of_its_key(option: str, value: object) -> None:
    cache = MemoryCache()
    await make(cache)[0].embed(["a"])
    embedder, provider = make(cache, **{option: value})
    await embedder.embed(["a"])
    assert sent(provider) == ["a"]
    again, provider = make(cache, **{option: value})
    if option != "dimensions":  # the fake gives four whatever it is asked for
        await again.embed(["a"])
        assert provider.requests == []


async def test_another_model_and_another_place_have_keys_of_their_own() -> None:
    class Elsewhere(FakeProvider):
        base_url = "https://elsewhere.example/v1"

    cache = MemoryCache()
    await make(cache)[0].embed(["a"])
    for model, provider in (("other", FakeProvider()), ("fake", Elsewhere())):
        provider.latency_s = 0
        await Embedder(model, provider=provider, cache=cache).embed(["a"])
        assert sent(provider) == ["a"], model
    assert len(cache) == 3


async def test_keys_are_hashes_of_texts_and_stay_the_same() -> None:
    cache = Recorded()
    await make(cache)[0].embed(["a secret", "é"])
    # spelled out here, since files of caches outlive releases
    settings_ = (
        '{"dimensions": null, "model": "fake", "place": "tests.fakes.FakeProvider", '
        '"tokens_per_text": 8192, "too_long": "error"}'
    )
    prefix = hashlib.sha256(settings_.encode()).digest()
    assert set(cache.vectors) == {hashlib.sha256(prefix + text.encode()).digest() for text in ("a secret", "é")}


# ---- sizes and numbers that are not to be believed


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(np.full(4, np.nan, np.float32), id="NaN"),
        pytest.param(np.array([1, 2, np.inf, 4], np.float32), id="infinite"),
        pytest.param(np.zeros(4), id="float64"),
        pytest.param(np.zeros((1, 4), np.float32), id="a matrix"),
        pytest.param(np.zeros(0, np.float32), id="nothing"),
        pytest.param([0.0] * 4, id="a list"),
        pytest.param("text", id="a str"),
        pytest.param(None, id="None"),
    ],
)
@pytest.mark.parametrize("count", [1, 3, 100], ids=["embed_one", "a small call", "a job"])
async def test_what_is_no_vector_is_a_miss_and_replaced(kept: object, count: int) -> None:
    cache = Recorded()
    embedder, provider = make(cache)
    texts = many(0, count)
    await embedder.embed(texts)
    provider.requests.clear()
    key = next(key for key, vector in cache.vectors.items() if np.array_equal(vector, vector_of(texts[0])))
    cache.vectors[key] = kept

    for _ in range(2):
        vectors = [await embedder.embed_one(texts[0])] if count == 1 else (await embedder.embed(texts)).embeddings
        right(vectors, texts)
    assert sent(provider) == texts[:1]


class Sized(FakeProvider):
    """Knows its size from the first reply on, as a real one does."""

    def __init__(self, size: int) -> None:
        super().__init__(latency_s=0)
        self.dimensions: int | None = None
        self.size = size

    async def embed(self, texts: Sequence[str]) -> Reply:
        reply = await super().embed(texts)
        self.dimensions = self.size
        return Reply(np.resize(reply.vectors, (len(texts), self.size)), reply.tokens)


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_vectors_of_another_size_than_the_models_are_misses(count: int) -> None:
    cache, texts = MemoryCache(), many(0, count)
    await Embedder("fake", provider=Sized(3), cache=cache).embed(texts)

    provider = Sized(5)
    embedder = Embedder("fake", provider=provider, cache=cache)
    result = await embedder.embed([*texts, "new"])  # at first nobody knows the size
    assert result.embeddings.shape == (count + 1, 5)
    assert sorted(sent(provider)) == sorted([*texts, "new"])
    assert (result.cache_hits, result.cache_misses) == (0, count + 1)
    assert (await embedder.embed(texts)).cache_hits == count


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_while_nobody_knows_the_size_the_caches_word_counts_if_nothing_is_missing(count: int) -> None:
    cache, texts = MemoryCache(), many(0, count)
    await Embedder("fake", provider=Sized(3), cache=cache).embed(texts)
    provider = Sized(5)
    result = await Embedder("fake", provider=provider, cache=cache).embed(texts)
    assert result.embeddings.shape == (count, 3)
    assert (provider.requests, result.cache_hits) == ([], count)


async def test_a_reply_tells_the_size_where_the_provider_does_not() -> None:
    embedder, provider = make(MemoryCache(), knows=None)
    await embedder.embed(["a"])
    result = await embedder.embed(["a", "b"])
    assert (result.cache_hits, result.cache_misses) == (1, 1)
    assert sent(provider) == ["a", "b"]


async def test_hits_go_after_the_first_reply_while_nobody_knows_the_size_and_count_once() -> None:
    cache, texts = MemoryCache(), many()
    await Embedder("fake", provider=Sized(4), cache=cache).embed(texts)
    provider = Sized(4)
    result = await Embedder("fake", provider=provider, cache=cache).embed(["new", *texts])
    right(result.embeddings, ["new", *texts])
    assert sent(provider) == ["new"]
    assert (result.cache_hits, result.cache_misses) == (100, 1)


async def test_a_stream_never_mixes_sizes() -> None:
    cache = MemoryCache()
    await Embedder("fake", provider=Sized(3), cache=cache).embed(many(0, 50))
    embedder = Embedder("fake", provider=Sized(5), cache=cache)
    items = [item async for item in embedder.stream(many(0, 60))]
    assert [item.vector.size for item in items if item.vector is not None] == [3] * 50
    assert all("empty the cache" in str(item.error) for item in items[50:])
    items = [item async for item in embedder.stream(many(0, 60))]  # now the size is known
    assert [item.vector.size for item in items if item.vector is not None] == [5] * 60


# ---- a cache that breaks


class Broken(Recorded):
    def __init__(self, get: Exception | None = None, put: Exception | None = None) -> None:
        super().__init__()
        self._errors = (get, put)

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        if self._errors[0]:
            raise self._errors[0]
        return await super().get(keys)

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        if self._errors[1]:
            raise self._errors[1]
        await super().put(vectors)


@pytest.mark.parametrize("what", ["get", "put"])
async def test_a_cache_that_breaks_fails_no_call_and_is_told_once_without_what_it_said(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = OSError("redis://user:secret@host gave up on the text text 7")
    embedder, provider = make(Broken(**{what: error}))
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            right((await embedder.embed(many())).embeddings, many())
            right([await embedder.embed_one("a")], ["a"])
            right([item.vector async for item in embedder.stream(["b"])], ["b"])
    assert len(sent(provider)) == 2 * 102
    told = [record.getMessage() for record in caplog.records if "cache" in record.getMessage()]
    assert len(told) == 1
    assert "OSError" in told[0]
    assert "secret" not in caplog.text
    assert "text 7" not in caplog.text


async def test_a_get_that_returns_nonsense_is_a_miss() -> None:
    class Nonsense(Recorded):
        async def get(self, keys: Sequence[bytes]) -> Any:
            return None

    embedder, _ = make(Nonsense())
    right((await embedder.embed(many())).embeddings, many())


async def test_a_cache_that_can_never_work_is_said_at_first_use(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"no database" * 500)
    embedder, provider = make(tmp_path / "cache.db")
    with pytest.raises(ConfigError, match="not an SQLite database"):
        await embedder.embed_one("a")
    for texts in (["a"], many()):
        with pytest.raises(ConfigError, match="not an SQLite database"):
            await embedder.embed(texts)
    with pytest.raises(ConfigError, match="not an SQLite database"):
        [item async for item in embedder.stream(["a"])]
    assert provider.requests == []
    await embedder.aclose()


async def test_a_file_that_breaks_later_fails_no_call(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    embedder, _ = make(path)
    await embedder.embed(many())
    database = sqlite3.connect(path)
    database.execute("DROP TABLE vectors")
    database.close()
    right((await embedder.embed(many())).embeddings, many())
    await embedder.aclose()


# ---- what the option takes, and who closes


@pytest.mark.parametrize("option", [1, 0.5, object(), MemoryCache, {}, b"cache.db"])
def test_an_option_that_is_no_cache_is_refused(option: Any) -> None:
    with pytest.raises(ConfigError, match="cache"):
        make(option)


async def test_a_cache_that_was_handed_in_is_not_closed_and_one_that_was_made_is(tmp_path: Path) -> None:
    handed_in = Recorded()
    async with make(handed_in)[0] as embedder:
        await embedder.embed(["a"])
    assert not handed_in.closed

    embedder, _ = make(tmp_path / "cache.db")
    await embedder.embed(["a"])
    await embedder.aclose()
    assert os.listdir(tmp_path) == ["cache.db"]  # SQLite deletes the log when the file is closed
    right([await embedder.embed_one("a")], ["a"])  # it is opened again
    await embedder.aclose()

    embedder, _ = make(True)
    await embedder.embed(["a"])
    await embedder.aclose()
    assert len(embedder._own_cache) == 0  # type: ignore[arg-type]
    assert make(False)[0]._cache is None


async def test_each_text_that_was_asked_for_counts_once_in_the_statistics() -> None:
    embedder, _ = make(True)
    await embedder.embed_one("a")
    await embedder.embed_one("a")
    await embedder.embed(["a", "b", "b"])
    await embedder.embed([*many(), "a"])
    await embedder.embed(many())
    stats = embedder.stats()
    assert (stats.cache_hits, stats.cache_misses) == (1 + 1 + 1 + 100, 1 + 1 + 100)


# ---- with a real server


async def test_the_file_answers_for_a_server_whose_size_nobody_knows_until_it_replies(tmp_path: Path) -> None:
    def right_here(result: EmbeddingResult, texts: Sequence[str]) -> None:
        for index, text in enumerate(texts):
            np.testing.assert_array_equal(result[index], embedding_of(text, dimensions=8, model="fake"))

    with EmbeddingServer(dimensions=8).in_thread() as server:
        options: dict[str, Any] = {"base_url": server.base_url, "api_key": "none", "cache": tmp_path / "cache.db"}
        async with Embedder("fake", **options) as embedder:
            right_here(await embedder.embed(many()), many())
        async with Embedder("fake", **options) as embedder:
            assert embedder.dimensions is None
            result = await embedder.embed(many())
            right_here(result, many())
            assert (result.requests, result.cache_hits) == (0, 100)
            result = await embedder.embed(many(50, 150))
            right_here(result, many(50, 150))
            assert (result.cache_hits, result.cache_misses) == (50, 50)
            assert result.total_tokens == sum(request.billed_tokens for request in server.requests[-result.requests :])
            stats = embedder.stats()
            assert (stats.cache_hits, stats.cache_misses, stats.texts) == (150, 50, 50)
        async with Embedder("another", **options) as embedder:
            assert (await embedder.embed(many())).cache_hits == 0


async def test_progress_counts_hits_as_done() -> None:
    embedder, _ = make(True, max_batch_size=10)
    await embedder.embed(many())
    seen: list[Progress] = []
    await embedder.embed(many(0, 120), on_progress=seen.append)
    assert [progress.done for progress in seen] == [100, 110, 120]
    assert [progress.requests for progress in seen] == [0, 2, 2]


# ---- calls at once


@pytest.mark.virtual_time
async def test_closing_ends_those_who_send_and_those_who_wait() -> None:
    embedder, _ = make(True, latency_s=1, max_batch_size=10, concurrency=1)
    calls = [asyncio.create_task(embedder.embed(many())) for _ in range(3)]
    await asyncio.sleep(2.5)
    await embedder.aclose(0)
    await asyncio.wait(calls)
    assert [type(call.exception()) for call in calls] == [TransportError] * 3
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_a_stream_hands_out_what_it_has_when_its_source_falls_silent() -> None:
    received = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await received.wait()
        yield "b"

    embedder, _ = make(True, latency_s=1)
    seen = []
    async for item in embedder.stream(source()):
        seen.append(item.record.text)
        received.set()
    assert seen == ["a", "b"]


@pytest.mark.virtual_time
async def test_who_waits_for_another_keeps_to_his_own_deadline() -> None:
    embedder, _ = make(True, latency_s=10)
    first = asyncio.create_task(embedder.embed(many()))
    await asyncio.sleep(0.1)
    began = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineError) as caught:
        await embedder.embed([*many(), "new"], deadline=3)
    assert asyncio.get_running_loop().time() - began == pytest.approx(3, abs=1e-3)
    assert len(caught.value.result.failures) == 101
    right((await first).embeddings, many())


@pytest.mark.virtual_time
async def test_an_interactive_call_waits_for_no_job() -> None:
    embedder, _ = make(True, latency_s=1, max_batch_size=10, concurrency=1)
    job = asyncio.create_task(embedder.embed(many()))  # ten seconds of requests
    await asyncio.sleep(0.5)
    began = asyncio.get_running_loop().time()
    right([await embedder.embed_one("text 99")], ["text 99"])
    assert asyncio.get_running_loop().time() - began < 3
    right((await job).embeddings, many())


@pytest.mark.virtual_time
@pytest.mark.parametrize("at", [0.5, 1.5, 2.5])
async def test_a_fatal_answer_keeps_what_the_cache_and_the_first_replies_brought(at: float) -> None:
    cache = MemoryCache()
    await make(cache)[0].embed(many(0, 50))
    embedder, _ = make(
        cache,
        lambda number, _: QuotaError("no money", status=429) if number >= at else None,
        latency_s=1,
        max_batch_size=10,
        concurrency=1,
    )
    with pytest.raises(FatalProviderError) as caught:
        await embedder.embed(many())
    result = caught.value.result
    done = 50 + 10 * int(at + 0.5)
    right([result[index] for index in range(done)], many(0, done))
    assert result.failed_indices == list(range(done, 100))
    assert len(cache) == done


@pytest.mark.virtual_time
@pytest.mark.parametrize("latency_s", [0.001, 1])
async def test_calls_cancelled_at_random_leave_nothing_behind_and_pay_little_twice(latency_s: float) -> None:
    dice = np.random.default_rng(7)
    embedder, provider = make(True, latency_s=latency_s, max_batch_size=20)

    async def call() -> None:
        await asyncio.sleep(dice.uniform(0, 20 * latency_s))
        texts = [f"text {number}" for number in dice.integers(0, 200, size=dice.choice([1, 5, 60]))]
        if len(texts) == 1:
            right([await embedder.embed_one(texts[0])], texts)
        else:
            right((await embedder.embed(texts)).embeddings, texts)

    tasks = [asyncio.create_task(call()) for _ in range(400)]
    for task in tasks[::3]:
        asyncio.get_running_loop().call_later(dice.uniform(0, 25 * latency_s), task.cancel)
    await asyncio.wait(tasks)
    assert {task.exception() for task in tasks if not task.cancelled()} == {None}
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert provider.in_flight == 0
    assert len(sent(provider)) < 1_000  # without a cache 8,800


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("count", [1, 3, 40], ids=["embed_one", "a small call", "a job"])
async def test_a_call_cancelled_at_any_step_leaves_nothing_and_whole_vectors(
    kind: str, count: int, tmp_path: Path
) -> None:
    cache = MemoryCache() if kind == "memory" else SQLiteCache(tmp_path / "cache.db")
    step, reached = 0, True
    while reached:
        step += 1
        embedder, provider = make(cache, max_batch_size=15)
        known, new = many(0, count), [f"{step}: {text}" for text in many(0, count)]
        await embedder.embed(known)

        async def work() -> None:
            if count == 1:
                right([await embedder.embed_one(new[0])], new)  # noqa: B023  # it ends within this round
            else:
                right((await embedder.embed([*new, *known])).embeddings, [*new, *known])  # noqa: B023

        reached = await cancelled_at(step, work)
        assert provider.in_flight == 0
        right((await embedder.embed([*known, *new])).embeddings, [*known, *new])
    await cache.aclose()
    assert step > 5


@pytest.mark.parametrize("kind", [MemoryCache, Recorded])
async def test_a_stream_that_is_left_early_leaves_nothing(kind: Make) -> None:
    cache = kind()
    await make(cache)[0].embed(many(0, 50))
    for left_at in (0, 10, 49, 50, 70):
        embedder, provider = make(cache, max_batch_size=10)
        async with aclosing(embedder.stream(many(0, 5_000))) as items:
            async for item in items:
                if item.record.id == left_at:
                    break
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert provider.in_flight == 0


# ---- properties

TEXTS = st.integers(0, 60).map(lambda number: f"text {number}")
CALLS = st.lists(st.lists(TEXTS, min_size=1, max_size=80), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["memory", "small", "sqlite", "own"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "at once"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=CALLS,
    known=st.sets(TEXTS, max_size=40),
    poison=st.sets(TEXTS, max_size=3),
    batch=st.integers(1, 40),
    knows=st.sampled_from([4, None]),
)
async def test_the_right_vector_is_in_the_right_row_whatever_is_known_doubled_or_bad(
    kind: str,
    together: bool,
    calls: list[list[str]],
    known: set[str],
    poison: set[str],
    batch: int,
    knows: int | None,
    tmp_path: Path,
) -> None:
    cache: Any = {
        "memory": MemoryCache,
        "small": lambda: MemoryCache(3_000),  # nine vectors: what was a hit just now may be gone
        "sqlite": lambda: SQLiteCache(tmp_path / f"{next(NUMBERS)}.db"),
        "own": Recorded,
    }[kind]()
    if known - poison:
        await make(cache)[0].embed(sorted(known - poison))
    embedder, provider = make(
        cache,
        lambda _, texts: BadRequestError("HTTP 400", status=400) if poison & set(texts) else None,
        max_batch_size=batch,
        knows=knows,
    )

    async def check(texts: list[str]) -> None:
        try:
            result = await embedder.embed(texts)
        except AllFailedError as error:
            assert set(texts) <= poison
            result = error.result
        assert result.failed_indices == [index for index, text in enumerate(texts) if text in poison]
        for index, text in enumerate(texts):
            if text not in poison:
                np.testing.assert_array_equal(result[index], vector_of(text))
        assert result.cache_hits + result.cache_misses == len(set(texts))

    if together:
        async with asyncio.TaskGroup() as group:
            for texts in calls:
                group.create_task(check(texts))
    else:
        for texts in calls:
            await check(texts)
    if kind != "small" and not together and knows:
        paid = [text for request in provider.requests if not poison & set(request) for text in request]
        assert set(paid).isdisjoint(known)
        assert all(paid.count(text) == 1 for text in paid), "paid twice"
    await cache.aclose()


NUMBERS = itertools.count()


# ---- ingest


async def test_what_was_paid_for_is_kept_even_if_the_store_refuses_it() -> None:
    class Full:
        async def prepare(self, model: str, dimensions: int | None) -> None: ...

        async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
            return set()

        async def write(self, model: str, rows: Sequence[Any]) -> Mapping[Any, Any]:
            raise SinkError("the disk is full")

    cache = MemoryCache()
    embedder, _ = make(cache)
    with pytest.raises(SinkError):
        await ingest([Record(1, "a"), Record(2, "b")], embedder, Full())
    assert len(cache) == 2


async def test_an_error_of_the_receiver_is_raised_after_the_vectors_were_stored() -> None:
    cache = MemoryCache()

    class Refusing:
        async def deliver(self, outcome: Outcome) -> None:
            raise KeyError("its own")

    caching = CachingReceiver(CacheClient(cache, {}, lambda: 4), CallContext(), Refusing())
    with pytest.raises(KeyError, match="its own"):
        await caching.deliver(Outcome([Text("a", [0])], np.zeros((1, 4), np.float32)))
    assert len(cache) == 1


class SlowStore:
    """Takes three seconds for a batch."""

    def __init__(self) -> None:
        self.stored: list[Any] = []

    async def prepare(self, model: str, dimensions: int | None) -> None: ...

    async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
        return set()

    async def write(self, model: str, rows: Sequence[Any]) -> Mapping[Any, Any]:
        await asyncio.sleep(3)
        self.stored.extend(row.id for row in rows)
        return {}


@pytest.mark.virtual_time
@pytest.mark.parametrize("known", [True, False], ids=["storing hits", "storing and keeping what came"])
async def test_an_ingest_that_is_cancelled_leaves_nothing_behind(known: bool) -> None:
    class SlowCache(Recorded):
        async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
            await asyncio.sleep(100)

    cache = MemoryCache() if known else SlowCache()
    if known:
        await make(cache)[0].embed(many())
    embedder, provider = make(cache)
    store = SlowStore()
    call = asyncio.create_task(ingest(list(enumerate(many())), embedder, store))
    await asyncio.sleep(1)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert (provider.in_flight, store.stored) == (0, [])


@pytest.mark.virtual_time
async def test_a_run_that_is_asked_to_end_stores_the_hits_it_has_begun_to_store() -> None:
    cache = MemoryCache()
    await make(cache)[0].embed(many(0, 3_000))
    embedder, _ = make(cache)
    store, stop = SlowStore(), asyncio.Event()
    asyncio.get_running_loop().call_later(1, stop.set)
    report = await ingest(list(enumerate(many(0, 3_000))), embedder, store, stop=stop)
    assert report.success_count == len(store.stored) > 0
    assert report.seen == report.success_count < 3_000


# ---- answers of one's own, and stores that do not answer ----


class FullCache:
    """Takes a second to say that it cannot take anything."""

    def __init__(self) -> None:
        self.puts = 0

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        return {}

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        self.puts += 1
        await asyncio.sleep(1)
        raise OSError

    async def aclose(self) -> None: ...


@pytest.mark.virtual_time
async def test_a_cache_that_cannot_be_written_keeps_nobody_waiting_and_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncembed.embedder.caching.PUT_FIRST_S", PUT_FIRST_S)
    cache = FullCache()
    embedder, _ = make(cache, latency_s=0)
    clock = asyncio.get_running_loop().time
    async with embedder:
        began_at = clock()
        await embedder.embed_one("a", deadline=0.5)
        assert clock() - began_at < 0.2
        await asyncio.sleep(1)
        for text in "bcd":
            await embedder.embed_one(text)
        assert cache.puts == 1
        await asyncio.sleep(10)
        await embedder.embed_one("e")
        assert cache.puts == 2
