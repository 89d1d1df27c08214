"""Calls with a cache: hits are not paid for, and each row has the vector of its text."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncembed import Embedder, MemoryCache, SQLiteCache, SQLiteSink, ingest
from asyncembed.errors import AllFailedError, BadRequestError
from asyncembed.report import EmbeddingResult, Progress
from asyncembed.testing import EmbeddingServer, embedding_of
from asyncembed.types import Reply
from tests.caches.keys import in_one_turn
from tests.embedder.cached import DictCache, make_cached, many, sent_texts
from tests.fakes import FakeProvider, assert_vectors, vector_of

Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def vectors_are_in_the_file_before_a_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, writing them may take longer than a call waits for that."""
    monkeypatch.setattr("asyncembed.embedder.dispatcher.PUT_FIRST_S", 10.0)


@pytest.fixture(params=["memory", "sqlite", "own"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    makes: dict[str, Make] = {
        "memory": MemoryCache,
        "sqlite": lambda: SQLiteCache(tmp_path / "cache.db"),
        "own": DictCache,
    }
    return makes[request.param]()


# ---- hits


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_a_cached_text_is_neither_sent_nor_billed(cache: Any, count: int) -> None:
    embedder, provider = make_cached(cache)
    texts = many(0, count)
    first = await embedder.embed(texts)
    second = await embedder.embed([*texts, texts[0], "new"])

    assert sent_texts(provider) == [*texts, "new"]
    assert_vectors(first.embeddings, texts)
    assert_vectors(second.embeddings, [*texts, texts[0], "new"])
    assert (first.cache_hits, first.cache_misses) == (0, count)
    assert (second.cache_hits, second.cache_misses) == (count, 1)
    assert (second.total_tokens, second.requests) == (len("new"), 1)
    await cache.aclose()


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_a_call_of_hits_sends_no_request_and_loads_no_vocabulary(
    cache: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, provider = make_cached(cache)
    texts = [text * 1_000 for text in many(0, count)]
    await embedder.embed(texts)
    provider.requests.clear()

    async def none(_: str) -> Any:
        raise AssertionError("the vocabulary was loaded")

    monkeypatch.setattr("asyncembed.embedder.embedder.load_counter", none)
    result = await embedder.embed(texts)
    assert_vectors(result.embeddings, texts)
    assert provider.requests == []
    assert (result.total_tokens, result.requests, result.cost_usd) == (0, 0, None)
    await cache.aclose()


async def test_embed_one_stream_and_ingest_read_the_cache(cache: Any, tmp_path: Path) -> None:
    embedder, provider = make_cached(cache)
    texts = many(0, 50)
    await embedder.embed(texts)
    provider.requests.clear()

    assert_vectors([await embedder.embed_one(texts[7])], [texts[7]])
    assert_vectors([item.vector async for item in embedder.stream(texts)], texts)
    async with SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest([(number, text) for number, text in enumerate(texts)], embedder, sink)
        hits = await sink.search(vector_of(texts[9]), k=1)

    assert provider.requests == []
    assert (report.success_count, report.cache_hits, report.cache_misses, report.total_tokens) == (50, 50, 0, 0)
    assert hits[0].text == texts[9]
    await cache.aclose()


async def test_embed_one_stream_and_ingest_fill_the_cache(cache: Any, tmp_path: Path) -> None:
    embedder, provider = make_cached(cache)
    await embedder.embed_one("one")
    assert_vectors([item.vector async for item in embedder.stream(["streamed"])], ["streamed"])
    async with SQLiteSink(tmp_path / "vectors.db") as sink:
        report = await ingest([("id", "ingested")], embedder, sink)
    assert (report.cache_hits, report.cache_misses) == (0, 1)
    provider.requests.clear()

    assert_vectors((await embedder.embed(["one", "streamed", "ingested"])).embeddings, ["one", "streamed", "ingested"])
    assert provider.requests == []
    await cache.aclose()


async def test_a_failed_text_is_not_cached_and_without_a_cache_nothing_is_counted(cache: Any) -> None:
    bad = [True]
    embedder, _ = make_cached(
        cache, lambda _, texts: BadRequestError("HTTP 400", status=400) if bad[0] and "poison" in texts else None
    )
    for texts in (["a", "poison"], [*many(), "poison"]):
        assert (await embedder.embed(texts)).failed_indices == [len(texts) - 1]
        with pytest.raises(AllFailedError):
            await embedder.embed(["poison"])
    bad[0] = False
    assert_vectors([await embedder.embed_one("poison")], ["poison"])

    plain, _ = make_cached(None)
    result = await plain.embed(many())
    assert (result.cache_hits, result.cache_misses) == (0, 0)
    await cache.aclose()


async def test_a_hit_in_memory_is_returned_without_waiting() -> None:
    embedder, provider = make_cached(True)
    await embedder.embed_one("a")
    assert in_one_turn(embedder.embed_one("a"))
    assert not in_one_turn(embedder.embed_one("b"))
    assert len(provider.requests) == 1


async def test_a_caller_that_alters_a_vector_does_not_alter_the_cache(cache: Any) -> None:
    embedder, _ = make_cached(cache)
    for _ in range(3):
        vector = await embedder.embed_one("a")
        assert_vectors([vector], ["a"])
        vector[:] = 0
        result = await embedder.embed(["a", "b", "a"])
        assert_vectors(result.embeddings, ["a", "b", "a"])
        result.embeddings[:] = 0
        async for item in embedder.stream(["a"]):
            assert item.vector is not None
            assert_vectors([item.vector], ["a"])
            item.vector[:] = 0
    await cache.aclose()


async def test_each_looked_up_text_counts_once_in_the_stats() -> None:
    embedder, _ = make_cached(True)
    await embedder.embed_one("a")
    await embedder.embed_one("a")
    await embedder.embed(["a", "b", "b"])
    await embedder.embed([*many(), "a"])
    await embedder.embed(many())
    stats = embedder.stats()
    assert (stats.cache_hits, stats.cache_misses) == (1 + 1 + 1 + 100, 1 + 1 + 100)


async def test_progress_counts_hits_as_done() -> None:
    embedder, _ = make_cached(True, max_batch_size=10)
    await embedder.embed(many())
    seen: list[Progress] = []
    await embedder.embed(many(0, 120), on_progress=seen.append)
    assert [progress.done for progress in seen] == [100, 110, 120]
    assert [progress.requests for progress in seen] == [0, 2, 2]


async def test_a_cache_file_gives_hits_before_the_size_of_the_vectors_is_known(tmp_path: Path) -> None:
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


# ---- keys


@pytest.mark.parametrize(
    ("option", "value"),
    [("dimensions", 3), ("too_long", "mean"), ("max_tokens_per_text", 5_000), ("max_tokens_per_batch", 6_000)],
)
async def test_options_that_decide_a_vector_are_part_of_its_key(option: str, value: object) -> None:
    cache = MemoryCache()
    await make_cached(cache)[0].embed(["a"])
    embedder, provider = make_cached(cache, **{option: value})
    await embedder.embed(["a"])
    assert sent_texts(provider) == ["a"]
    again, provider = make_cached(cache, **{option: value})
    if option != "dimensions":  # the fake provider always returns four
        await again.embed(["a"])
        assert provider.requests == []


async def test_another_model_and_another_provider_have_other_keys() -> None:
    class Elsewhere(FakeProvider):
        base_url = "https://elsewhere.example/v1"

    cache = MemoryCache()
    await make_cached(cache)[0].embed(["a"])
    for model, provider in (("other", FakeProvider()), ("fake", Elsewhere())):
        provider.latency_s = 0
        await Embedder(model, provider=provider, cache=cache).embed(["a"])
        assert sent_texts(provider) == ["a"], model
    assert len(cache) == 3


async def test_keys_are_hashes_of_settings_and_text_and_stay_the_same() -> None:
    cache = DictCache()
    await make_cached(cache)[0].embed(["a secret", "é"])
    # written out, since cache files must stay valid over releases
    settings_ = (
        '{"dimensions": null, "model": "fake", "place": "tests.fakes.FakeProvider", '
        '"tokens_per_text": 8192, "too_long": "error"}'
    )
    prefix = hashlib.sha256(settings_.encode()).digest()
    assert set(cache.vectors) == {hashlib.sha256(prefix + text.encode()).digest() for text in ("a secret", "é")}


# ---- sizes and invalid vectors


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
async def test_an_invalid_cached_vector_is_a_miss_and_is_replaced(kept: object, count: int) -> None:
    cache = DictCache()
    embedder, provider = make_cached(cache)
    texts = many(0, count)
    await embedder.embed(texts)
    provider.requests.clear()
    key = next(key for key, vector in cache.vectors.items() if np.array_equal(vector, vector_of(texts[0])))
    cache.vectors[key] = kept

    for _ in range(2):
        vectors = [await embedder.embed_one(texts[0])] if count == 1 else (await embedder.embed(texts)).embeddings
        assert_vectors(vectors, texts)
    assert sent_texts(provider) == texts[:1]


class Sized(FakeProvider):
    """Knows the size of its vectors from the first reply on, as a real provider does."""

    def __init__(self, size: int) -> None:
        super().__init__(latency_s=0)
        self.dimensions: int | None = None
        self.size = size

    async def embed(self, texts: Sequence[str]) -> Reply:
        reply = await super().embed(texts)
        self.dimensions = self.size
        return Reply(np.resize(reply.vectors, (len(texts), self.size)), reply.tokens)


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_cached_vectors_of_another_size_are_misses(count: int) -> None:
    cache, texts = MemoryCache(), many(0, count)
    await Embedder("fake", provider=Sized(3), cache=cache).embed(texts)

    provider = Sized(5)
    embedder = Embedder("fake", provider=provider, cache=cache)
    result = await embedder.embed([*texts, "new"])  # the size is not known yet
    assert result.embeddings.shape == (count + 1, 5)
    assert sorted(sent_texts(provider)) == sorted([*texts, "new"])
    assert (result.cache_hits, result.cache_misses) == (0, count + 1)
    assert (await embedder.embed(texts)).cache_hits == count


@pytest.mark.parametrize("count", [3, 100], ids=["a small call", "a job"])
async def test_if_all_texts_are_cached_the_size_in_the_cache_is_used(count: int) -> None:
    cache, texts = MemoryCache(), many(0, count)
    await Embedder("fake", provider=Sized(3), cache=cache).embed(texts)
    provider = Sized(5)
    result = await Embedder("fake", provider=provider, cache=cache).embed(texts)
    assert result.embeddings.shape == (count, 3)
    assert (provider.requests, result.cache_hits) == ([], count)


async def test_the_size_is_learned_from_the_first_reply() -> None:
    embedder, provider = make_cached(MemoryCache(), knows=None)
    await embedder.embed(["a"])
    result = await embedder.embed(["a", "b"])
    assert (result.cache_hits, result.cache_misses) == (1, 1)
    assert sent_texts(provider) == ["a", "b"]


async def test_while_the_size_is_unknown_hits_wait_for_the_first_reply_and_count_once() -> None:
    cache, texts = MemoryCache(), many()
    await Embedder("fake", provider=Sized(4), cache=cache).embed(texts)
    provider = Sized(4)
    result = await Embedder("fake", provider=provider, cache=cache).embed(["new", *texts])
    assert_vectors(result.embeddings, ["new", *texts])
    assert sent_texts(provider) == ["new"]
    assert (result.cache_hits, result.cache_misses) == (100, 1)


async def test_a_stream_never_yields_vectors_of_two_sizes() -> None:
    cache = MemoryCache()
    await Embedder("fake", provider=Sized(3), cache=cache).embed(many(0, 50))
    embedder = Embedder("fake", provider=Sized(5), cache=cache)
    items = [item async for item in embedder.stream(many(0, 60))]
    assert [item.vector.size for item in items if item.vector is not None] == [3] * 50
    assert all("empty the cache" in str(item.error) for item in items[50:])
    items = [item async for item in embedder.stream(many(0, 60))]  # now the size is known
    assert [item.vector.size for item in items if item.vector is not None] == [5] * 60


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
async def test_each_row_has_its_vector_for_any_mix_of_hits_duplicates_and_bad_texts(
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
        "small": lambda: MemoryCache(3_000),  # nine vectors, so hits may be evicted at any time
        "sqlite": lambda: SQLiteCache(tmp_path / f"{next(NUMBERS)}.db"),
        "own": DictCache,
    }[kind]()
    if known - poison:
        await make_cached(cache)[0].embed(sorted(known - poison))
    embedder, provider = make_cached(
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
