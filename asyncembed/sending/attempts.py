"""Sends each batch until it is done: attempt it, decide, then wait, split, reject or stop.

`Endpoint` holds the state that all calls to one provider share on one event loop. `BatchSender` belongs to one call: it
delivers each text of each batch once, with its vector or its error. Decisions are made in `retry` and `isolation`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace

from ..batching.batch import Batch, Outcome, Receiver, outcome_of_error, outcome_of_reply
from ..batching.packing import Limits
from ..batching.texts import Text, TooLong
from ..concurrency import task_group
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
from .context import CallContext, StoppedError
from .isolation import FailureRecord, Isolation, split_batch
from .pacing import ConcurrencyLimiter, Ticket
from .recorder import LoopRecorder
from .retry import Action, Probe, Reject, Retry, Split, Stop, decide, is_overload

logger = logging.getLogger(__name__)

# How many batches in backoff are replaced by others, so that a failing batch does not delay the rest. A larger number
# would only keep more texts in memory.
MAX_BACKING_OFF = 8

# After this many requests in a row without an answer, a call logs one warning. A single one is just a lost connection.
SILENT_FAILURES = 3

# How long a limit that the provider named is kept before larger requests are tried again. It may have been a mistake,
# or the limit of only one server of many. Trying costs one refused request per slot.
REMEMBERED_S = 900.0

# When a call is stopped, its requests in flight are already paid for: they get this long to finish.
GRACE_S = 10.0


class Endpoint:
    """A provider on one event loop, and the state that all calls to it share."""

    def __init__(
        self,
        provider: Provider,
        limiter: ConcurrencyLimiter,
        limits: Limits,
        *,
        recorder: LoopRecorder,
        too_long: TooLong,
        max_retries: int,
    ) -> None:
        self.provider = provider
        self.validates = info_of(provider).validates
        self.limiter = limiter
        self.recorder = recorder
        self.too_long = too_long
        self.max_retries = max_retries
        self._given = limits
        self._learned: Limits | None = None
        self._forget_at = 0.0

    @property
    def limits(self) -> Limits:
        """The limits of one request: the user's, or lower ones that the provider has named."""
        if self._learned is not None and asyncio.get_running_loop().time() >= self._forget_at:
            self._learned = None
        return self._learned or self._given

    def learn(self, error: TooLargeError, batch: Batch) -> None:
        """Remember a limit that the provider has named."""
        known = self.limits
        learned = known
        if error.max_inputs is not None and 0 < error.max_inputs < len(batch.inputs):
            learned = replace(known, inputs=min(known.inputs, error.max_inputs))
        elif error.max_tokens is not None and error.max_tokens > 0:
            # The server counts tokens differently: if its message has both numbers, its limit is scaled to our count.
            requested = max(error.requested_tokens or 0, 1.02 * error.max_tokens)
            tokens = int(batch.weight * error.max_tokens / requested)
            learned = replace(known, tokens=max(1, min(known.tokens, tokens)))
        if learned != known:
            self._learned, self._forget_at = learned, asyncio.get_running_loop().time() + REMEMBERED_S
            logger.warning(
                "the provider takes %d inputs and %d tokens a request; remembered", learned.inputs, learned.tokens
            )

    async def check(self, call: CallContext) -> int:
        """Send a text of one token once; return the size of its vector, 0 if the call was stopped.

        Raises:
            ProviderError: The request failed.
        """
        received = _Kept()
        try:
            sender = BatchSender(self, call, received)
            error = await sender.attempt(Batch([Text("a", [0], tokens=1, weight=1)]), received)
        except StoppedError:
            return 0
        if error is not None:
            raise error
        dimensions: int = received.outcome.vectors.shape[1]
        return dimensions


class Admission:
    """Limits how many batches of one call are in progress. Batches in backoff do not count, up to a limit.

    The latest part of a split batch is admitted first, so the search for a bad text reaches a single text before it
    turns to the next part. A new batch waits for all parts, which would otherwise pile up while the source goes on.
    """

    def __init__(self, most: int, most_backing_off: int) -> None:
        self._most = most
        self._most_backing_off = most_backing_off
        self._admitted = 0
        self._backing_off = 0
        self._waiters: list[asyncio.Future[None]] = []

    async def enter(self, *, is_part: bool = False) -> None:
        """Wait until another batch may be sent."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.insert(len(self._waiters) if is_part else 0, waiter)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Count a batch as done, and admit the next one."""
        self._admitted -= 1
        self._admit()

    @contextmanager
    def backing_off(self) -> Iterator[None]:
        """Let another batch take the place of one that is in backoff."""
        self._backing_off += 1
        self._admit()
        try:
            yield
        finally:
            self._backing_off -= 1

    def _admit(self) -> None:
        while self._waiters and self._admitted < self._most + min(self._backing_off, self._most_backing_off):
            waiter = self._waiters.pop()
            if not waiter.done():
                self._admitted += 1
                waiter.set_result(None)


class BatchSender:
    """Sends the batches of one call until they are done, and counts the call's usage."""

    def __init__(self, endpoint: Endpoint, call: CallContext, receiver: Receiver) -> None:
        self.endpoint = endpoint
        self.call = call
        concurrency = endpoint.limiter.concurrency
        # one batch more than there are slots: it is ready when a slot is granted
        self.admission = Admission(concurrency + 1, min(concurrency, MAX_BACKING_OFF))
        self._receiver = receiver
        self._isolation = Isolation()
        self._is_silence_reported = False

    async def deliver(self, outcome: Outcome) -> None:
        """Count texts that are done, and deliver them."""
        self.endpoint.recorder.texts(len(outcome.texts), len(outcome.failed))
        await self._receiver.deliver(outcome)

    async def send(self, batch: Batch, record: FailureRecord | None = None) -> None:
        """Send an admitted batch, and the parts into which it is split, until all are done. Nothing is left running.

        When the call is stopped, texts without an answer are delivered as failed.

        Raises:
            Exception: The receiver's.
        """
        parts: list[tuple[Batch, FailureRecord]] = []
        try:
            parts = await self._send(batch, record or FailureRecord())
        finally:
            if not parts:
                self.admission.leave()
        if parts:
            async with task_group() as group:
                for number, (part, its_record) in enumerate(parts):
                    if number > 0:  # the first part takes the batch's place
                        await self.admission.enter(is_part=True)
                    group.create_task(self.send(part, its_record))

    async def _send(self, batch: Batch, record: FailureRecord) -> list[tuple[Batch, FailureRecord]]:
        """Attempt and decide until a batch is done; return its parts if it has to be split."""
        rate, call = self.endpoint.limiter.rate, self.call
        while True:
            call.check_pause(rate.paused_until)
            if call.stopped_by is not None:
                await self.deliver(outcome_of_error(batch, call.stopped_by))
                return []
            if not batch.fits(self.endpoint.limits):
                return [(part, record.for_part(part.inputs)) for part in batch.repacked(self.endpoint.limits)]
            try:
                error = await (self._probe(batch, record) if record.isolating else self.attempt(batch, self))
                if error is None and not record.isolating:
                    return []
                if error is None:  # the provider is up again: the batch gets all its attempts
                    record = FailureRecord()
                    continue
                match await self._decide(error, batch, record):
                    case Retry() as retry:
                        await self._wait(retry)
                    case Split():
                        if isinstance(error, TooLargeError):
                            self.endpoint.learn(error, batch)
                        return split_batch(batch, record)
                    case Reject():
                        self._isolation.rejections += 1
                        await self.deliver(outcome_of_error(batch, _rejected(error)))
                        return []
                    case Stop(reason):
                        logger.warning("the call is stopped: %s", type(reason).__name__)
                        call.stop(reason)
            except StoppedError:
                pass  # the next iteration delivers the batch as failed

    async def attempt(self, batch: Batch, receiver: Receiver) -> ProviderError | None:
        """Send a batch once and deliver its vectors; return the error if there is one.

        Raises:
            StoppedError: The call was stopped before an answer came. Nothing was delivered.
        """
        call, rate = self.call, self.endpoint.limiter.rate
        async with AsyncExitStack() as stack:
            async with call.unless_stopped():
                slot = self.endpoint.limiter.slot(batch.weight, urgent=call.urgent)
                ticket = await stack.enter_async_context(slot)
            try:
                async with call.unless_stopped(GRACE_S):
                    reply = await self._request(batch, ticket)
            except ProviderError as error:
                self._count(error.requests, error.tokens if isinstance(error, ProtocolError) else 0)
                rate.update_from_headers(ticket, error.rates)
                rate.failed()
                if is_overload(error):
                    rate.refused(ticket)
                return error
            self._count(reply.requests, reply.tokens or 0)
            call.usage.tokens_known &= reply.tokens is not None
            rate.update_from_headers(ticket, reply.rates)
            rate.succeeded()
            self._isolation.good_batch = self._isolation.good_batch or batch
            await receiver.deliver(outcome_of_reply(batch, reply))
            return None

    async def _request(self, batch: Batch, ticket: Ticket) -> Reply:
        endpoint, usage = self.endpoint, self.call.usage
        inputs, limits = len(batch.inputs), endpoint.limits
        usage.requests += 1
        usage.retries += batch.sent
        fill = max(inputs / limits.inputs, ticket.tokens / limits.tokens)
        timer = endpoint.recorder.request(ticket, inputs, fill, is_retry=batch.sent, callers=self.call.callers)
        batch.sent = True
        with timer:
            timer.reply = await endpoint.provider.embed([each.content for each in batch.inputs])
            if not endpoint.validates:
                check_vectors(timer.reply.vectors, inputs)
        return timer.reply

    def _count(self, requests: int, tokens: int) -> None:
        """Count the cost of an attempt, for which the provider may have sent several requests."""
        usage = self.call.usage
        usage.tokens += tokens
        if requests > 1:
            usage.requests += requests - 1
            usage.retries += requests - 1
            self.endpoint.recorder.more_requests(requests - 1)

    async def _decide(self, error: ProviderError, batch: Batch, record: FailureRecord) -> Action:
        """Return what to do after a failed attempt; if it is unclear, send a probe first."""
        rate = self.endpoint.limiter.rate
        record.add(rate.successes)
        action = decide(error, self._isolation.history(batch, record, rate), self.endpoint.max_retries)
        if isinstance(action, Probe):
            record.isolating = not await self._any_probe_succeeds(batch, record)
            action = decide(error, self._isolation.history(batch, record, rate), self.endpoint.max_retries)
        is_silent = isinstance(error, TransportError) and rate.failures_in_a_row >= SILENT_FAILURES
        if is_silent and not self._is_silence_reported:
            self._is_silence_reported = True
            message = "%d requests in a row got no answer and are retried; the last error: %s"
            logger.warning(message, SILENT_FAILURES, error)
        logger.debug("batch of %d failed: %s, %s", len(batch.inputs), type(error).__name__, type(action).__name__)
        return action

    async def _any_probe_succeeds(self, batch: Batch, record: FailureRecord) -> bool:
        for _ in range(self._isolation.probes_needed):
            if await self._probe(batch, record) is None:
                return True
        return False

    async def _probe(self, batch: Batch, record: FailureRecord) -> ProviderError | None:
        """Send one text in the batch's place. If it belongs to the batch and succeeds, it is delivered and removed."""
        probe, is_own = self._isolation.next_probe(batch, record)
        error = await self.attempt(probe, self if is_own else _Kept())
        if is_own and error is None:
            batch.inputs.remove(probe.inputs[0])
        elif is_own:
            record.suspect = probe.inputs[0]
        return error

    async def _wait(self, retry: Retry) -> None:
        endpoint, call = self.endpoint, self.call
        if retry.shared:
            if endpoint.limiter.rate.pause(retry.after_s):
                endpoint.recorder.paused(retry.after_s, everybody=True)
                logger.warning("pausing for %.1f s: too fast for the provider", retry.after_s)
        elif call.deadline_at is not None and asyncio.get_running_loop().time() + retry.after_s > call.deadline_at:
            call.stop(DeadlineError(f"the next attempt would be in {retry.after_s:.1f} s, which is after the deadline"))
        else:
            endpoint.recorder.paused(retry.after_s, everybody=False)
            with self.admission.backing_off():
                async with call.unless_stopped():
                    await asyncio.sleep(retry.after_s)


class _Kept:
    """A receiver that keeps the last outcome, for requests whose vectors belong to no text of the call."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    async def deliver(self, outcome: Outcome) -> None:
        self.outcome = outcome


def _rejected(error: ProviderError) -> AsyncEmbedError:
    if not isinstance(error, (BadRequestError, TooLargeError)):
        return error
    rejected = RejectedTextError(f"the provider refused it: {error}")
    rejected.__cause__ = error
    return rejected
