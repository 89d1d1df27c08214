"""Counts of `Embedder.stats()`, and the interface for observers.

All values are counts, seconds and class names of errors: an observer receives no text, no key and no error message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStarted:
    """A request that is sent now.

    Attributes:
        model: The requested model.
        address: The server's name and port; None if there is no server or its address is unknown.
        inputs: Texts in the request.
        tokens: Their weight in tokens, by our own count.
        fill: The share of a request's limits that is used, from 0 to 1: of inputs or of tokens, whichever is larger.
        is_retry: Whether one of these texts was sent before.
        waited_s: Seconds it waited for a slot, for its turn and for the rate limit.
        held_s: Of `waited_s`, the seconds in which it was next and had a slot, and waited only for the rate limit or
            a pause.
        callers: The values that `Observer.caller` returned for the calls that share it; None if it is not shared.
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
        error: The name of the error's class, "CancelledError" if no call waits for it any more; None after success.
        status: The HTTP status of an error; None if there was no response.
        tokens: Tokens billed, as reported by the provider; None if it did not report them.
        model: The model that the provider reports to have used; None if it did not report it.
        dimensions: The size of the vectors; None if there are none.
        encoding: The format in which vectors were requested; None if the request named none.
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
    """Receives an event for each request, wait and cache lookup. Called on the event loop: it must not block.

    Its first error is logged, later ones are not. None of them fails a call.
    """

    def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], object]:
        """A request is sent. The returned function is called once, in the same task, when the request has ended."""
        ...

    def caller(self) -> object:
        """Return a value for a call that will share a request. It is passed on in `RequestStarted.callers`."""
        ...

    def queued(self, model: str, seconds: float, /) -> object:
        """An `embed_one` or small `embed` call waited this many seconds until its shared request was sent."""
        ...

    def paused(self, model: str, seconds: float, everybody: bool, /) -> object:
        """A retry was scheduled in `seconds`. If `everybody`, all requests pause until then, else only this batch."""
        ...

    def cached(self, model: str, hits: int, misses: int, /) -> object:
        """Texts were looked up in the cache."""
        ...


@dataclass(slots=True, kw_only=True)
class Counters:
    """The counts of one event loop; see `Stats` for the fields."""

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
        """Add the counts of another event loop, which may still be counting in its own thread."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.queue_max_s = max(self.queue_max_s, other.queue_max_s)
        for error, count in dict(other.failures).items():  # an atomic copy
            self.failures[error] = self.failures.get(error, 0) + count


_SUMS = tuple(each.name for each in fields(Counters) if each.name not in ("failures", "queue_max_s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The counts of an embedder since it was created, over all event loops, and its present state.

    A request that has not ended yet is in `requests`, but not in `succeeded`, `cancelled` or `failures`.

    Attributes:
        requests: Requests sent, retries included.
        retries: Of `requests`, those that repeated an earlier one.
        succeeded: Of `requests`, those that returned vectors.
        cancelled: Of `requests`, those that were cancelled because no call waited for them any more.
        failures: Of `requests`, those that failed, by the class name of the error.
        texts: Texts embedded. Duplicates within one call, or within calls that share a request, count once.
        texts_failed: Texts that failed. Unfinished texts of a call that is cancelled or reaches its deadline may be
            in neither count.
        tokens: Tokens billed, as reported by the provider, summed.
        filled: `RequestStarted.fill`, summed; see `batch_fill`.
        request_s: Seconds that requests took, summed.
        waited_s: Seconds that requests waited for a slot, for their turn and for the rate limit, summed.
        held_s: Of `waited_s`, the seconds in which a request was next and had a slot, and waited only for the rate
            limit or a pause.
        backoff_s: Seconds that single batches backed off after a failure, without a slot, summed.
        pauses: How often all requests paused because the provider requested it.
        calls_queued: `embed_one` and small `embed` calls that were sent in a shared request.
        queue_s: Seconds that these calls waited until it was sent, summed.
        queue_max_s: The longest of these waits in seconds.
        overloads: `embed_one` and small `embed` calls that were refused with an `OverloadedError`.
        cache_hits: Texts found in the cache.
        cache_misses: Texts looked up in the cache and not found.
        under_way: Requests that hold a slot now: in flight, or being delivered.
        waiting: Requests that wait for a slot or for the rate limit.
        gathering: Texts that wait for the next shared request.
        paused_for_s: Seconds until requests may be sent again; 0 if there is no pause.
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
        """Requests refused because they exceeded a rate limit (429)."""
        return self.failures.get("RateLimitedError", 0)

    @property
    def batch_fill(self) -> float | None:
        """The average fill of requests, from 0 to 1; see `RequestStarted.fill`. None before the first request."""
        return self.filled / self.requests if self.requests else None

    @property
    def mean_request_s(self) -> float | None:
        """The average duration of a request in seconds; None before the first one has ended."""
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
