"""What is told of requests: the counts of `Embedder.stats()`, and the seam for who wants to watch.

Everything here is counts, seconds and names of errors: an observer is shown no text, no key and no message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStarted:
    """A request that leaves now.

    Attributes:
        model: The model that is asked for.
        address: The server's name and port; None where there is no server, or nobody knows.
        inputs: Texts it holds.
        tokens: What they weigh by our own count.
        fill: The part of a request's limit that they take, of inputs or of tokens, whichever is more.
        is_retry: Whether one of these texts was sent before.
        waited_s: Seconds it waited for a slot, its turn and the rate.
        held_s: Of these, the seconds in which it was next and had a slot, and the rate or a pause held it up.
        callers: What `Observer.caller` returned for each call that shares it; None if it is shared by none.
    """

    model: str
    address: tuple[str, int] | None
    inputs: int
    tokens: int
    fill: float
    is_retry: bool
    waited_s: float
    held_s: float
    callers: Sequence[object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """How a request ended.

    Attributes:
        elapsed_s: Seconds from its start.
        error: The name of the error's class, "CancelledError" if nobody waits for it any more; None if it went well.
        status: The HTTP status of an error; None if there was no answer.
        tokens: Tokens billed, as the provider said; None if it did not say.
        model: The model that answered; None if it did not say.
        dimensions: The size of the vectors; None if none came.
        encoding: The format that vectors were asked for in; None if none was named.
    """

    elapsed_s: float
    error: str | None = None
    status: int | None = None
    tokens: int | None = None
    model: str | None = None
    dimensions: int | None = None
    encoding: str | None = None


@runtime_checkable
class Observer(Protocol):
    """Is told of each request, and of what was waited for. Called on the event loop: it must not block.

    What it raises is logged once and harms no call.
    """

    def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], object]:
        """A request leaves; what is returned is called once, in the same task, when it has ended."""
        ...

    def caller(self) -> object:
        """Return what to remember of a call that will share a request; it comes back in `RequestStarted.callers`."""
        ...

    def queued(self, model: str, seconds: float, /) -> object:
        """A call of `embed_one`, or a small `embed`, has waited so long for its shared request to leave."""
        ...

    def paused(self, model: str, seconds: float, everybody: bool, /) -> object:
        """A failed request is sent again after so many seconds; until then nobody sends, or only it does not."""
        ...

    def cached(self, model: str, hits: int, misses: int, /) -> object:
        """So many texts were looked up in the cache."""
        ...


@dataclass(slots=True, kw_only=True)
class Counters:
    """What was counted on one event loop; `Stats` explains the names."""

    requests: int = 0
    retries: int = 0
    succeeded: int = 0
    cancelled: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    texts: int = 0
    texts_failed: int = 0
    tokens: int = 0
    filled: float = 0.0
    request_s: float = 0.0
    waited_s: float = 0.0
    held_s: float = 0.0
    backoff_s: float = 0.0
    pauses: int = 0
    calls_queued: int = 0
    queue_s: float = 0.0
    queue_max_s: float = 0.0
    overloads: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    def add(self, other: Counters) -> None:
        """Add what was counted on another event loop, which may go on counting in its thread."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.queue_max_s = max(self.queue_max_s, other.queue_max_s)
        for error, count in dict(other.failures).items():  # a copy, made in one step
            self.failures[error] = self.failures.get(error, 0) + count


_SUMS = tuple(each.name for each in fields(Counters) if each.name not in ("failures", "queue_max_s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What an embedder has done since it was made, over all event loops, and what it is doing now.

    Requests that have not ended yet are in `requests`, and in none of `succeeded`, `cancelled` and `failures`.

    Attributes:
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated one.
        succeeded: Of `requests`, those that brought vectors.
        cancelled: Of `requests`, those that nobody waited for any more.
        failures: Of `requests`, those that failed, by the name of the error.
        texts: Texts embedded; equal ones of one call, and of calls that share a request, are one.
        texts_failed: Texts that failed. A call that is cancelled or runs out of time leaves some in neither count.
        tokens: Tokens billed: the sum of what the provider said.
        filled: The sum of how full requests were; see `batch_fill`.
        request_s: Seconds that requests took, summed.
        waited_s: Seconds that requests waited for a slot, their turn and the rate, summed.
        held_s: Of `waited_s`, the seconds in which one was next and had a slot, and the rate or a pause held it up.
        backoff_s: Seconds that single batches stood back after a failure, holding nothing; summed.
        pauses: How often the provider asked for a pause, which everybody keeps.
        calls_queued: Calls of `embed_one`, and small ones of `embed`, that have left in a shared request.
        queue_s: Seconds they waited for it to leave, summed;
        queue_max_s: and the longest of them.
        overloads: Such calls that were refused with an `OverloadedError`.
        cache_hits: Texts that the cache answered.
        cache_misses: Texts that it did not have.
        under_way: Requests that hold a slot now: sent, or being delivered.
        waiting: Requests that wait for a slot or for the rate.
        gathering: Texts that wait for the next shared request.
        paused_for_s: Seconds until anybody may send again; 0 if there is no pause.
    """

    requests: int = 0
    retries: int = 0
    succeeded: int = 0
    cancelled: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    texts: int = 0
    texts_failed: int = 0
    tokens: int = 0
    filled: float = 0.0
    request_s: float = 0.0
    waited_s: float = 0.0
    held_s: float = 0.0
    backoff_s: float = 0.0
    pauses: int = 0
    calls_queued: int = 0
    queue_s: float = 0.0
    queue_max_s: float = 0.0
    overloads: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    under_way: int = 0
    waiting: int = 0
    gathering: int = 0
    paused_for_s: float = 0.0

    @property
    def refusals(self) -> int:
        """Requests refused for coming too fast (429)."""
        return self.failures.get("RateLimitedError", 0)

    @property
    def batch_fill(self) -> float | None:
        """How full requests were on average, from 0 to 1: of inputs or of tokens, whichever bound them."""
        return self.filled / self.requests if self.requests else None

    @property
    def mean_request_s(self) -> float | None:
        """Seconds that a request took on average; None before the first one ended."""
        ended = self.succeeded + self.cancelled + sum(self.failures.values())
        return self.request_s / ended if ended else None

    def __str__(self) -> str:
        failures = ", ".join(f"{count:,} {error}" for error, count in sorted(self.failures.items()))
        mean_s, fill = self.mean_request_s, self.batch_fill
        paused = f", paused for {self.paused_for_s:.1f} s" if self.paused_for_s else ""
        return (
            f"{self.texts:,} texts embedded, {self.texts_failed:,} failed; {self.requests:,} requests"
            f"{'' if mean_s is None else f' of {mean_s:.3f} s'}{'' if fill is None else f', {fill:.0%} full'}, "
            f"{self.tokens:,} tokens; {self.retries:,} retries{f' ({failures})' if failures else ''}\n"
            f"now {self.under_way:,} under way, {self.waiting:,} waiting, {self.gathering:,} texts gathering{paused}"
        )
