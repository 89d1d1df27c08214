"""Counts what an embedder does, and calls its observer.

Each event loop has its own counters, so counting needs no lock. `stats` sums them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from ..errors import ConfigError, ProviderError
from ..metrics import Counters, Observer, RequestFinished, RequestStarted, Stats
from ..types import Provider, Reply, info_of
from .pacing import Ticket

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class MetricsRecorder:
    """The counters of all event loops of one embedder, and its observer.

    Raises:
        ConfigError: The observer lacks a method.
    """

    def __init__(self, model: str, provider: Provider, observer: Observer | None = None) -> None:
        if observer is not None and (isinstance(observer, type) or not isinstance(observer, Observer)):
            kind = type(observer).__name__
            raise ConfigError(f"observer is {kind}, which is no asyncembed.Observer: it lacks methods")
        self.model = model
        self.provider = provider
        self.address = info_of(provider).address
        self.observer = observer
        self._is_broken = False
        self._recorders: dict[asyncio.AbstractEventLoop, LoopRecorder] = {}
        self._closed_loops = Counters()
        self._lock = threading.Lock()  # taken once for each loop and each snapshot, never for a request

    def here(self) -> LoopRecorder:
        """Return the running loop's recorder."""
        loop = asyncio.get_running_loop()
        recorder = self._recorders.get(loop)
        if recorder is None:
            with self._lock:
                for other in [other for other in self._recorders if other.is_closed()]:
                    self._closed_loops.add(self._recorders.pop(other).counters)
                recorder = self._recorders[loop] = LoopRecorder(self)
        return recorder

    def stats(self, **gauges: Any) -> Stats:
        """Return the sum of all counters, with the given gauges of what is in flight. Safe to call from any thread."""
        total = Counters()
        with self._lock:
            for counters in (self._closed_loops, *(recorder.counters for recorder in self._recorders.values())):
                total.add(counters)
        return Stats(**{each.name: getattr(total, each.name) for each in fields(Counters)}, **gauges)

    def call(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a method of the observer. If it raises, that is logged once, and no call fails."""
        try:
            return method(*args, **kwargs)
        except Exception:
            if not self._is_broken:
                self._is_broken = True
                logger.exception("the observer raised; its further errors are not logged")
            return None


class LoopRecorder:
    """Counts what happens on one event loop, and calls the observer."""

    def __init__(self, metrics: MetricsRecorder) -> None:
        self.metrics = metrics
        self.counters = Counters()

    def request(
        self, ticket: Ticket, inputs: int, fill: float, *, is_retry: bool, callers: Sequence[object] | None
    ) -> RequestTimer:
        """Return a context manager that times and counts one request; set its `reply` inside."""
        started = RequestStarted(
            model=self.metrics.model,
            address=self.metrics.address,
            inputs=inputs,
            tokens=ticket.tokens,
            fill=fill,
            is_retry=is_retry,
            waited_s=ticket.waited_s,
            held_s=ticket.held_s,
            callers=callers,
        )
        return RequestTimer(self.metrics, self.counters, started)

    def more_requests(self, count: int) -> None:
        """Count the extra requests that the provider sent in one attempt."""
        self.counters.requests += count
        self.counters.retries += count

    def texts(self, embedded: int, failed: int) -> None:
        """Count embedded and failed texts."""
        self.counters.texts += embedded
        self.counters.texts_failed += failed

    def paused(self, seconds: float, *, everybody: bool) -> None:
        """Count a retry in `seconds`: until then all requests pause, or only this batch is in backoff."""
        if everybody:
            self.counters.pauses += 1
        else:
            self.counters.backoff_s += seconds
        if self.metrics.observer is not None:
            self.metrics.call(self.metrics.observer.paused, self.metrics.model, seconds, everybody)

    def cached(self, hits: int, misses: int) -> None:
        """Count lookups in the cache."""
        self.counters.cache_hits += hits
        self.counters.cache_misses += misses
        if self.metrics.observer is not None:
            self.metrics.call(self.metrics.observer.cached, self.metrics.model, hits, misses)

    def overloaded(self) -> None:
        """Count a call that was refused because too many texts are waiting."""
        self.counters.overloads += 1

    def caller(self) -> object:
        """Return the observer's value for the current call; see `Observer.caller`."""
        return None if self.metrics.observer is None else self.metrics.call(self.metrics.observer.caller)

    def queued(self, waited_s: Sequence[float]) -> None:
        """Count the calls that are sent in one shared request, each with the seconds that it waited."""
        self.counters.calls_queued += len(waited_s)
        self.counters.queue_s += sum(waited_s)
        self.counters.queue_max_s = max(self.counters.queue_max_s, *waited_s)
        if self.metrics.observer is not None:
            for seconds in waited_s:
                self.metrics.call(self.metrics.observer.queued, self.metrics.model, seconds)


class RequestTimer:
    """Times one request, and counts how it ended."""

    __slots__ = ("_began_at", "_counters", "_finish", "_metrics", "_now", "_started", "reply")

    def __init__(self, metrics: MetricsRecorder, counters: Counters, started: RequestStarted) -> None:
        self.reply: Reply | None = None
        self._metrics = metrics
        self._counters = counters
        self._started = started
        self._finish: Callable[[RequestFinished], object] | None = None
        self._now = asyncio.get_running_loop().time

    def __enter__(self) -> Self:
        started, counters, observer = self._started, self._counters, self._metrics.observer
        counters.requests += 1
        counters.retries += started.is_retry
        counters.filled += started.fill
        counters.waited_s += started.waited_s
        counters.held_s += started.held_s
        if observer is not None:
            self._finish = self._metrics.call(observer.request, started)
        self._began_at = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        counters = self._counters
        elapsed_s = self._now() - self._began_at
        counters.request_s += elapsed_s
        if self.reply is not None:
            counters.succeeded += 1
            counters.tokens += self.reply.tokens or 0
        elif isinstance(error, Exception):
            counters.failures[type(error).__name__] = counters.failures.get(type(error).__name__, 0) + 1
        else:
            counters.cancelled += 1
        if self._finish is not None:
            self._metrics.call(self._finish, self._finished(elapsed_s, error))

    def _finished(self, elapsed_s: float, error: BaseException | None) -> RequestFinished:
        encoding = info_of(self._metrics.provider).encoding_format
        if self.reply is None:
            status = error.status if isinstance(error, ProviderError) else None
            return RequestFinished(elapsed_s=elapsed_s, error=type(error).__name__, status=status, encoding=encoding)
        return RequestFinished(
            elapsed_s=elapsed_s,
            tokens=self.reply.tokens,
            model=self.reply.model,
            dimensions=self.reply.vectors.shape[1],
            encoding=encoding,
        )
