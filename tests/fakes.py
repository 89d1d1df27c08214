"""Stand-ins for tests that run on the virtual clock; each plays a script, and records what it was asked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from asyncembed import Embedder
from asyncembed.errors import AsyncEmbedError
from asyncembed.types import ProviderInfo, Reply, Vectors


def is_idle(embedder: Embedder) -> bool:
    """Whether nothing is in flight, waits or is queued."""
    stats = embedder.stats()
    return (stats.under_way, stats.waiting, stats.gathering) == (0, 0, 0)


Answer: TypeAlias = AsyncEmbedError | float | None
Script: TypeAlias = Callable[[int, Sequence[str]], Answer]


def vector_of(text: str, dimensions: int = 4) -> Vectors:
    """A vector float32[dimensions] that is a function of its text alone, so that a misplaced row is seen."""
    digest = hashlib.sha256(text.encode()).digest()
    return np.frombuffer(digest[: 4 * dimensions], "<u4").astype(np.float32) / np.float32(2**32)


class FakeProvider:
    """Answers with `vector_of` each text after `latency_s`, except where its script says otherwise.

    Args:
        script: Called with the request's number, from 0, and its texts; an error it returns is raised, seconds it
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
        self.sent_at.append(asyncio.get_running_loop().time())
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
