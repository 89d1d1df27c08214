"""How much may be under way, and how fast.

`Pace` is what all who use one endpoint, key and model share: a pause that one refusal imposes on everybody, the
provider's token and request buckets as its headers tell them, the user's own limits, and a cap on what is in flight
that falls when the provider is overloaded. `Slots` adds one embedder's concurrency to it.

First come, first served: whoever is first waits until its request may go, so a large one is not starved by small ones
behind it. Urgent requests, for which somebody waits, go before those of bulk work; see `queueing`. Nobody waits in here
for a backoff of its own.
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
from .rate_limits import Bucket, learn

# Before the first answer has told the limits, no more tokens than this are under way beside a first request: eight
# full requests at once are 2.4 million tokens, more than twice what a new OpenAI account may send in a minute. It
# costs a bulk job one round trip; small ones notice nothing.
TOKENS_BEFORE_FIRST_ANSWER = 20_000

# So many failures in a row with no success between them are an outage, whatever single batches have seen: a search
# for one bad text among 2,048 has at most 11 steps down, in 8 slots at once.
FAILURES_OF_AN_OUTAGE = 32


# Everybody waits out the same pause; this share of it spreads the restarts of many processes.
PAUSE_JITTER = 0.05

# Where slots are all that is scarce, the urgent get four of five.
URGENT_SLOT = 0.25


@dataclass(slots=True, eq=False)
class _Waiter:
    cost: float
    is_ready: Callable[[], bool]
    overtaken: float = 0.0
    """What urgent ones that came later have taken meanwhile."""
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Queue:
    """A line in front of something that is scarce; for one event loop.

    First come, first served, in two classes: the urgent go before the others, until they have taken as much as the
    first of the others asks for; then that one is next. Who is not ready to go stands aside and keeps its place.
    """

    def __init__(self) -> None:
        self._urgent: list[_Waiter] = []
        self._others: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others)

    async def wait(
        self, cost: float, wait_s: Callable[[], float], is_ready: Callable[[], bool], *, urgent: bool = False
    ) -> None:
        """Wait until it is this one's turn and there is enough for it; whoever returns from here takes it at once.

        Args:
            cost: How much of it is asked for.
            wait_s: Seconds until there is enough, 0 if there is; infinite if only `changed` can tell.
            is_ready: Whether it could go at all; if not, others go before it.
            urgent: Which class it is of.
        """
        me = _Waiter(cost, is_ready)
        line = self._urgent if urgent else self._others
        line.append(me)
        try:
            while (seconds := wait_s() if self._first() is me else math.inf) > 0:
                me.news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if seconds == math.inf else seconds):
                        await me.news.wait()
            overtaken = _first_ready(self._others)
            if urgent and overtaken is not None:
                overtaken.overtaken += cost
        finally:
            line.remove(me)
            self.changed()

    def changed(self) -> None:
        """Let who is first look again."""
        first = self._first()
        if first is not None:
            first.news.set()

    def _first(self) -> _Waiter | None:
        urgent, other = _first_ready(self._urgent), _first_ready(self._others)
        if urgent is None or (other is not None and other.overtaken >= other.cost):
            return other
        return urgent


def _first_ready(line: list[_Waiter]) -> _Waiter | None:
    return next((waiter for waiter in line if waiter.is_ready()), None)


def _always() -> bool:
    return True


@dataclass(slots=True, eq=False)
class Ticket:
    """One request under way."""

    number: int
    tokens: int
    sent_at: float
    waited_s: float = 0.0
    """Seconds until it might go,"""
    held_s: float = 0.0
    """and of these, those since it was first and had a slot: what the rate, a pause or the cap cost it."""


@dataclass(eq=False)
class Pace:
    """What is shared by all who use one endpoint, key and model on one event loop."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    own: dict[tuple[float, bool], Bucket] = field(default_factory=dict)
    """The user's limits: a bucket for each number a minute, and whether it counts tokens (else requests)."""
    paused_until: float = 0.0
    refusals: int = 0
    """Rounds of refusals since the last success; a round is all that was under way together."""
    successes: int = 0
    failures_in_a_row: int = 0
    answered: bool = False
    cap: float = math.inf
    """How many requests may be in flight; infinite until an overload was seen."""
    round_began_at: float = -math.inf
    in_flight: dict[int, Ticket] = field(default_factory=dict)
    queue: Queue = field(default_factory=Queue)
    _numbers: int = 0
    _listeners: set[Callable[[float], None]] = field(default_factory=set)

    def limit(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        """Keep below these limits too; of several the lowest counts, and of equal ones there is one."""
        now = asyncio.get_running_loop().time()
        for per_minute, counts_tokens in ((requests_per_minute, False), (tokens_per_minute, True)):
            if per_minute is not None:
                self.own.setdefault((per_minute, counts_tokens), Bucket(per_minute / 60, per_minute, per_minute, now))

    async def enter(self, tokens: int, is_ready: Callable[[], bool] = _always, *, urgent: bool = False) -> Ticket:
        """Wait until a request of so many tokens may go; see `Queue.wait`."""
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
        ticket = self._take(tokens, loop.time())
        ticket.waited_s = ticket.sent_at - came_at
        ticket.held_s = max(0.0, ticket.sent_at - held_at)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The request is over, however it ended."""
        self.in_flight.pop(ticket.number, None)
        self.queue.changed()

    def observe(self, ticket: Ticket, rates: Rates | None) -> None:
        """Learn from the headers of an answer."""
        if rates is None:
            return
        now = asyncio.get_running_loop().time()
        later = [other for other in self.in_flight.values() if other.number > ticket.number]
        if rates.limit_tokens and rates.remaining_tokens is not None:
            unseen = float(sum(other.tokens for other in later))
            self.tokens = learn(
                self.tokens,
                rates.limit_tokens,
                rates.remaining_tokens,
                rates.reset_tokens_s,
                ticket.tokens,
                unseen,
                now,
            )
        if rates.limit_requests and rates.remaining_requests is not None:
            self.requests = learn(
                self.requests,
                rates.limit_requests,
                rates.remaining_requests,
                rates.reset_requests_s,
                1,
                len(later),
                now,
            )

    def succeeded(self) -> None:
        """A request was answered well."""
        self.answered = True
        self.successes += 1
        self.refusals = 0
        self.failures_in_a_row = 0
        self.cap += 1 / self.cap  # one more at once for every round that went well, as OpenAI asks after `slow_down`
        self.queue.changed()

    def failed(self) -> None:
        """A request was not answered well, for whatever reason."""
        self.failures_in_a_row += 1

    @property
    def paused_s(self) -> float:
        """Seconds until anybody may send again; 0 if that is now."""
        return max(0.0, self.paused_until - asyncio.get_running_loop().time())

    @property
    def looks_down(self) -> bool:
        """Whether the provider fails everybody."""
        return self.failures_in_a_row >= FAILURES_OF_AN_OUTAGE

    def refused(self, ticket: Ticket) -> None:
        """A request was refused for coming too fast, or the provider is overloaded."""
        self.answered = True
        if ticket.sent_at < self.round_began_at:
            return  # it was sent before we slowed down: no news
        self.round_began_at = asyncio.get_running_loop().time()
        self.refusals += 1
        if self.tokens is None and self.requests is None:  # no headers tell, so feel the way
            self.cap = max(1.0, min(self.cap, len(self.in_flight)) / 2)
        for bucket in self.own.values():
            bucket.take(max(0.0, bucket.level), self.round_began_at)

    @contextmanager
    def told(self, on_pause: Callable[[float], None]) -> Iterator[None]:
        """Tell of the pause there is and of those to come: until when, on the loop's clock."""
        on_pause(self.paused_until)
        self._listeners.add(on_pause)
        try:
            yield
        finally:
            self._listeners.remove(on_pause)

    def pause(self, seconds: float) -> bool:
        """Let nobody send for so many seconds; return whether that is news, and not what others were told too."""
        until = asyncio.get_running_loop().time() + seconds * (1 + random.uniform(0, PAUSE_JITTER))
        is_news = until > self.paused_until + seconds / 2
        self.paused_until = max(self.paused_until, until)
        for on_pause in tuple(self._listeners):
            on_pause(self.paused_until)
        self.queue.changed()
        return is_news

    def _wait_s(self, tokens: int, now: float) -> float:
        if self.in_flight and self._crowded(tokens):
            return math.inf  # until a request leaves
        waits = [self.paused_until - now]
        if self.tokens is not None:
            waits.append(self.tokens.wait_s(tokens, now))
        if self.requests is not None:
            waits.append(self.requests.wait_s(1, now))
        waits.extend(bucket.wait_s(tokens if of_tokens else 1, now) for (_, of_tokens), bucket in self.own.items())
        return max(waits)

    def _cost(self, tokens: int, urgent: bool) -> float:
        """Return what a request takes of what is scarce: seconds of a rate, or slots where no rate is known."""
        taken = [(bucket, tokens if of_tokens else 1) for (_, of_tokens), bucket in self.own.items()]
        taken += [(bucket, amount) for bucket, amount in ((self.tokens, tokens), (self.requests, 1)) if bucket]
        return max((amount / bucket.per_s for bucket, amount in taken), default=URGENT_SLOT if urgent else 1.0)

    def _crowded(self, tokens: int) -> bool:
        if len(self.in_flight) + 1 > self.cap:
            return True
        under_way = sum(ticket.tokens for ticket in self.in_flight.values())
        return not self.answered and under_way + tokens > TOKENS_BEFORE_FIRST_ANSWER

    def _take(self, tokens: int, now: float) -> Ticket:
        for bucket, amount in ((self.tokens, tokens), (self.requests, 1)):
            if bucket is not None:
                bucket.take(amount, now)
        for (_, of_tokens), bucket in self.own.items():
            bucket.take(tokens if of_tokens else 1, now)
        self._numbers += 1
        ticket = Ticket(self._numbers, tokens, now)
        self.in_flight[ticket.number] = ticket
        return ticket


# The one thing shared in a process, because the provider counts per key and not per object. It holds no client and no
# key, and nothing that is not in use.
_PACES: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[Hashable, Pace]] = WeakKeyDictionary()


def shared_pace(key: Hashable) -> Pace:
    """Return the pace of the running loop for that endpoint, key and model; it lives as long as somebody uses it."""
    paces = _PACES.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    pace = paces.get(key)
    if pace is None:
        pace = paces[key] = Pace()
    return pace


class Slots:
    """One embedder's concurrency over a shared pace."""

    def __init__(self, pace: Pace, concurrency: int) -> None:
        self.pace = pace
        self.under_way = 0
        self.waiting = 0
        self._concurrency = concurrency

    @asynccontextmanager
    async def slot(self, tokens: int, *, urgent: bool = False) -> AsyncIterator[Ticket]:
        """Hold one of the slots, from the moment a request of so many tokens may go; none while waiting for that."""
        self.waiting += 1
        try:
            ticket = await self.pace.enter(tokens, self._has_room, urgent=urgent)
        finally:
            self.waiting -= 1
        self.under_way += 1
        try:
            yield ticket
        finally:
            self.under_way -= 1
            self.pace.leave(ticket)

    def _has_room(self) -> bool:
        return self.under_way < self._concurrency
