"""Makes the keys of the cache and looks texts up: hits are delivered, misses are sent and then stored.

A key is the SHA-256 of everything that determines a vector: address, model, options and text. A cached vector is used
if it is finite and has the size of the model's vectors, as far as that is known. All vectors of a call have one size.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeGuard

import numpy as np

from ..batching.batch import Outcome, Receiver
from ..batching.texts import Text, portions
from ..concurrency import cancel_and_wait, run_in_thread_if
from ..errors import AsyncEmbedError, ConfigError, ProtocolError
from ..report import Usage
from ..sending.attempts import GRACE_S
from ..sending.context import CallContext, StoppedError
from ..types import Cache, Vectors

logger = logging.getLogger(__name__)

# More characters than this are hashed in a thread. These take 0.15 ms.
WORTH_A_THREAD_CHARACTERS = 64 * 1024

# After a failed write nothing is written for this long, since each write to a locked file would delay an answer by a
# second.
REST_S = 10.0

# How long an answer may be delayed while it is written to the cache, so that an immediate repeat is a hit. An answer
# does not wait longer than this for a locked file.
PUT_FIRST_S = 0.05


class CacheClient:
    """One embedder's access to its cache. An error of the cache counts as a miss, except a `ConfigError`.

    `settings` are everything except the text that determines a vector, in types that JSON has. `on_lookup` is called
    with the hits and misses of every lookup.
    """

    def __init__(
        self,
        cache: Cache,
        settings: Mapping[str, Any],
        dimensions: Callable[[], int | None],
        on_lookup: Callable[[int, int], object] | None = None,
    ) -> None:
        self._cache = cache
        self._dimensions = dimensions
        self._replied: int | None = None
        self._on_lookup = on_lookup
        # the digest of the settings, so that no text can be taken for a part of them
        self._prefix = hashlib.sha256(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest())
        self._is_broken = False
        self._rests_until = 0.0

    @property
    def size(self) -> int | None:
        """The size of a vector; None while it is unknown."""
        return self._dimensions() or self._replied

    def replied(self, size: int) -> None:
        """Record the size of the vectors of a reply."""
        self._replied = size

    async def split(self, texts: Sequence[Text], size: int | None) -> tuple[Outcome, list[Text]]:
        """Return the texts that are in the cache as an outcome, and the others.

        A hit is a finite float32[size]. If `size` is None, the first hit determines it.
        """
        keys = await self.keys(texts)
        found = await self._get(keys)
        hits: list[Text] = []
        vectors: list[Vectors] = []
        missing: list[Text] = []
        for text, key in zip(texts, keys, strict=True):
            vector = found.get(key)
            if _is_vector(vector) and size in (None, vector.size):
                size = vector.size
                hits.append(text)
                vectors.append(vector)
            else:
                missing.append(text)
        return Outcome(hits, np.stack(vectors)) if hits else Outcome(), missing

    async def look_up(self, texts: Sequence[Text], usage: Usage) -> tuple[Outcome, list[Text]]:
        """Return hits and misses of a small call, and count them.

        While no size is known, one miss makes all texts misses: its reply may have another size.
        """
        size = self.size
        hits, missing = await self.split(texts, size)
        if missing and size is None:
            hits, missing = Outcome(), list(texts)
        self.count(usage, len(hits.texts), len(missing))
        return hits, missing

    def count(self, usage: Usage, hits: int, misses: int) -> None:
        """Count hits and misses; duplicates of one call count once."""
        usage.cache_hits += hits
        usage.cache_misses += misses
        if self._on_lookup is not None:
            self._on_lookup(hits, misses)

    async def keys(self, texts: Sequence[Text]) -> list[bytes]:
        """Return each text's key."""
        characters = sum(len(text.content) for text in texts)
        return await run_in_thread_if(characters > WORTH_A_THREAD_CHARACTERS, self._hash, texts)

    def _hash(self, texts: Sequence[Text]) -> list[bytes]:
        keys = []
        for text in texts:
            key = self._prefix.copy()
            key.update(text.content.encode())
            keys.append(key.digest())
        return keys

    async def _get(self, keys: Sequence[bytes]) -> Mapping[bytes, object]:
        try:
            return dict(await self._cache.get(keys))
        except ConfigError:
            raise  # it can never work
        except Exception as error:
            self._report(error)
            return {}

    async def put(self, texts: Sequence[Text], vectors: Vectors) -> None:
        """Store the vectors; an error of the cache is only logged."""
        clock = asyncio.get_running_loop().time
        if clock() < self._rests_until:
            return
        keys = await self.keys(texts)
        try:
            await self._cache.put(dict(zip(keys, vectors, strict=True)))
        except Exception as error:
            self._rests_until = clock() + REST_S
            self._report(error)

    def _report(self, error: Exception) -> None:
        if not self._is_broken:
            self._is_broken = True
            # the message of a foreign error may show an address with a password
            words = f": {error}" if isinstance(error, AsyncEmbedError) else ""
            logger.warning("the cache failed (%s%s): counted as a miss, not logged again", type(error).__name__, words)


class CachingReceiver:
    """Stores the vectors of a call's requests in the cache, and delivers them to the call's receiver.

    An answer waits up to `first_s` seconds until it is stored.
    """

    def __init__(self, cache: CacheClient, call: CallContext, receiver: Receiver, *, first_s: float = 0.0) -> None:
        self._cache = cache
        self._call = call
        self._receiver = receiver
        self._first_s = first_s
        self._size: int | None = None

    async def misses(
        self, slices: AsyncIterable[Sequence[Text]], *, held: list[Text] | None = None
    ) -> AsyncGenerator[Sequence[Text], None]:
        """Deliver the hits of all slices; yield the misses, and an empty slice when the source is idle.

        While no size is known, hits are added to `held` instead, to be looked up again after the first reply.
        """
        with suppress(StoppedError):
            async for texts in slices:
                for some in portions(texts):
                    size = self._size or self._cache.size
                    async with self._call.unless_stopped():
                        hits, missing = await self._cache.split(some, size)
                    if held is not None and size is None:
                        held += hits.texts
                        hits = Outcome()
                    self._cache.count(self._call.usage, len(hits.texts), len(missing))
                    if hits.texts:
                        self._size = hits.vectors.shape[1]
                        async with self._call.unless_stopped(GRACE_S):
                            await self._receiver.deliver(hits)
                    if missing:
                        yield missing
                if not texts:
                    yield texts

    async def deliver(self, outcome: Outcome) -> None:
        """Store and deliver the vectors concurrently, so that a caller does not wait until they are stored."""
        if outcome.texts:
            outcome = self._of_one_size(outcome)
        if not outcome.texts:
            await self._receiver.deliver(outcome)
            return
        broken: Exception | None = None
        storing = asyncio.create_task(self._cache.put(outcome.texts, outcome.vectors))
        try:
            if self._first_s:
                await asyncio.wait([storing], timeout=self._first_s)
            try:
                await self._receiver.deliver(outcome)
            except Exception as error:
                broken = error  # the vectors are paid for, so they are stored before this is raised
            await storing
        finally:
            await cancel_and_wait(storing)
        if broken is not None:
            raise broken

    def _of_one_size(self, outcome: Outcome) -> Outcome:
        size = outcome.vectors.shape[1]
        self._cache.replied(size)
        if self._size in (None, size):
            self._size = size
            return outcome
        error = ProtocolError(
            f"expected {self._size} dimensions, as the cache has them, got {size}: "
            "the model behind this name has changed; empty the cache"
        )
        return Outcome(failed=[*outcome.failed, *((text, error) for text in outcome.texts)])


def _is_vector(value: object) -> TypeGuard[Vectors]:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and value.ndim == 1
        and value.size > 0
        and bool(np.isfinite(value).all())
    )
