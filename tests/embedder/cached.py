"""Helpers for tests of calls with a cache."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from asyncembed import Embedder
from asyncembed.types import ProviderInfo, Vectors
from tests.fakes import FakeProvider, Script


def make_cached(cache: Any, script: Script | None = None, **options: Any) -> tuple[Embedder, FakeProvider]:
    """Return an embedder with this cache, and its provider, which knows the size of its vectors unless `knows=None`."""
    provider = FakeProvider(script, latency_s=options.pop("latency_s", 0))
    provider.info = ProviderInfo(dimensions=options.pop("knows", 4))
    return Embedder("fake", provider=provider, cache=cache, **options), provider


def sent_texts(provider: FakeProvider) -> list[str]:
    """Return all texts that the provider was sent, in order."""
    return [text for request in provider.requests for text in request]


def many(first: int = 0, last: int = 100) -> list[str]:
    """Return `text 0` to `text 99`: too many for a call that shares requests."""
    return [f"text {number}" for number in range(first, last)]


class DictCache:
    """A cache as a user might write it."""

    def __init__(self) -> None:
        self.vectors: dict[bytes, Any] = {}
        self.closed = False

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        await asyncio.sleep(0)
        return {key: self.vectors[key] for key in keys if key in self.vectors}

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        await asyncio.sleep(0)
        self.vectors.update({key: vector.copy() for key, vector in vectors.items()})

    async def aclose(self) -> None:
        self.closed = True
