"""What an embedder asks of its cache: by which keys, what it believes of the answer, and that it cannot be harmed.

A key is the SHA-256 of all that decides a vector: where it comes from, and the text. A vector is believed if it is
finite and as long as the model's vectors are, as far as anybody knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import aclosing, suppress
from typing import Any, TypeAlias, TypeGuard, TypeVar

import numpy as np

from ..batching.batch import Deliver, Outcome
from ..batching.texts import SLICE_TEXTS, Text, portions
from ..concurrency import PerLoop, ended, in_thread_if
from ..errors import AsyncEmbedError, ConfigError, ProtocolError
from ..sending.engine import GRACE_S
from ..sending.run import Run, StoppedError
from ..types import Cache, Vectors

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


# So long an answer waits until it is in the cache, so that who asks again finds it there; a locked file takes longer.
PUT_FIRST_S = 0.05

Send: TypeAlias = Callable[[AsyncIterator[Sequence[Text]], Deliver], Awaitable[None]]
"""Embeds slices of texts, and delivers each text once; see `Engine.run`."""


class CachedCall:
    """One call on its way past the cache.

    Args:
        lookup: The embedder's.
        run: Stopping it ends this as it ends `Engine.run`.
        deliver: Takes the outcomes.
        send: Gets what is missing; not called if nothing is.
        at_once: All texts are there from the start, each once, so others may wait for them.
    """

    def __init__(self, lookup: Lookup, run: Run, deliver: Deliver, send: Send, *, at_once: bool) -> None:
        self._lookup = lookup
        self._run = run
        self._deliver = deliver
        self._send = send
        self._claims = at_once
        # what an urgent run sends was looked up when it was asked for, and waits for no job
        self._waits = at_once and not run.urgent
        self._size: int | None = None
        self._sent: dict[Text, bytes] = {}
        self._claimed: InFlight = {}
        self._later: list[Text] = []
        self._awaited: list[tuple[Text, bytes, asyncio.Future[Vectors | None]]] = []

    async def run(self, slices: AsyncIterable[Sequence[Text]]) -> None:
        """Deliver what the cache has and send the rest, lazily, slice by slice."""
        try:
            await self._pass(slices)
            self._waits = False
            left = [*self._later, *await self._others()]
            if left:
                async with aclosing(_once(left)) as rest:
                    await self._pass(rest)
        finally:
            self._end_claims()

    async def _pass(self, slices: AsyncIterable[Sequence[Text]]) -> None:
        async with aclosing(self._missing(slices)) as missing:
            try:
                async with self._run.unless_stopped():
                    first = await anext(missing)
            except (StopAsyncIteration, StoppedError):
                return
            async with aclosing(_once(first, missing)) as rest:
                await self._send(rest, self._fresh)

    async def _missing(self, slices: AsyncIterable[Sequence[Text]]) -> AsyncGenerator[Sequence[Text], None]:
        async for texts in slices:
            for some in portions(texts):
                keys = await self._lookup.keys([text.content for text in some])
                found = {} if self._run.urgent else await self._lookup.get(keys)
                hits, to_send = self._sort(list(zip(some, keys, strict=True)), found)
                await self._hand_over(hits)
                if to_send:
                    yield to_send
            if not texts:
                yield texts  # what waits for company is to be sent

    def _sort(
        self, keyed: Sequence[tuple[Text, bytes]], found: Mapping[bytes, object]
    ) -> tuple[list[tuple[Text, Vectors]], list[Text]]:
        """Return the hits, and what has to be sent now. Waits for nothing, so nobody comes in between."""
        size = self._size or self._lookup.size
        hits, missing = believed(keyed, found, size)
        if size is None and self._waits:
            self._later += [text for text, _ in hits]
            hits = []
        in_flight = self._lookup.in_flight
        to_send: list[Text] = []
        for text, key in missing:
            other = in_flight.get(key)
            if other is not None and self._waits:
                self._awaited.append((text, key, other))
                continue
            if other is None and self._claims:
                in_flight[key] = self._claimed[key] = asyncio.get_running_loop().create_future()
            self._sent[text] = key
            to_send.append(text)
        self._count(0, len(to_send))
        return hits, to_send

    async def _hand_over(self, hits: Sequence[tuple[Text, Vectors]]) -> None:
        """Deliver hits. A run that is stopped lets that come to its end, as it does with what it has paid for."""
        if not hits:
            return
        self._size = hits[0][1].size
        self._count(len(hits), 0)
        delivering = asyncio.create_task(self._delivered(outcome_of(hits)))
        try:
            await asyncio.shield(delivering)
        except asyncio.CancelledError:
            if self._run.stopped_by is not None:
                await asyncio.wait([delivering])
            raise
        finally:
            await ended(delivering)

    async def _delivered(self, outcome: Outcome) -> None:
        async with self._run.unless_stopped(GRACE_S):
            await self._deliver(outcome)

    async def _others(self) -> list[Text]:
        """Wait for what others are sending, and deliver it; return what they did not get.

        They wait for nobody in turn: what a call sends itself has been delivered before it waits.
        """
        awaited, self._awaited = self._awaited, []
        left: list[Text] = []
        with suppress(StoppedError):
            for start in range(0, len(awaited), SLICE_TEXTS):
                some = awaited[start : start + SLICE_TEXTS]
                for _, _, coming in some:
                    if not coming.done():
                        await asyncio.wait([coming])  # not `await coming`, which would be cancelled with its caller
                found = {key: coming.result() for _, key, coming in some}
                hits, missing = believed([(text, key) for text, key, _ in some], found, self._size or self._lookup.size)
                left += [text for text, _ in missing]
                await self._hand_over(hits)
        return left

    async def _fresh(self, outcome: Outcome) -> None:
        """Keep what came back, and deliver it."""
        outcome = self._of_one_size(outcome)
        came = {self._sent.pop(text): vector for text, vector in zip(outcome.texts, outcome.vectors, strict=True)}
        for key, vector in came.items():
            self._settle(key, vector)
        for text, _ in outcome.failed:
            self._settle(self._sent.pop(text), None)
        if not came:
            await self._deliver(outcome)
            return
        # whoever is answered goes on, and may ask again
        await self._deliver_while(self._lookup.put(came), outcome, first_s=PUT_FIRST_S if self._run.urgent else 0.0)
        for key in came:
            self._forget(key)

    async def _deliver_while(self, work: Coroutine[Any, Any, None], outcome: Outcome, *, first_s: float) -> None:
        """Deliver and do the work at the same time, which may begin earlier; what a store raises does not end it."""
        working = asyncio.create_task(work)
        broken: Exception | None = None
        try:
            if first_s:
                await asyncio.wait([working], timeout=first_s)
            try:
                await self._deliver(outcome)
            except Exception as error:
                broken = error
            await working
        finally:
            await ended(working)
        if broken is not None:
            raise broken

    def _of_one_size(self, outcome: Outcome) -> Outcome:
        if not outcome.texts:
            return outcome
        size = outcome.vectors.shape[1]
        self._lookup.replied(size)
        if self._size in (None, size):
            self._size = size
            return outcome
        error = ProtocolError(
            f"expected {self._size} dimensions, as the cache has them, got {size}: "
            "the model behind this name has changed; empty the cache"
        )
        return Outcome(failed=[*outcome.failed, *((text, error) for text in outcome.texts)])

    def _settle(self, key: bytes, vector: Vectors | None) -> None:
        claim = self._claimed.get(key)
        if claim is not None and not claim.done():
            # a copy: who waits for it may look at it when this call's result is its caller's, to change as he likes
            claim.set_result(None if vector is None else vector.copy())
            if vector is None:
                self._forget(key)

    def _forget(self, key: bytes) -> None:
        if self._claimed.pop(key, None) is not None:
            del self._lookup.in_flight[key]

    def _end_claims(self) -> None:
        for key in list(self._claimed):
            self._settle(key, None)
            self._forget(key)

    def _count(self, hits: int, misses: int) -> None:
        if not self._run.urgent:  # those were counted when they were asked for
            self._lookup.count(self._run, hits, misses)


async def _once(
    first: Sequence[Text], others: AsyncIterable[Sequence[Text]] | None = None
) -> AsyncGenerator[Sequence[Text], None]:
    yield first
    if others is not None:
        async for texts in others:
            yield texts
