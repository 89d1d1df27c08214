"""What an embedder asks of its cache: by which keys, what it believes of the answer, and that it cannot be harmed.

A key is the SHA-256 of all that decides a vector: where it comes from, and the text. A vector is believed if it is
finite and as long as the model's vectors are, as far as anybody knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, TypeVar

import numpy as np

from ..batches import Outcome
from ..engine import Deliver
from ..errors import AsyncEmbedError, ConfigError
from ..loops import PerLoop
from ..run import Run
from ..threads import in_thread_if
from ..types import Cache, Vectors
from ..weighing import Text

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Hashed in 0.15 ms.
WORTH_A_THREAD_CHARACTERS = 64 * 1024

# So long nothing is put into a cache that has just failed: a locked file lets every answer wait for a second.
REST_S = 10.0

InFlight: TypeAlias = dict[bytes, "asyncio.Future[Vectors | None]"]
"""What is being sent: done with its vector when that is there, with None if it does not come."""


class Lookup:
    """One embedder's way to its cache.

    Args:
        cache: Never closed here.
        settings: All that decides a vector beside its text, as JSON can hold it.
        dimensions: Returns how long the vectors are, None while nobody can know.
        told: Is called with the hits and misses of every lookup.
    """

    def __init__(
        self,
        cache: Cache,
        settings: Mapping[str, Any],
        dimensions: Callable[[], int | None],
        told: Callable[[int, int], object] | None = None,
    ) -> None:
        self._cache = cache
        self._dimensions = dimensions
        self._replied: int | None = None
        self._told = told
        # its digest, so that no text can reach over into the settings
        self._prefix = hashlib.sha256(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest())
        self._in_flight: PerLoop[InFlight] = PerLoop(dict)
        self._is_broken = False
        self._rests_until = 0.0

    @property
    def size(self) -> int | None:
        """How long a vector is, as far as anybody knows."""
        return self._dimensions() or self._replied

    @property
    def in_flight(self) -> InFlight:
        """What is being sent on this loop, and others may wait for."""
        return self._in_flight.get()

    async def one(self, content: str, run: Run) -> Vectors | None:
        """Return a text's vector float32[d], a copy of the caller's own; None if it has to be sent."""
        keys = await self.keys([content])
        hits, missing = believed([(content, keys[0])], await self.get(keys), self.size)
        self.count(run, len(hits), len(missing))
        return hits[0][1].copy() if hits else None

    async def few(self, texts: Sequence[Text], run: Run, deliver: Deliver) -> Sequence[Text]:
        """Deliver those of a small call's texts that the cache has; return the others."""
        keys = await self.keys([text.content for text in texts])
        keyed = list(zip(texts, keys, strict=True))
        hits, missing = believed(keyed, await self.get(keys), self.size)
        if missing and self.size is None:  # the reply may be of another size than what is kept
            hits, missing = [], keyed
        if hits:
            await deliver(outcome_of(hits))
        self.count(run, len(hits), len(missing))
        return [text for text, _ in missing]

    async def keys(self, contents: Sequence[str]) -> list[bytes]:
        """Return each text's key."""
        characters = sum(map(len, contents))
        return await in_thread_if(characters > WORTH_A_THREAD_CHARACTERS, self._hash, contents)

    def _hash(self, contents: Sequence[str]) -> list[bytes]:
        keys = []
        for content in contents:
            key = self._prefix.copy()
            key.update(content.encode())
            keys.append(key.digest())
        return keys

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, object]:
        """Return what the cache has, and what has just come and is on its way there.

        Raises:
            ConfigError: The cache can never work. Whatever else it raises counts as a miss.
        """
        found: dict[bytes, object] = {}
        try:
            found.update(await self._cache.get(keys))
        except ConfigError:
            raise
        except Exception as error:
            self._broke(error)
        in_flight = self.in_flight
        for key in keys if in_flight else ():
            coming = in_flight.get(key)
            if coming is not None and coming.done():
                found[key] = coming.result()
        return found

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Keep the vectors of a reply, if the cache can."""
        clock = asyncio.get_running_loop().time
        if clock() < self._rests_until:
            return
        try:
            await self._cache.put(vectors)
        except Exception as error:
            self._rests_until = clock() + REST_S
            self._broke(error)

    def replied(self, size: int) -> None:
        """A reply had vectors of that size."""
        self._replied = size

    def count(self, run: Run, hits: int, misses: int) -> None:
        """Count what was looked up; texts that are equal count once."""
        run.cache_hits += hits
        run.cache_misses += misses
        if self._told is not None:
            self._told(hits, misses)

    def _broke(self, error: Exception) -> None:
        if not self._is_broken:
            self._is_broken = True
            # of foreign errors the name alone: they may show an address with a password
            words = f": {error}" if isinstance(error, AsyncEmbedError) else ""
            logger.warning("the cache failed (%s%s); that is a miss, and not told again", type(error).__name__, words)


def believed(
    keyed: Sequence[tuple[T, bytes]], found: Mapping[bytes, object], size: int | None
) -> tuple[list[tuple[T, Vectors]], list[tuple[T, bytes]]]:
    """Tell hits from misses; what is no finite float32[size] is a miss. Without a size that of the first hit counts."""
    hits: list[tuple[T, Vectors]] = []
    missing: list[tuple[T, bytes]] = []
    for text, key in keyed:
        vector = found.get(key)
        if _is_vector(vector) and size in (None, vector.size):
            size = vector.size
            hits.append((text, vector))
        else:
            missing.append((text, key))
    return hits, missing


def _is_vector(value: object) -> TypeGuard[Vectors]:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and value.ndim == 1
        and value.size > 0
        and bool(np.isfinite(value).all())
    )


def outcome_of(hits: Sequence[tuple[Text, Vectors]]) -> Outcome:
    """Return hits as what a request would have brought."""
    return Outcome([text for text, _ in hits], np.stack([vector for _, vector in hits]))
