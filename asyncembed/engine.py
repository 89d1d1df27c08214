"""One call's texts to vectors: count, pack, send, and after a failure wait, split, reject or stop.

The texts come in slices and leave in outcomes; in between they are batches, which a few workers bring to an end. What
a worker splits goes back to all of them. Decisions are made in `packing`, `weighing` and `retry`; here is the waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from .errors import (
    AsyncEmbedError,
    BadRequestError,
    DeadlineError,
    ProviderError,
    RateLimitedError,
    RejectedTextError,
    TooLargeError,
)
from .pacing import Pace, Slots
from .packing import OPEN_BATCHES, Limits, Packer
from .retry import History, Reject, Retry, Split, decide, is_overload
from .run import Run
from .tokens import TokenCounter
from .types import Provider, Reply, Vectors
from .weighing import Item, Text, TooLong, weigh_texts
from .workers import Workers

logger = logging.getLogger(__name__)

# Counted in one go, in a thread: 10 ms of tiktoken, and nothing for the loop.
SLICE_TEXTS = 512
SLICE_CHARACTERS = 512 * 1024

# Beside the workers that hold a slot there are some that wait out a backoff, so that one batch that fails does not
# keep the others from being sent; more of them would only hold more texts in memory.
SPARE_WORKERS = 8

# After a fatal answer the requests under way are paid for already; they get this long to bring what they can.
GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Texts that are done: row i of `vectors`, float32[n, d], belongs to `texts[i]`; `failed` ones have an error."""

    texts: Sequence[Text] = ()
    vectors: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    failed: Sequence[tuple[Text, AsyncEmbedError]] = ()


Deliver: TypeAlias = Callable[[Outcome], Awaitable[None]]
"""Takes an outcome, while the slot is held: what is not stored yet counts as in flight."""


@dataclass(slots=True, eq=False)
class Batch:
    """What one request carries, and its past."""

    items: list[Item]
    sent: bool = False
    failures: int = 0
    alone: int = 0
    probed: bool = False
    successes_at_first: int | None = None
    """The provider's count of successes when these texts first failed,"""
    successes_at_last: int | None = None
    """and when they last did."""

    @property
    def weight(self) -> int:
        return sum(item.weight for item in self.items)

    def failed(self, successes: int) -> None:
        """Note that an attempt failed, when the provider had had so many successes with anybody."""
        if self.successes_at_first is None:
            self.successes_at_first = successes
        self.alone = self.alone + 1 if successes == self.successes_at_last else 1
        self.failures += 1
        self.successes_at_last = successes

    def part(self, items: list[Item]) -> Batch:
        # A part of a batch that failed keeps its past, but a single text is given all its attempts before it is
        # called the culprit.
        return replace(self, items=items, failures=self.failures if len(items) > 1 else 0)

    def halves(self) -> list[Batch]:
        middle = (len(self.items) + 1) // 2
        return [self.part(self.items[:middle]), self.part(self.items[middle:])]


class Engine:
    """Brings texts to one provider. Holds no state of a call; what it learns of the provider's limits, it keeps."""

    def __init__(
        self,
        provider: Provider,
        slots: Slots,
        limits: Limits,
        *,
        concurrency: int,
        too_long: TooLong,
        max_retries: int,
    ) -> None:
        self._provider = provider
        self._slots = slots
        self.limits = limits
        self._workers = concurrency + min(concurrency, SPARE_WORKERS)
        self._too_long = too_long
        self._max_retries = max_retries

    @property
    def _pace(self) -> Pace:
        return self._slots.pace

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
            Exception: What `deliver` or `slices` raised, as it is; nothing is left running.
        """
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                work = Workers(group, self._workers, lambda batch: self._step(batch, run, deliver))
                packer: Packer[Item] = Packer(self.limits.inputs, self.limits.tokens, open_batches)
                async with aclosing(_until_stopped(slices, run)) as taken:
                    async for texts in taken:
                        for some in portions(texts):
                            for batch in await self._pack(some, counter, packer, deliver):
                                await work.put(batch)
                        if not texts:
                            for items in packer.flush():
                                await work.put(Batch(items))
                for items in packer.flush():
                    await work.put(Batch(items))
                await work.close()
        except BaseExceptionGroup as errors:
            # One thing went wrong first; what else is in the group is its consequence.
            error = _first(errors)
        if error is not None:
            raise error

    async def _pack(
        self, texts: Sequence[Text], counter: TokenCounter, packer: Packer[Item], deliver: Deliver
    ) -> list[Batch]:
        items, failed = await asyncio.to_thread(weigh_texts, texts, counter, self.limits, self._too_long)
        if failed:
            await deliver(Outcome(failed=failed))
        full = (packer.add(item, item.weight) for item in items)
        return [Batch(items) for items in full if items]

    async def _step(self, batch: Batch, run: Run, deliver: Deliver) -> list[Batch]:
        """Send a batch once; return what is left of it to be sent."""
        if run.stopped_by is not None:
            await deliver(_failed(batch, run.stopped_by))
            return []
        if len(batch.items) > 1 and (len(batch.items) > self.limits.inputs or batch.weight > self.limits.tokens):
            return self._repack(batch)
        error = await self._send(batch, run, deliver)
        return [] if error is None else await self._after(error, batch, run, deliver)

    def _repack(self, batch: Batch) -> list[Batch]:
        # It was packed before the provider's smaller limits were learned.
        packer: Packer[Item] = Packer(self.limits.inputs, self.limits.tokens, 1)
        full = [items for item in batch.items if (items := packer.add(item, item.weight))]
        return [batch.part(items) for items in (*full, *packer.flush())]

    async def _send(self, batch: Batch, run: Run, deliver: Deliver) -> ProviderError | None:
        """Send a batch once and deliver what comes; return the error if none does."""
        async with AsyncExitStack() as slot:
            try:
                async with run.unless_stopped():
                    ticket = await slot.enter_async_context(self._slots.slot(batch.weight))
            except TimeoutError:
                return _StoppedError("the run was stopped")
            run.requests += 1
            run.retries += batch.sent
            batch.sent = True
            try:
                async with run.unless_stopped(GRACE_S):
                    reply = await self._provider.embed([item.content for item in batch.items])
            except TimeoutError:
                return _StoppedError("no answer came before the run was stopped")
            except ProviderError as error:
                self._pace.observe(ticket, error.rates)
                self._pace.failed()
                if is_overload(error):
                    self._pace.refused(ticket)
                return error
            self._pace.observe(ticket, reply.rates)
            self._pace.succeeded()
            run.successes += 1
            run.tokens += reply.tokens or 0
            run.tokens_known &= reply.tokens is not None
            await deliver(_settled(batch, reply))
            return None

    async def _after(self, error: ProviderError, batch: Batch, run: Run, deliver: Deliver) -> list[Batch]:
        """Do what has to be done after a failed attempt; return what is left to be sent."""
        if isinstance(error, _StoppedError):
            return [batch]  # the next step fails it with the reason
        batch.failed(self._pace.successes)
        action = decide(error, self._history(error, batch, run), self._max_retries)
        if isinstance(action, Split) and action.probe:
            if left := await self._probe(batch, run, deliver):
                return left
            action = decide(error, self._history(error, batch, run), self._max_retries)
        logger.debug("batch of %d failed: %s, %s", len(batch.items), type(error).__name__, action)
        if isinstance(action, Retry):
            return await self._wait(action, batch, run)
        if isinstance(action, Split):
            if isinstance(error, TooLargeError):
                self._learn(error, batch)
            return batch.halves()
        if isinstance(action, Reject):
            run.rejections += 1
            await deliver(_failed(batch, _rejected(error)))
            return []
        logger.warning("the run is stopped: %s", type(action.error).__name__)
        run.stop(action.error)
        return [batch]

    def _history(self, error: ProviderError, batch: Batch, run: Run) -> History:
        rounds = self._pace.refusals if isinstance(error, RateLimitedError) else 0
        pace = self._pace
        return History(
            inputs=len(batch.items),
            failures=max(batch.failures, rounds),
            alone=batch.alone,
            healthy=pace.successes > (batch.successes_at_first or 0) and not pace.looks_down,
            probed=batch.probed,
            rejections=0 if run.successes else run.rejections,
        )

    async def _wait(self, action: Retry, batch: Batch, run: Run) -> list[Batch]:
        loop = asyncio.get_running_loop()
        if run.deadline_at is not None and loop.time() + action.after_s > run.deadline_at:
            run.stop(
                DeadlineError(f"the next attempt would be in {action.after_s:.1f} s, which is beyond the deadline")
            )
        elif action.shared:
            logger.warning("pausing for %.1f s, as the provider asks", action.after_s)
            self._pace.pause(action.after_s)  # the next slot is given out after it
        else:
            try:
                async with run.unless_stopped():
                    await asyncio.sleep(action.after_s)
            except TimeoutError:
                pass
        return [batch]

    async def _probe(self, batch: Batch, run: Run, deliver: Deliver) -> list[Batch]:
        """Tell an outage from a text that breaks its batch: does the provider take a single text of it?

        Returns:
            What is left to be sent if it does; nothing if it does not.
        """
        batch.probed = True
        for index in (0, -1):
            if await self._send(batch.part([batch.items[index]]), run, deliver) is None:
                rest = batch.part(batch.items[1:] if index == 0 else batch.items[:-1])
                return rest.halves() if len(rest.items) > 1 else [rest]
        return []

    def _learn(self, error: TooLargeError, batch: Batch) -> None:
        if error.max_inputs is not None and 0 < error.max_inputs < len(batch.items):
            self.limits = replace(self.limits, inputs=min(self.limits.inputs, error.max_inputs))
            logger.warning("the provider takes %d inputs a request; remembered", error.max_inputs)
        elif error.max_tokens is not None and error.max_tokens > 0:
            # The server counts otherwise than we do: keep to its limit in its own measure if it told us both.
            requested = max(error.requested_tokens or 0, 1.02 * error.max_tokens)
            tokens = int(batch.weight * error.max_tokens / requested)
            self.limits = replace(self.limits, tokens=max(1, min(self.limits.tokens, tokens)))
            logger.warning("the provider takes fewer tokens a request than %d; remembered", batch.weight)


class _StoppedError(ProviderError):
    """Not an answer: the run ended while this was waited for."""


def portions(texts: Sequence[Text]) -> Iterable[Sequence[Text]]:
    """Cut a sequence into pieces that are counted at once."""
    start = characters = 0
    for end, text in enumerate(texts, start=1):
        characters += len(text.content)
        if end - start >= SLICE_TEXTS or characters >= SLICE_CHARACTERS:
            yield texts[start:end]
            start, characters = end, 0
    if start < len(texts):
        yield texts[start:]


async def _until_stopped(slices: AsyncIterable[Sequence[Text]], run: Run) -> AsyncGenerator[Sequence[Text], None]:
    iterator = aiter(slices)
    while True:
        try:
            async with run.unless_stopped():
                texts = await anext(iterator)
        except (StopAsyncIteration, TimeoutError) as end:
            if isinstance(end, TimeoutError) and run.stopped_by is None:
                raise  # the source's own
            return
        yield texts


def _settled(batch: Batch, reply: Reply) -> Outcome:
    """Return what a reply finishes: whole texts, and long ones whose last piece this was."""
    if all(item.text.mean is None for item in batch.items):
        return Outcome([item.text for item in batch.items], reply.vectors)
    texts: list[Text] = []
    rows: list[Vectors] = []
    failed: list[tuple[Text, AsyncEmbedError]] = []
    for item, vector in zip(batch.items, reply.vectors, strict=True):
        mean = item.text.mean
        if mean is None:
            texts.append(item.text)
            rows.append(vector)
            continue
        mean.add(vector, item.tokens)
        if mean.missing == 0 and mean.error is not None:
            failed.append((item.text, mean.error))
        elif mean.missing == 0:
            texts.append(item.text)
            rows.append(mean.vector())
    vectors = np.stack(rows) if rows else np.empty((0, reply.vectors.shape[1]), np.float32)
    return Outcome(texts, vectors, failed)


def _failed(batch: Batch, error: AsyncEmbedError) -> Outcome:
    """Fail a batch's texts; a long one when its last piece is done, so that it is delivered once."""
    failed: list[tuple[Text, AsyncEmbedError]] = []
    for item in batch.items:
        mean = item.text.mean
        if mean is not None:
            mean.fail(error)
        if mean is None or mean.missing == 0:
            failed.append((item.text, error if mean is None else mean.error or error))
    return Outcome(failed=failed)


def _rejected(error: ProviderError) -> AsyncEmbedError:
    if not isinstance(error, (BadRequestError, TooLargeError)):
        return error
    rejected = RejectedTextError(f"the provider refused it: {error}")
    rejected.__cause__ = error
    return rejected


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
