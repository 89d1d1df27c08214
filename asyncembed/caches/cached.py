"""Between a call's texts and its requests: what the cache has is delivered, the rest is sent, and kept as it comes.

Of calls that miss one text at the same time the later ones wait for the first; if that does not get it, they send it.
Nobody waits for a request that goes after his own, or for texts that wait themselves, as those of a stream may.

In one call all vectors have one size. While nobody knows it, the first reply tells it, if there is one.
"""

from __future__ import annotations

import asyncio
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
from typing import Any, TypeAlias

from ..batches import Outcome
from ..engine import GRACE_S, SLICE_TEXTS, Deliver, portions
from ..errors import ProtocolError
from ..loops import ended
from ..run import Run, StoppedError
from ..types import Vectors
from ..weighing import Text
from .lookup import InFlight, Lookup, believed, outcome_of

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
