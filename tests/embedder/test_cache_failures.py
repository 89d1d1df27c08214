"""Calls with a cache that fails, or that is closed: no call fails, and nothing that was paid for is lost."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncembed import MemoryCache, Record, ingest
from asyncembed.batching.batch import Outcome
from asyncembed.batching.texts import Text
from asyncembed.embedder.caching import CacheClient, CachingReceiver
from asyncembed.errors import ConfigError, SinkError
from asyncembed.sending.context import CallContext
from asyncembed.types import Vectors
from tests.embedder.cached import DictCache, make_cached, many, sent_texts
from tests.fakes import assert_vectors, now

# ---- a cache that fails


class FailingCache(DictCache):
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
async def test_a_failing_cache_fails_no_call_and_is_logged_once_without_its_message(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = OSError("redis://user:secret@host gave up on the text text 7")
    embedder, provider = make_cached(FailingCache(**{what: error}))
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert_vectors((await embedder.embed(many())).embeddings, many())
            assert_vectors([await embedder.embed_one("a")], ["a"])
            assert_vectors([item.vector async for item in embedder.stream(["b"])], ["b"])
    assert len(sent_texts(provider)) == 2 * 102
    logged = [record.getMessage() for record in caplog.records if "cache" in record.getMessage()]
    assert len(logged) == 1
    assert "OSError" in logged[0]
    assert "secret" not in caplog.text
    assert "text 7" not in caplog.text


async def test_a_get_that_returns_no_mapping_is_a_miss() -> None:
    class Nonsense(DictCache):
        async def get(self, keys: Sequence[bytes]) -> Any:
            return None

    embedder, _ = make_cached(Nonsense())
    assert_vectors((await embedder.embed(many())).embeddings, many())


async def test_a_cache_that_can_never_work_is_reported_at_first_use(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"no database" * 500)
    embedder, provider = make_cached(tmp_path / "cache.db")
    with pytest.raises(ConfigError, match="not an SQLite database"):
        await embedder.embed_one("a")
    for texts in (["a"], many()):
        with pytest.raises(ConfigError, match="not an SQLite database"):
            await embedder.embed(texts)
    with pytest.raises(ConfigError, match="not an SQLite database"):
        [item async for item in embedder.stream(["a"])]
    assert provider.requests == []
    await embedder.aclose()


async def test_a_cache_file_that_breaks_later_fails_no_call(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    embedder, _ = make_cached(path)
    await embedder.embed(many())
    database = sqlite3.connect(path)
    database.execute("DROP TABLE vectors")
    database.close()
    assert_vectors((await embedder.embed(many())).embeddings, many())
    await embedder.aclose()


class FullCache:
    """Fails each `put` after a second."""

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
async def test_a_cache_that_cannot_be_written_delays_no_call_and_is_not_tried_for_a_while() -> None:
    cache = FullCache()
    embedder, _ = make_cached(cache, latency_s=0)
    async with embedder:
        began_at = now()
        await embedder.embed_one("a", deadline=0.5)
        assert now() - began_at < 0.2
        await asyncio.sleep(1)
        for text in "bcd":
            await embedder.embed_one(text)
        assert cache.puts == 1
        await asyncio.sleep(10)
        await embedder.embed_one("e")
        assert cache.puts == 2


# ---- a receiver that fails


async def test_vectors_are_cached_even_if_the_sink_refuses_them() -> None:
    class Full:
        async def prepare(self, model: str, dimensions: int | None) -> None: ...

        async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
            return set()

        async def write(self, model: str, rows: Sequence[Any]) -> Mapping[Any, Any]:
            raise SinkError("the disk is full")

    cache = MemoryCache()
    embedder, _ = make_cached(cache)
    with pytest.raises(SinkError):
        await ingest([Record(1, "a"), Record(2, "b")], embedder, Full())
    assert len(cache) == 2


async def test_an_error_of_the_receiver_is_raised_after_the_vectors_were_cached() -> None:
    cache = MemoryCache()

    class Refusing:
        async def deliver(self, outcome: Outcome) -> None:
            raise KeyError("its own")

    caching = CachingReceiver(CacheClient(cache, {}, lambda: 4), CallContext(), Refusing())
    with pytest.raises(KeyError, match="its own"):
        await caching.deliver(Outcome([Text("a", [0])], np.zeros((1, 4), np.float32)))
    assert len(cache) == 1


# ---- the option, and who closes


@pytest.mark.parametrize("option", [1, 0.5, object(), MemoryCache, {}, b"cache.db"])
def test_an_option_that_is_not_a_cache_is_refused(option: Any) -> None:
    with pytest.raises(ConfigError, match="cache"):
        make_cached(option)


async def test_a_cache_of_the_user_is_not_closed_and_one_of_ours_is(tmp_path: Path) -> None:
    handed_in = DictCache()
    async with make_cached(handed_in)[0] as embedder:
        await embedder.embed(["a"])
    assert not handed_in.closed

    embedder, provider = make_cached(tmp_path / "cache.db")
    await embedder.embed(many())
    assert (tmp_path / "cache.db-wal").exists()
    await embedder.aclose()
    assert not (tmp_path / "cache.db-wal").exists()  # SQLite deletes it with the last connection
    assert_vectors((await embedder.embed(many())).embeddings, many())  # it is opened again
    assert len(sent_texts(provider)) == 100
    await embedder.aclose()

    embedder, provider = make_cached(True)
    await embedder.embed(["a"])
    await embedder.aclose()
    await embedder.embed(["a"])
    assert sent_texts(provider) == ["a", "a"]  # closing has emptied it


async def test_without_a_cache_every_call_is_sent() -> None:
    embedder, provider = make_cached(False)
    results = [await embedder.embed(["a"]) for _ in range(2)]
    assert sent_texts(provider) == ["a", "a"]
    assert [(result.cache_hits, result.cache_misses) for result in results] == [(0, 0)] * 2
