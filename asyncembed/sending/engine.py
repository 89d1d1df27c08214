"""One call's texts to vectors: count, pack, send, and after a failure wait, split, reject or stop.

The texts come in slices and leave in outcomes; in between they are batches, which a few workers bring to an end. What
a worker splits goes back to all of them. Decisions are made in `packing`, `weighing` and `retry`; here is the waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial

from ..batching.batch import Batch, Deliver, Outcome, failed, settled
from ..batching.packing import OPEN_BATCHES, Limits, Packer
from ..batching.texts import Item, Text, TooLong, portions, weigh_texts
from ..batching.tokens import TokenCounter
from ..errors import (
    AsyncEmbedError,
    BadRequestError,
    DeadlineError,
    ProtocolError,
    ProviderError,
    RejectedTextError,
    TooLargeError,
    TransportError,
)
from ..types import Provider, Reply, check_vectors, info_of
from .pacing import Pace, Slots, Ticket
from .recorder import Watch
from .retry import Action, History, Probe, Reject, Retry, Split, Stop, decide, is_overload
from .run import Run, StoppedError
from .workers import Workers

logger = logging.getLogger(__name__)


# Counted where they are, in 0.3 ms of tiktoken at most: so small calls go on when all threads wait for them.
INLINE_CHARACTERS = 4 * 1024

# Beside the workers that hold a slot, and one with the batch that goes next, there are some that wait out a backoff, so
# that one batch that fails does not keep the others from being sent; more of them would only hold more texts in memory.
SPARE_WORKERS = 8

# After so many requests without an answer it is said, once a run, that something is wrong; one is a line that was cut.
FAILURES_TOLD = 3

# So long a limit that the provider named is kept before the larger requests are tried again. That costs one refusal a
# slot, and a limit that was one server's of many, or a mistake, does no harm for ever.
REMEMBERED_S = 900.0

# After a fatal answer the requests under way are paid for already; they get this long to bring what they can.
GRACE_S = 10.0


class Engine:
    """Brings texts to one provider. Holds no state of a call; what it learns of the provider's limits, it keeps."""

    def __init__(
        self,
        provider: Provider,
        slots: Slots,
        limits: Limits,
        *,
        watch: Watch,
        concurrency: int,
        too_long: TooLong,
        max_retries: int,
    ) -> None:
        self._provider = provider
        self._watch = watch
        self.slots = slots
        self._given = limits
        self._learned: Limits | None = None
        self._forgotten_at = 0.0
        self._workers = concurrency + 1
        self._spare_workers = min(concurrency, SPARE_WORKERS)
        self._too_long = too_long
        self._max_retries = max_retries

    @property
    def limits(self) -> Limits:
        """What a request may hold: as it was given, or less if the provider has said so."""
        if self._learned is not None and asyncio.get_running_loop().time() >= self._forgotten_at:
            self._learned = None
        return self._learned or self._given

    @property
    def _pace(self) -> Pace:
        return self.slots.pace

    async def check(self, run: Run) -> int:
        """Send the shortest of texts once; return the size of its vector, 0 if the run was stopped.

        Raises:
            ProviderError: It failed.
        """
        dimensions = 0

        async def look(outcome: Outcome) -> None:
            nonlocal dimensions
            dimensions = outcome.vectors.shape[1]

        text = Text("a", [0], tokens=1, weight=1)
        try:
            error = await self._send(Batch([text]), run, look)
        except StoppedError:
            return 0
        if error is not None:
            raise error
        return dimensions

    async def run(
        self,
        slices: AsyncIterable[Sequence[Text]],
        counter: TokenCounter,
        run: Run,
        deliver: Deliver,
        *,
        open_batches: int = OPEN_BATCHES,
    ) -> None:
        """Embed all texts of all slices and deliver each text once, with its vector or its error.

        When the run is stopped, the texts already taken are delivered as failed and no further slice is taken.
        A slice without texts means that none will come for a while: what waits for company is sent.

        Raises:
            Exception: What `slices` raised, after what it gave before was delivered; or what `deliver` raised, at
                once. Nothing is left running.
        """
        packer: Packer[Item] = Packer(self.limits.inputs, self.limits.tokens, open_batches)
        error: BaseException | None = None
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()

        async def counted(outcome: Outcome) -> None:
            self._watch.texts(len(outcome.texts), len(outcome.failed))
            await deliver(outcome)

        try:
            async with asyncio.TaskGroup() as group:
                work = Workers(
                    group, self._workers, lambda batch: self._step(batch, run, counted), spare=self._spare_workers
                )
                run.aside = work.aside
                try:
                    await self._feed(work, packer, slices, counter, run, counted)
                except Exception as broken:
                    if task.cancelling() > cancels:
                        raise  # the source's answer to being cancelled: nobody is left to take what it gave before
                    error = broken
                for items in packer.flush():
                    await work.put(Batch(items))
                await work.close()
        except BaseExceptionGroup as errors:
            # What came first counts, the rest is its consequence. Only the outermost group is the task group's own.
            error = error or errors.exceptions[0]
        if error is not None:
            raise error

    async def _feed(
        self,
        work: Workers[Batch],
        packer: Packer[Item],
        slices: AsyncIterable[Sequence[Text]],
        counter: TokenCounter,
        run: Run,
        deliver: Deliver,
    ) -> None:
        async with aclosing(_until_stopped(slices, run)) as taken:
            async for texts in taken:
                for some in portions(texts):
                    if run.stopped_by is not None:
                        await deliver(Outcome(failed=[(text, run.stopped_by) for text in some]))
                        continue
                    for batch in await self._pack(some, counter, packer, deliver):
                        await work.put(batch)
                if not texts:
                    for items in packer.flush():
                        await work.put(Batch(items))

    async def _pack(
        self, texts: Sequence[Text], counter: TokenCounter, packer: Packer[Item], deliver: Deliver
    ) -> list[Batch]:
        weigh = partial(weigh_texts, texts, counter, self.limits, self._too_long)
        is_small = sum(len(text.content) for text in texts) <= INLINE_CHARACTERS
        items, failed = weigh() if is_small else await asyncio.to_thread(weigh)
        if failed:
            await deliver(Outcome(failed=failed))
        full = (packer.add(item, item.weight) for item in items)
        return [Batch(items) for items in full if items]

    async def _step(self, batch: Batch, run: Run, deliver: Deliver) -> list[Batch]:
        """Send a batch once; return what is left of it to be sent."""
        run.meet_pause(self._pace.paused_until)
        if run.stopped_by is not None:
            await deliver(failed(batch, run.stopped_by))
            return []
        if len(batch.items) > 1 and (len(batch.items) > self.limits.inputs or batch.weight > self.limits.tokens):
            return self._repack(batch)
        try:
            if batch.in_doubt:
                error = await self._probe(batch, run, deliver)
                left = [Batch(batch.items, sent=True)]
            else:
                error = await self._send(batch, run, deliver)
                left = []
            return left if error is None else await self._after(error, batch, run, deliver)
        except StoppedError:
            return [batch]  # the next step fails it with the reason

    def _repack(self, batch: Batch) -> list[Batch]:
        # It was packed before the provider's smaller limits were learned.
        packer: Packer[Item] = Packer(self.limits.inputs, self.limits.tokens, 1)
        full = [items for item in batch.items if (items := packer.add(item, item.weight))]
        return [batch.part(items) for items in (*full, *packer.flush())]

    async def _send(self, batch: Batch, run: Run, deliver: Deliver) -> ProviderError | None:
        """Send a batch once and deliver what comes; return the error if none does.

        Raises:
            StoppedError: The run was stopped before an answer came. Nothing was delivered.
        """
        async with AsyncExitStack() as slot:
            async with run.unless_stopped():
                ticket = await slot.enter_async_context(self.slots.slot(batch.weight, urgent=run.urgent))
            async with run.unless_stopped(GRACE_S):
                try:
                    reply = await self._request(batch, run, ticket)
                except ProviderError as error:
                    self._count_more(error.requests - 1, run)
                    run.tokens += error.tokens if isinstance(error, ProtocolError) else 0
                    self._pace.observe(ticket, error.rates)
                    self._pace.failed()
                    if is_overload(error):
                        self._pace.refused(ticket)
                    return error
            self._count_more(reply.requests - 1, run)
            self._pace.observe(ticket, reply.rates)
            self._pace.succeeded()
            run.successes += 1
            run.tokens += reply.tokens or 0
            run.tokens_known &= reply.tokens is not None
            if run.canary is None:
                run.canary = min(batch.items, key=_length)
            await deliver(settled(batch, reply))
            return None

    async def _request(self, batch: Batch, run: Run, ticket: Ticket) -> Reply:
        run.requests += 1
        run.retries += batch.sent
        inputs, limits = len(batch.items), self.limits
        fill = max(inputs / limits.inputs, ticket.tokens / limits.tokens)
        request = self._watch.request(ticket, inputs, fill, is_retry=batch.sent, callers=run.callers)
        batch.sent = True
        with request:
            texts = [item.content for item in batch.items]
            request.reply = await self._provider.embed(texts)
            if not info_of(self._provider).validates:
                check_vectors(request.reply.vectors, len(texts))
        return request.reply

    def _count_more(self, requests: int, run: Run) -> None:
        run.requests += requests
        run.retries += requests
        self._watch.more(requests)

    async def _after(self, error: ProviderError, batch: Batch, run: Run, deliver: Deliver) -> list[Batch]:
        """Do what has to be done after a failed attempt; return what is left to be sent."""
        batch.failed(self._pace.successes)
        action = self._decide(error, batch, run)
        if isinstance(action, Probe):
            await self._doubt(batch, run, deliver)
            action = self._decide(error, batch, run)
        is_silent = isinstance(error, TransportError) and self._pace.failures_in_a_row >= FAILURES_TOLD
        if is_silent and not run.is_silence_told:
            run.is_silence_told = True
            logger.warning(
                "%d requests in a row had no answer, the last one: %s; they are repeated", FAILURES_TOLD, error
            )
        logger.debug("batch of %d failed: %s, %s", len(batch.items), type(error).__name__, type(action).__name__)
        if isinstance(action, Retry):
            return await self._wait(action, batch, run)
        if isinstance(action, Split):
            if isinstance(error, TooLargeError):
                self._learn(error, batch)
            return batch.parts()
        if isinstance(action, Reject):
            run.rejections += 1
            await deliver(failed(batch, _rejected(error)))
            return []
        assert isinstance(action, Stop)
        logger.warning("the run is stopped: %s", type(action.error).__name__)
        run.stop(action.error)
        return [batch]

    def _decide(self, error: ProviderError, batch: Batch, run: Run) -> Action:
        pace = self._pace
        history = History(
            inputs=len(batch.items),
            failures=batch.failures,
            alone=batch.alone,
            healthy=batch.passed_since(pace.successes) and not pace.looks_down,
            probed=batch.in_doubt,
            canary=run.canary is not None,
            rejections=0 if run.successes else run.rejections,
            refusals=max(1, pace.refusals),
        )
        return decide(error, history, self._max_retries)

    async def _wait(self, action: Retry, batch: Batch, run: Run) -> list[Batch]:
        loop = asyncio.get_running_loop()
        if action.shared:
            if self._pace.pause(action.after_s):
                self._watch.paused(action.after_s, everybody=True)
                logger.warning("pausing for %.1f s: too fast for the provider", action.after_s)
        elif run.deadline_at is not None and loop.time() + action.after_s > run.deadline_at:
            run.stop(
                DeadlineError(f"the next attempt would be in {action.after_s:.1f} s, which is beyond the deadline")
            )
        else:
            self._watch.paused(action.after_s, everybody=False)
            async with run.aside(), run.unless_stopped():
                await asyncio.sleep(action.after_s)
        return [batch]

    async def _doubt(self, batch: Batch, run: Run, deliver: Deliver) -> None:
        """Find out whether the provider takes a single text; if it does not, the batch is in doubt."""
        probes = 1 if run.canary is not None else 2  # of its own, one may be the very text that breaks it
        for _ in range(probes):
            if await self._probe(batch, run, deliver) is None:
                return
        batch.in_doubt = True

    async def _probe(self, batch: Batch, run: Run, deliver: Deliver) -> ProviderError | None:
        """Send one text in the batch's place: one that has passed before, else one of its own, each time another.

        What passes of its own is delivered, and no longer part of it.
        """
        if run.canary is not None:
            known = Text(run.canary.content, [], tokens=run.canary.tokens, weight=run.canary.weight)
            return await self._send(Batch([known], sent=True), run, _to_nobody)
        item = batch.to_probe()
        error = await self._send(Batch([item], sent=True), run, deliver)
        if error is None:
            batch.items.remove(item)
        else:
            batch.suspect = item
        return error

    def _learn(self, error: TooLargeError, batch: Batch) -> None:
        known = self.limits
        learned = known
        if error.max_inputs is not None and 0 < error.max_inputs < len(batch.items):
            learned = replace(known, inputs=min(known.inputs, error.max_inputs))
        elif error.max_tokens is not None and error.max_tokens > 0:
            # The server counts otherwise than we do: keep to its limit in its own measure if it told us both.
            requested = max(error.requested_tokens or 0, 1.02 * error.max_tokens)
            tokens = int(batch.weight * error.max_tokens / requested)
            learned = replace(known, tokens=max(1, min(known.tokens, tokens)))
        if learned != known:
            self._learned, self._forgotten_at = learned, asyncio.get_running_loop().time() + REMEMBERED_S
            logger.warning(
                "the provider takes %d inputs and %d tokens a request; remembered", learned.inputs, learned.tokens
            )


async def _until_stopped(slices: AsyncIterable[Sequence[Text]], run: Run) -> AsyncGenerator[Sequence[Text], None]:
    iterator = aiter(slices)
    while True:
        try:
            async with run.unless_stopped():
                texts = await anext(iterator)
        except (StopAsyncIteration, StoppedError):
            return
        yield texts


async def _to_nobody(outcome: Outcome) -> None: ...


def _length(item: Item) -> int:
    return len(item.content)


def _rejected(error: ProviderError) -> AsyncEmbedError:
    if not isinstance(error, (BadRequestError, TooLargeError)):
        return error
    rejected = RejectedTextError(f"the provider refused it: {error}")
    rejected.__cause__ = error
    return rejected
