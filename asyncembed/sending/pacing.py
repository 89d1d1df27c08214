"""Grants concurrency slots: limits how many requests are in flight, and at what rate they are sent.

`RateLimiter` is shared by all embedders that use one endpoint, key and model. It holds the pause after a 429, the
provider's token and request buckets (from its headers), the user's limits, and a cap on the requests in flight, which
falls when the provider is overloaded. `ConcurrencyLimiter` adds the concurrency slots of one embedder.

Requests are first come, first served, so small requests cannot starve a large one ahead of them. Urgent requests, for
which a caller waits, have priority over bulk requests; see `PriorityQueue`. A batch in backoff does not wait here.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakValueDictionary

from ..types import Rates
from .rate_limits import Bucket, bucket_from_headers

# Until the first answer has reported the limits, at most this many tokens are in flight, or one larger request. Eight
# full requests at once are 2.4 million tokens, more than twice what a new OpenAI account may send in a minute. It costs
# a bulk job one round trip, and small jobs nothing.
TOKENS_BEFORE_FIRST_ANSWER = 20_000

# This many failures in a row are an outage, even if a batch has seen successes of others: the search for one bad text
# among 2,048 has at most 11 steps, in 8 slots at once.
FAILURES_OF_AN_OUTAGE = 32

# A pause is longer by a random share of up to this, so that many processes do not all restart at the same moment.
PAUSE_JITTER = 0.05

# The cost of an urgent request if only slots are scarce; a bulk request costs 1. So urgent ones get four slots of five.
URGENT_SLOT = 0.25


@dataclass(slots=True, eq=False)
class _Waiter:
    cost: float
    is_ready: Callable[[], bool]
    bypassed_cost: float = 0.0
    """The cost of the urgent waiters that overtook it."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class PriorityQueue:
    """A queue with two priorities, for one event loop.

    Each priority is first in, first out. Urgent waiters go first until their total cost reaches the cost of the first
    bulk waiter; then that one is next. A waiter that is not ready keeps its place while others go before it.
    """

    def __init__(self) -> None:
        self._urgent: dict[_Waiter, None] = {}
        self._bulk: dict[_Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._urgent) + len(self._bulk)

    async def wait(
        self, cost: float, wait_s: Callable[[], float], is_ready: Callable[[], bool], *, urgent: bool = False
    ) -> None:
        """Wait until it is the caller's turn and enough is available; the caller must then take it at once.

        `wait_s` returns the seconds until enough is available, infinity to wait for `changed`. While `is_ready` returns
        False, others go before the caller.
        """
        waiter = _Waiter(cost, is_ready)
        queue = self._urgent if urgent else self._bulk
        queue[waiter] = None
        try:
            while (seconds := wait_s() if self._first() is waiter else math.inf) > 0:
                waiter.changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if seconds == math.inf else seconds):
                        await waiter.changed.wait()
            bypassed = _first_ready(self._bulk)
            if urgent and bypassed is not None:
                bypassed.bypassed_cost += cost
        finally:
            del queue[waiter]
            self.changed()

    def changed(self) -> None:
        """Let the first waiter check again."""
        first = self._first()
        if first is not None:
            first.changed.set()

    def _first(self) -> _Waiter | None:
        urgent, bulk = _first_ready(self._urgent), _first_ready(self._bulk)
        if urgent is None or (bulk is not None and bulk.bypassed_cost >= bulk.cost):
            return bulk
        return urgent


def _first_ready(queue: dict[_Waiter, None]) -> _Waiter | None:
    return next((waiter for waiter in queue if waiter.is_ready()), None)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in flight."""

    number: int
    tokens: int
    sent_at: float
    waited_s: float = 0.0
    """Seconds it waited before it could be sent."""
    held_s: float = 0.0
    """Of these, the seconds in which it was first and had a slot, and waited only for the rate, a pause or the cap."""


@dataclass(eq=False)
class RateLimiter:
    """The limits that all embedders with the same endpoint, key and model share on one event loop."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    own: dict[tuple[float, bool], Bucket] = field(default_factory=dict)
    """The user's limits, by amount per minute and whether tokens are counted (otherwise requests)."""
    paused_until: float = 0.0
    refusals: int = 0
    """Rounds of refusals since the last success. Refusals of requests that were in flight together are one round."""
    successes: int = 0
    failures_in_a_row: int = 0
    answered: bool = False
    cap: float = math.inf
    """How many requests may be in flight; infinite until the first overload."""
    round_began_at: float = -math.inf
    in_flight: dict[int, Ticket] = field(default_factory=dict)
    queue: PriorityQueue = field(default_factory=PriorityQueue)
    _last_number: int = 0
    _listeners: set[Callable[[float], None]] = field(default_factory=set)

    def limit(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        """Add the user's limits. All of them are kept; equal ones count once."""
        now = asyncio.get_running_loop().time()
        for per_minute, counts_tokens in ((requests_per_minute, False), (tokens_per_minute, True)):
            if per_minute is not None:
                self.own.setdefault((per_minute, counts_tokens), Bucket(per_minute / 60, per_minute, per_minute, now))

    async def enter(self, tokens: int, is_ready: Callable[[], bool] = lambda: True, *, urgent: bool = False) -> Ticket:
        """Wait until a request of `tokens` tokens may be sent; see `PriorityQueue.wait`."""
        loop = asyncio.get_running_loop()
        came_at, held_at = loop.time(), math.inf

        def wait_s() -> float:
            nonlocal held_at
            now = loop.time()
            seconds = self._wait_s(tokens, now)
            if seconds > 0:
                held_at = min(held_at, now)
            return seconds

        await self.queue.wait(self._cost(tokens, urgent), wait_s, is_ready, urgent=urgent)
        now = loop.time()
        for bucket, amount in self._buckets(tokens):
            bucket.take(amount, now)
        self._last_number += 1
        ticket = Ticket(self._last_number, tokens, now, now - came_at, max(0.0, now - held_at))
        self.in_flight[ticket.number] = ticket
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Remove a request that has ended, in whatever way."""
        self.in_flight.pop(ticket.number, None)
        self.queue.changed()

    def update_from_headers(self, ticket: Ticket, rates: Rates | None) -> None:
        """Learn the provider's buckets from the headers of an answer."""
        if rates is None:
            return
        now = asyncio.get_running_loop().time()
        later = [other for other in self.in_flight.values() if other.number > ticket.number]
        if rates.limit_tokens and rates.remaining_tokens is not None:
            unseen = float(sum(other.tokens for other in later))
            limit, remaining, reset_s = rates.limit_tokens, rates.remaining_tokens, rates.reset_tokens_s
            self.tokens = bucket_from_headers(self.tokens, limit, remaining, reset_s, ticket.tokens, unseen, now)
        if rates.limit_requests and rates.remaining_requests is not None:
            limit, remaining, reset_s = rates.limit_requests, rates.remaining_requests, rates.reset_requests_s
            self.requests = bucket_from_headers(self.requests, limit, remaining, reset_s, 1, len(later), now)

    def succeeded(self) -> None:
        """Record a request that returned vectors."""
        self.answered = True
        self.successes += 1
        self.refusals = 0
        self.failures_in_a_row = 0
        self.cap += 1 / self.cap  # one more after each successful round, as OpenAI asks after `slow_down`
        self.queue.changed()

    def failed(self) -> None:
        """Record a request that returned no vectors, for any reason."""
        self.failures_in_a_row += 1

    def refused(self, ticket: Ticket) -> None:
        """Record a request that was refused because of a rate limit, or because the provider is overloaded."""
        self.answered = True
        if ticket.sent_at < self.round_began_at:
            return  # it was sent before we slowed down: its round is already counted
        self.round_began_at = asyncio.get_running_loop().time()
        self.refusals += 1
        if self.tokens is None and self.requests is None:  # no headers: find the limit by halving
            self.cap = max(1.0, min(self.cap, len(self.in_flight)) / 2)
        for bucket in self.own.values():
            bucket.take(max(0.0, bucket.level), self.round_began_at)

    @property
    def paused_s(self) -> float:
        """Seconds until any request may be sent again; 0 if there is no pause."""
        return max(0.0, self.paused_until - asyncio.get_running_loop().time())

    @property
    def looks_down(self) -> bool:
        """Whether all requests to the provider fail."""
        return self.failures_in_a_row >= FAILURES_OF_AN_OUTAGE

    @contextmanager
    def on_pause(self, listener: Callable[[float], None]) -> Iterator[None]:
        """Call the listener with the end of the current pause and of later pauses, on the loop's clock."""
        listener(self.paused_until)
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def pause(self, seconds: float) -> bool:
        """Send nothing for this long; return whether the pause is new, not one that another request has reported."""
        until = asyncio.get_running_loop().time() + seconds * (1 + random.uniform(0, PAUSE_JITTER))
        is_new = until > self.paused_until + seconds / 2
        self.paused_until = max(self.paused_until, until)
        for listener in tuple(self._listeners):
            listener(self.paused_until)
        self.queue.changed()
        return is_new

    def _buckets(self, tokens: int) -> list[tuple[Bucket, float]]:
        """Return all buckets, each with the amount that a request of `tokens` tokens takes."""
        known = [(bucket, tokens if counts_tokens else 1.0) for (_, counts_tokens), bucket in self.own.items()]
        if self.tokens is not None:
            known.append((self.tokens, tokens))
        if self.requests is not None:
            known.append((self.requests, 1.0))
        return known

    def _wait_s(self, tokens: int, now: float) -> float:
        if self.in_flight and self._is_crowded(tokens):
            return math.inf  # until a request ends
        return max([self.paused_until - now, *(bucket.wait_s(amount, now) for bucket, amount in self._buckets(tokens))])

    def _cost(self, tokens: int, urgent: bool) -> float:
        """Return a request's cost in the scarce resource: seconds of the rate, or slots if no rate is known."""
        cost = max((amount / bucket.per_s for bucket, amount in self._buckets(tokens)), default=0.0)
        return cost or (URGENT_SLOT if urgent else 1.0)

    def _is_crowded(self, tokens: int) -> bool:
        if len(self.in_flight) + 1 > self.cap:
            return True
        in_flight = sum(ticket.tokens for ticket in self.in_flight.values())
        return not self.answered and in_flight + tokens > TOKENS_BEFORE_FIRST_ANSWER


# Embedders of a process share limiters, because the provider counts per key, not per object. A limiter holds no client
# and no key, and is dropped when no embedder uses it.
_LIMITERS: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[Hashable, RateLimiter]] = (
    WeakKeyDictionary()
)


def shared_rate_limiter(key: Hashable) -> RateLimiter:
    """Return the running loop's limiter for this endpoint, key and model."""
    limiters = _LIMITERS.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    return limiters.setdefault(key, RateLimiter())


class ConcurrencyLimiter:
    """One embedder's concurrency slots, on top of a shared rate limiter."""

    def __init__(self, rate: RateLimiter, concurrency: int) -> None:
        self.rate = rate
        self.concurrency = concurrency
        self.in_flight = 0
        self.waiting = 0

    @asynccontextmanager
    async def slot(self, tokens: int, *, urgent: bool = False) -> AsyncIterator[Ticket]:
        """Wait until a request of `tokens` tokens may be sent, then hold a slot. No slot is held while waiting."""
        self.waiting += 1
        try:
            ticket = await self.rate.enter(tokens, lambda: self.in_flight < self.concurrency, urgent=urgent)
        finally:
            self.waiting -= 1
        self.in_flight += 1
        try:
            yield ticket
        finally:
            self.in_flight -= 1
            self.rate.leave(ticket)
