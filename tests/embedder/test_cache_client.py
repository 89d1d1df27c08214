"""`CacheClient`: which cached vectors are used. Everything else is tested through calls, in `test_caching`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed.batching.texts import Text
from asyncembed.embedder.caching import CacheClient
from asyncembed.report import Usage
from tests.caches.keys import vector

TEXTS = [Text(name, (index,)) for index, name in enumerate("abcd")]


class FixedCache:
    """A cache that holds the given vectors, by text."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Any]:
        return {
            key: self._found[text.content] for key, text in zip(keys, TEXTS, strict=True) if text.content in self._found
        }

    async def put(self, vectors: Mapping[bytes, Any]) -> None: ...

    async def aclose(self) -> None: ...


@pytest.mark.parametrize(
    ("size", "hits"),
    [pytest.param(8, "b", id="the model's size"), pytest.param(None, "ad", id="the size of the first")],
)
async def test_vectors_of_one_size_are_hits(size: int | None, hits: str) -> None:
    client = CacheClient(FixedCache({"a": vector("a", 3), "b": vector("b", 8), "d": vector("d", 3)}), {}, lambda: size)
    found, missing = await client.split(TEXTS, client.size)
    assert [text.content for text in found.texts] == list(hits)
    assert [text.content for text in missing] == [name for name in "abcd" if name not in hits]
    for text, row in zip(found.texts, found.vectors, strict=True):
        np.testing.assert_array_equal(row, vector(text.content, row.size))


async def test_an_empty_vector_is_a_miss_and_sets_no_size() -> None:
    client = CacheClient(FixedCache({"a": np.empty(0, np.float32), "b": vector("b")}), {}, lambda: None)
    found, missing = await client.split(TEXTS, None)
    assert [text.content for text in found.texts] == ["b"]
    assert [text.content for text in missing] == ["a", "c", "d"]


async def test_while_the_size_is_unknown_one_miss_in_a_small_call_makes_all_texts_misses() -> None:
    client = CacheClient(FixedCache({"a": vector("a", 3)}), {}, lambda: None)
    usage = Usage()
    found, missing = await client.look_up(TEXTS, usage)
    assert (list(found.texts), missing) == ([], TEXTS)
    assert (usage.cache_hits, usage.cache_misses) == (0, 4)
