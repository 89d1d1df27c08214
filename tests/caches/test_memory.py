"""`MemoryCache`: eviction, memory use, and that stored vectors cannot be altered."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.caches.memory import ENTRY_BYTES, VECTORS_PER_TURN, MemoryCache
from asyncembed.errors import ConfigError
from asyncembed.types import Vectors
from tests.caches.keys import in_one_turn, key_of, vector


@pytest.mark.parametrize("max_bytes", [0, -1, True, 1.5, "1"])
def test_an_invalid_max_bytes_is_refused(max_bytes: object) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        MemoryCache(max_bytes)  # type: ignore[arg-type]


async def test_the_least_recently_used_vector_is_evicted_first() -> None:
    entry = ENTRY_BYTES + 32 + 4 * 8
    cache = MemoryCache(3 * entry)
    for name in "abc":
        await cache.put({key_of(name): vector(name)})
    await cache.get([key_of("a")])
    await cache.put({key_of("d"): vector("d")})

    found = await cache.get([key_of(name) for name in "abcd"])

    assert set(found) == {key_of(name) for name in "acd"}
    for name in "acd":
        np.testing.assert_array_equal(found[key_of(name)], vector(name))
    assert (len(cache), cache.size_bytes) == (3, 3 * entry)


async def test_a_stored_vector_cannot_be_altered() -> None:
    cache, given_in = MemoryCache(), vector("a")
    await cache.put({key_of("a"): given_in})
    given_in[:] = 0
    found = (await cache.get([key_of("a")]))[key_of("a")]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        found.flags.writeable = True
    np.testing.assert_array_equal(found, vector("a"))


async def test_storing_a_row_of_a_matrix_does_not_keep_the_matrix_in_memory() -> None:
    cache = MemoryCache()
    rows = np.zeros((2_000, 1_024), np.float32)
    tracemalloc.start()
    await cache.put({key_of("a"): rows[7]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000


async def test_a_vector_larger_than_the_cache_is_not_stored_and_evicts_nothing() -> None:
    cache = MemoryCache(1_000)
    await cache.put({key_of("a"): vector("a")})
    await cache.put({key_of("b"): np.zeros(1_000, np.float32)})
    assert set(await cache.get([key_of("a"), key_of("b")])) == {key_of("a")}


async def test_a_second_put_replaces_the_vector_of_a_key() -> None:
    cache = MemoryCache()
    await cache.put({key_of("a"): vector("a", 16)})
    await cache.put({key_of("a"): vector("b")})
    np.testing.assert_array_equal((await cache.get([key_of("a")]))[key_of("a")], vector("b"))
    assert (len(cache), cache.size_bytes) == (1, ENTRY_BYTES + 32 + 4 * 8)


@given(
    max_bytes=st.integers(1, 5_000),
    steps=st.lists(
        st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 12), st.integers(1, 300)), max_size=6)), max_size=30
    ),
)
async def test_the_cache_agrees_with_a_simple_model_and_never_exceeds_max_bytes(
    max_bytes: int, steps: list[tuple[bool, list[tuple[int, int]]]]
) -> None:
    cache = MemoryCache(max_bytes)
    model: OrderedDict[bytes, Vectors] = OrderedDict()
    for is_put, items in steps:
        if is_put:
            await cache.put({key_of(name): vector(name, size) for name, size in items})
            for name, size in dict(items).items():
                model.pop(key_of(name), None)
                if ENTRY_BYTES + 32 + 4 * size <= max_bytes:
                    model[key_of(name)] = vector(name, size)
                while sum(ENTRY_BYTES + 32 + one.nbytes for one in model.values()) > max_bytes:
                    model.popitem(last=False)
        else:
            keys = [key_of(name) for name, _ in items]
            found = await cache.get(keys)
            assert set(found) == set(keys) & set(model)
            for key in keys:
                if key in model:
                    model.move_to_end(key)
                    np.testing.assert_array_equal(found[key], model[key])
        assert cache.size_bytes <= max_bytes
        assert len(cache) == len(model)


@pytest.mark.parametrize("size", [16, 256, 1_536])
async def test_the_cache_takes_no_more_memory_than_max_bytes(size: int) -> None:
    cache = MemoryCache(4_000_000)
    some = np.zeros(size, np.float32)
    gc.collect()
    tracemalloc.start()
    for number in range(3 * 4_000_000 // (some.nbytes + ENTRY_BYTES)):  # three times what it holds
        await cache.put({key_of(number): some})
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.6 * 4_000_000 < taken < 4_000_000


async def test_a_get_never_waits_and_a_large_put_lets_other_tasks_run() -> None:
    cache = MemoryCache()
    vectors = {key_of(number): vector(number) for number in range(VECTORS_PER_TURN + 1)}
    assert not in_one_turn(cache.put(vectors))
    await cache.put(vectors)
    assert in_one_turn(cache.get(list(vectors)))


def test_threads_may_share_a_cache() -> None:
    cache = MemoryCache(40 * (ENTRY_BYTES + 64))
    wrong: list[object] = []

    def work(seed: int) -> None:
        for number in range(seed, seed + 3_000):
            name = number * 7 % 60
            try:
                in_one_turn(cache.put({key_of(name): vector(name)}))
                in_one_turn(cache.get([key_of(name + 1), key_of(name)]))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.size_bytes == len(cache) * (ENTRY_BYTES + 64)


async def test_a_closed_cache_is_empty_and_may_be_used_again() -> None:
    cache = MemoryCache()
    await cache.put({key_of("a"): vector("a")})
    await cache.aclose()
    assert await cache.get([key_of("a")]) == {}
    assert cache.size_bytes == 0
    await cache.put({key_of("a"): vector("a")})
    assert len(cache) == 1
    assert repr(cache) == "<MemoryCache: 1 vectors, 352 of 268,435,456 bytes>"
