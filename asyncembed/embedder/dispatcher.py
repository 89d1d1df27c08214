"""An embedder on one event loop: its engine, the calls that share requests, the cache, and all that is under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import TypeAlias

from ..batching.batch import Deliver
from ..batching.packing import OPEN_BATCHES, Limits
from ..batching.texts import Text
from ..batching.tokens import ByteBound, TokenCounter
from ..errors import AsyncEmbedError, FatalProviderError, TransportError
from ..sending.engine import Engine
from ..sending.recorder import Watch
from ..sending.run import Run, Runs, StoppedError
from ..types import Vectors
from .caching import CachedCall, Lookup
from .coalescing import CLOSED, Call, Coalescer

# A call of so many texts is one of a web request's, not of a job: it shares requests with others, and goes before jobs.
SMALL_TEXTS = 32

LoadCounter: TypeAlias = Callable[[], Awaitable[TokenCounter]]


class Dispatch:
    """Takes texts to where they are answered: the cache, a shared request, or requests of their own.

    Args:
        engine: Sends.
        watch: Is told of the calls that share requests.
        lookup: The cache, if there is one.
        load_counter: Returns the counter of the model's tokens; may take a while.
        limits: What a request may hold.
        most_requests: Requests that may be under way.
        most_waiting: Texts of small calls that may wait.
    """

    def __init__(
        self,
        engine: Engine,
        watch: Watch,
        lookup: Lookup | None,
        load_counter: LoadCounter,
        limits: Limits,
        *,
        most_requests: int,
        most_waiting: int,
    ) -> None:
        self.engine = engine
        self.coalescer = Coalescer(
            self.send, watch, most=limits.inputs, most_requests=most_requests, most_waiting=most_waiting
        )
        self._runs = Runs()
        self._lookup = lookup
        self._load_counter = load_counter
        self._limits = limits
        self._most_requests = most_requests

    def status(self) -> str:
        """What is under way, and what waits for what, in half a line."""
        slots = self.engine.slots
        queued, paused_s = slots.waiting + self.coalescer.gathering, slots.pace.paused_s
        parts = [f"{slots.under_way} of {self._most_requests} requests under way"]
        parts += [f"{queued:,} queued"] if queued else []
        parts += [f"paused for {paused_s:.1f} s"] if paused_s else []
        return ", ".join(parts)

    def is_small(self, texts: Sequence[Text]) -> bool:
        """Whether they are so few that they go with others."""
        return len(texts) <= min(SMALL_TEXTS, self._limits.inputs)

    async def check(self, run: Run) -> int:
        """Send one short text; see `Engine.check`."""
        with self._runs.under_way(run, ends_by_itself=True):
            return await self.engine.check(run)

    async def one(self, text: str, run: Run) -> Vectors | None:
        """Return the vector of one text, shared with whoever else asks; None if the run was stopped.

        Raises:
            Exception: Why it failed; an object of this call's own.
        """
        call = Call([text])
        with self._runs.under_way(run, ends_by_itself=True), suppress(StoppedError):
            if self._lookup is not None:
                async with run.unless_stopped():
                    vector = await self._lookup.one(text, run)
                if vector is not None:
                    return vector
            await self._ask(call, run)
        if call.errors:
            raise call.errors[0]
        return call.vectors.get(0)

    async def share(self, texts: Sequence[Text], run: Run, deliver: Deliver) -> None:
        """Have a few texts embedded together with those of other calls, and add to the run what that has cost.

        Raises:
            OverloadedError: Too many wait already.
        """
        missing = texts
        with self._runs.under_way(run, ends_by_itself=True), suppress(StoppedError):
            if self._lookup is not None:
                async with run.unless_stopped():
                    missing = await self._lookup.few(texts, run, deliver)
            if missing:
                await self._share(missing, run, deliver)

    async def _share(self, texts: Sequence[Text], run: Run, deliver: Deliver) -> None:
        call = Call([text.content for text in texts])
        try:
            await self._ask(call, run)
        finally:
            call.bill(run)
            await deliver(call.outcome(texts))
        for error in call.errors.values():
            if isinstance(error, FatalProviderError):
                run.stop(error)
            elif not isinstance(error, AsyncEmbedError):
                raise error

    async def _ask(self, call: Call, run: Run) -> None:
        """Wait for the answers to a call, but not for a pause that ends after its deadline."""
        with self.engine.slots.pace.told(run.meet_pause):
            async with run.unless_stopped():
                await self.coalescer.get(call)

    async def send(self, texts: Sequence[Text], run: Run, deliver: Deliver) -> None:
        """Embed texts that are all there, in requests of their own."""
        async with aclosing(_once(texts)) as slices:
            await self.run(slices, run, deliver, load_counter=partial(self._counter_for, texts), at_once=True)

    async def run(
        self,
        slices: AsyncIterator[Sequence[Text]],
        run: Run,
        deliver: Deliver,
        *,
        load_counter: LoadCounter | None = None,
        open_batches: int = OPEN_BATCHES,
        ends_by_itself: bool = True,
        at_once: bool = False,
    ) -> None:
        """Embed slices of texts and deliver outcomes while their slot is held; see `Engine.run`.

        Args:
            slices: The texts.
            run: What it costs, and whether it goes on.
            deliver: Takes the outcomes.
            load_counter: In place of the model's.
            open_batches: See `Engine.run`.
            ends_by_itself: Whether closing may wait for it.
            at_once: All texts are there from the start, each once, so other calls may wait for them.
        """

        async def send(slices: AsyncIterator[Sequence[Text]], deliver: Deliver) -> None:
            counter = await (load_counter or self._load_counter)()
            await self.engine.run(slices, counter, run, deliver, open_batches=open_batches)

        with self._runs.under_way(run, ends_by_itself=ends_by_itself):
            if self._lookup is None:
                await send(slices, deliver)
            else:
                await CachedCall(self._lookup, run, deliver, send, at_once=at_once).run(slices)

    async def aclose(self, grace_s: float) -> None:
        """Wait so many seconds for what is under way, then end it."""
        ends_at = asyncio.get_running_loop().time() + grace_s
        self._runs.stop_open(TransportError(CLOSED))
        try:
            await self._runs.ended_by(ends_at)
        finally:
            try:
                await self.coalescer.aclose()
            finally:
                await self._runs.stop_all(TransportError(CLOSED))

    async def _counter_for(self, texts: Sequence[Text]) -> TokenCounter:
        # No text has more tokens than bytes, and no character more than four bytes: what is surely short enough
        # for one text and, all together, for one request, needs no tokenizer.
        characters = self._limits.tokens // 4
        if len(texts) <= characters and sum(len(text.content) for text in texts) <= characters:
            longest = max(len(text.content) for text in texts)
            if 4 * longest <= self._limits.tokens_per_text:
                return ByteBound()
        return await self._load_counter()


async def _once(texts: Sequence[Text]) -> AsyncGenerator[Sequence[Text], None]:
    yield texts
