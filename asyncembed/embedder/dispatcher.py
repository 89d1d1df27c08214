"""Routes a call: to the cache, to a request shared with other calls, or to bulk requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing, suppress

from ..batching.batch import Batch, Receiver
from ..batching.packing import OPEN_BATCHES
from ..batching.texts import Text, fit_one_request
from ..batching.tokens import ByteBound, TokenCounter
from ..errors import AsyncEmbedError, FatalProviderError, TransportError
from ..sending.attempts import BatchSender, Endpoint
from ..sending.context import ActiveCalls, CallContext, StoppedError
from ..sending.feeding import LoadCounter, Slices, embed_slices, until_stopped
from ..types import Vectors
from .caching import PUT_FIRST_S, CacheClient, CachingReceiver
from .coalescing import CLOSED, Coalescer, SmallCall

# A call with up to this many texts is assumed to belong to a web request, not to a job. It shares requests with other
# calls, and has priority over jobs.
SMALL_TEXTS = 32


class Dispatcher:
    """An embedder on one event loop: all its calls go through here."""

    def __init__(
        self, endpoint: Endpoint, cache: CacheClient | None, load_counter: LoadCounter, *, max_waiting: int
    ) -> None:
        max_inputs = endpoint.limits.inputs
        self.endpoint = endpoint
        self.coalescer = Coalescer(
            self._send_shared,
            endpoint.recorder,
            max_inputs=max_inputs,
            max_requests=endpoint.limiter.concurrency,
            max_waiting=max_waiting,
        )
        self._active = ActiveCalls()
        self._cache = cache
        self._load_counter = load_counter
        self._small = min(SMALL_TEXTS, max_inputs)

    def status(self) -> str:
        """Return a short description of what is in flight and what is queued."""
        limiter = self.endpoint.limiter
        queued, paused_s = limiter.waiting + self.coalescer.queued, limiter.rate.paused_s
        parts = [f"{limiter.in_flight} of {limiter.concurrency} requests under way"]
        parts += [f"{queued:,} queued"] if queued else []
        parts += [f"paused for {paused_s:.1f} s"] if paused_s else []
        return ", ".join(parts)

    def is_small(self, texts: Sequence[Text]) -> bool:
        """Return whether a call with these texts shares requests with other calls."""
        return len(texts) <= self._small

    async def check(self, call: CallContext) -> int:
        """Send one short text; see `Endpoint.check`."""
        with self._active.running(call):
            return await self.endpoint.check(call)

    async def embed_one(self, text: str, call: CallContext) -> Vectors | None:
        """Return the vector of one text, shared with other calls; None if the call was stopped.

        Raises:
            Exception: The text failed. Each call gets its own error object.
        """
        small = SmallCall([text])
        with self._active.running(call), suppress(StoppedError):
            if self._cache is not None:
                async with call.unless_stopped():
                    hits, _ = await self._cache.look_up([Text(text, (0,))], call.usage)
                if hits.texts:
                    vector: Vectors = hits.vectors[0]
                    return vector
            await self._wait_for(small, call)
        if small.errors:
            raise small.errors[0]
        return small.vectors.get(0)

    async def embed_shared(self, texts: Sequence[Text], call: CallContext, receiver: Receiver) -> None:
        """Embed a few texts in requests shared with other calls, and add their cost to the call's usage.

        Raises:
            OverloadedError: Too many texts are waiting.
        """
        missing = texts
        with self._active.running(call), suppress(StoppedError):
            if self._cache is not None:
                async with call.unless_stopped():
                    hits, missing = await self._cache.look_up(texts, call.usage)
                    if hits.texts:
                        await receiver.deliver(hits)
            if missing:
                await self._share(missing, call, receiver)

    async def _share(self, texts: Sequence[Text], call: CallContext, receiver: Receiver) -> None:
        small = SmallCall([text.content for text in texts])
        try:
            await self._wait_for(small, call)
        finally:
            small.bill(call.usage)
            await receiver.deliver(small.outcome(texts))
        for error in small.errors.values():
            if isinstance(error, FatalProviderError):
                call.stop(error)
            elif not isinstance(error, AsyncEmbedError):
                raise error

    async def _wait_for(self, small: SmallCall, call: CallContext) -> None:
        """Wait for the answers of a small call, but not for a pause that ends after its deadline."""
        with self.endpoint.limiter.rate.on_pause(call.check_pause):
            async with call.unless_stopped():
                await self.coalescer.embed(small)

    async def _send_shared(self, texts: Sequence[Text], call: CallContext, receiver: Receiver) -> None:
        if self._cache is not None:
            receiver = CachingReceiver(self._cache, call, receiver, first_s=PUT_FIRST_S)
        with self._active.running(call):
            await self._send(texts, call, receiver)

    async def embed_bulk(self, texts: Sequence[Text], call: CallContext, receiver: Receiver) -> None:
        """Embed a list of texts in bulk requests."""
        with self._active.running(call):
            if self._cache is None:
                await self._send(texts, call, receiver)
                return
            load_counter = _bytes if fit_one_request(texts, self.endpoint.limits) else self._load_counter
            caching, held = CachingReceiver(self._cache, call, receiver), list[Text]()
            await self._send_misses(_once(texts), load_counter, call, caching, held=held)
            if held:  # now the size is known, or every text was a hit
                await self._send_misses(_once(held), load_counter, call, caching)

    async def embed_slices(
        self,
        slices: Slices,
        call: CallContext,
        receiver: Receiver,
        *,
        open_batches: int = OPEN_BATCHES,
        ends_by_itself: bool = True,
    ) -> None:
        """Embed slices of texts as they are read; see `sending.feeding.embed_slices`, and `ActiveCalls.running`."""
        with self._active.running(call, ends_by_itself=ends_by_itself):
            if self._cache is not None:
                caching = CachingReceiver(self._cache, call, receiver)
                await self._send_misses(slices, self._load_counter, call, caching, open_batches)
                return
            sender = BatchSender(self.endpoint, call, receiver)
            async with aclosing(until_stopped(slices, call)) as taken:
                await embed_slices(taken, self._load_counter, sender, open_batches=open_batches)

    async def _send_misses(
        self,
        slices: Slices,
        load_counter: LoadCounter,
        call: CallContext,
        caching: CachingReceiver,
        open_batches: int = OPEN_BATCHES,
        *,
        held: list[Text] | None = None,
    ) -> None:
        sender = BatchSender(self.endpoint, call, caching)
        async with (
            aclosing(until_stopped(slices, call)) as taken,
            aclosing(caching.misses(taken, held=held)) as misses,
        ):
            await embed_slices(misses, load_counter, sender, open_batches=open_batches)

    async def _send(self, texts: Sequence[Text], call: CallContext, receiver: Receiver) -> None:
        sender = BatchSender(self.endpoint, call, receiver)
        if fit_one_request(texts, self.endpoint.limits):
            await sender.admission.enter()
            await sender.send(Batch(list(texts)))
            return
        async with aclosing(until_stopped(_once(texts), call)) as slices:
            await embed_slices(slices, self._load_counter, sender)

    async def aclose(self, grace_s: float) -> None:
        """Wait up to `grace_s` seconds for running calls, then stop them."""
        ends_at = asyncio.get_running_loop().time() + grace_s
        self._active.stop_open(TransportError(CLOSED))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._active.stop_all, TransportError(CLOSED))
            stack.push_async_callback(self.coalescer.aclose)
            await self._active.ended_by(ends_at)


async def _once(texts: Sequence[Text]) -> Slices:
    yield texts


async def _bytes() -> TokenCounter:
    return ByteBound()
