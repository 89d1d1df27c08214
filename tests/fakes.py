"""Stand-ins and helpers for tests on the virtual clock: a scripted provider that records its requests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from asyncembed import Embedder
from asyncembed.errors import AsyncEmbedError
from asyncembed.types import ProviderInfo, Reply, Vectors

Answer: TypeAlias = AsyncEmbedError | float | None
Script: TypeAlias = Callable[[int, Sequence[str]], Answer]


class FakeProvider:
    """Replies with `vector_of` each text after `latency_s`, unless its script says otherwise.

    Args:
        script: Called with the request's number, from 0, and its texts. An error it returns is raised; seconds it
            returns are slept.
        latency_s: Seconds of the loop's clock that a request takes.
    """

    def __init__(self, script: Script | None = None, latency_s: float = 1.0) -> None:
        self._script = script or (lambda number, texts: None)
        self.latency_s = latency_s
        self.info = ProviderInfo()
        self.requests: list[list[str]] = []
        self.sent_at: list[float] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.billed = 0
        self.closed = False

    async def embed(self, texts: Sequence[str]) -> Reply:
        number = len(self.requests)
        self.requests.append(list(texts))
        self.sent_at.append(now())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.latency_s)
            answer = self._script(number, texts)
            if isinstance(answer, AsyncEmbedError):
                raise answer
            await asyncio.sleep(answer or 0.0)
            tokens = sum(map(len, texts))
            self.billed += tokens
            return Reply(np.stack([vector_of(text) for text in texts]), tokens)
        finally:
            self.in_flight -= 1

    async def aclose(self) -> None:
        self.closed = True


def make_embedder(
    script: Script | None = None, *, latency_s: float = 1.0, **options: Any
) -> tuple[Embedder, FakeProvider]:
    """Return an embedder and its fake provider."""
    provider = FakeProvider(script, latency_s)
    return Embedder("fake", provider=provider, **options), provider


def is_idle(embedder: Embedder) -> bool:
    """Return whether no request is in flight or waits, and no text is queued."""
    stats = embedder.stats()
    return (stats.under_way, stats.waiting, stats.gathering) == (0, 0, 0)


def now() -> float:
    """Return the time of the running loop's clock."""
    return asyncio.get_running_loop().time()


def texts(count: int) -> list[str]:
    """Return `text 0`, `text 1`, and so on."""
    return [f"text {number}" for number in range(count)]


def vector_of(text: str, dimensions: int = 4) -> Vectors:
    """Return a vector float32[dimensions] that depends on its text alone, so that a misplaced row is noticed."""
    digest = hashlib.sha256(text.encode()).digest()
    return np.frombuffer(digest[: 4 * dimensions], "<u4").astype(np.float32) / np.float32(2**32)


def assert_vectors(vectors: Any, expected: Sequence[str], failed: Sequence[int] = ()) -> None:
    """Check that row i is the vector of text i, and that failed rows are NaN."""
    assert len(vectors) == len(expected)
    for index, (vector, text) in enumerate(zip(vectors, expected, strict=True)):
        if index in failed:
            assert np.isnan(vector).all()
        else:
            np.testing.assert_array_equal(vector, vector_of(text))
