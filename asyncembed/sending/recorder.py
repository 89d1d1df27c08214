"""Counting what an embedder does, and telling its observer.

Each event loop counts for itself, so that nothing is locked where requests run; a snapshot sums them up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from ..errors import ConfigError
from ..metrics import Observer, RequestFinished, RequestStarted, Stats, Tally
from ..types import Provider, Reply, info_of
from .pacing import Slots, Ticket

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Metrics:
    """What all event loops of one embedder have counted, and its observer.

    Args:
        model: The model that is asked for.
        provider: Who is asked; where it is, and in what format, is read off it if it tells.
        observer: Is told of everything, or None.

    Raises:
        ConfigError: The observer lacks a method.
    """

    def __init__(self, model: str, provider: Provider, observer: Observer | None = None) -> None:
        if observer is not None and (isinstance(observer, type) or not isinstance(observer, Observer)):
            raise ConfigError(
                f"observer is {type(observer).__name__}, which is no asyncembed.Observer: it lacks methods"
            )
        self.model = model
        self.provider = provider
        self.address = info_of(provider).address
        self.observer = observer
        self._is_broken = False
        self._watches: dict[asyncio.AbstractEventLoop, Watch] = {}
        self._ended = Tally()
        self._changing = threading.Lock()  # taken once a loop and once a snapshot, not where requests run

    def here(self) -> Watch:
        """Return the running loop's watch."""
        loop = asyncio.get_running_loop()
        watch = self._watches.get(loop)
        if watch is None:
            with self._changing:
                for other in [other for other in self._watches if other.is_closed()]:
                    self._ended.add(self._watches.pop(other).tally)
                watch = self._watches[loop] = Watch(self)
        return watch

    def stats(self, slots: Iterable[tuple[asyncio.AbstractEventLoop, Slots]], gathering: int) -> Stats:
        """Return a snapshot. Safe to call from any thread.

        Args:
            slots: Those of each loop that is not closed.
            gathering: Texts that wait for the next shared request.
        """
        total = Tally()
        with self._changing:
            for tally in (self._ended, *(watch.tally for watch in self._watches.values())):
                total.add(tally)
        slots = list(slots)
        return Stats(
            **{each.name: getattr(total, each.name) for each in fields(Tally)},
            under_way=sum(each.under_way for _, each in slots),
            waiting=sum(each.waiting for _, each in slots),
            gathering=gathering,
            paused_for_s=max((0.0, *(each.pace.paused_until - loop.time() for loop, each in slots))),
        )

    def tell(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a method of the observer so that it can do no harm: what it raises is logged, the first time."""
        try:
            return method(*args, **kwargs)
        except Exception:
            if not self._is_broken:
                self._is_broken = True
                logger.exception("the observer raised; its further errors are not logged")
            return None


class Watch:
    """Counts what happens on one event loop, and tells the observer."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.tally = Tally()

    def request(
        self, ticket: Ticket, inputs: int, fill: float, *, is_retry: bool, callers: Sequence[object] | None
    ) -> Watched:
        """Return a context for a request, whose `reply` is to be set inside; it counts and tells start and end."""
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
        return Watched(self.metrics, self.tally, started)

    def more(self, requests: int) -> None:
        """What was one request to us were so many more on the wire."""
        self.tally.requests += requests
        self.tally.retries += requests

    def texts(self, embedded: int, failed: int) -> None:
        """So many texts are done."""
        self.tally.texts += embedded
        self.tally.texts_failed += failed

    def paused(self, seconds: float, *, everybody: bool) -> None:
        """What failed waits so long before it is sent again."""
        if everybody:
            self.tally.pauses += 1
        else:
            self.tally.backoff_s += seconds
        if self.metrics.observer is not None:
            self.metrics.tell(self.metrics.observer.paused, self.metrics.model, seconds, everybody)

    def cached(self, hits: int, misses: int) -> None:
        """So many texts were looked up in the cache."""
        self.tally.cache_hits += hits
        self.tally.cache_misses += misses
        if self.metrics.observer is not None:
            self.metrics.tell(self.metrics.observer.cached, self.metrics.model, hits, misses)

    def caller(self) -> object:
        """Return what the observer wants to remember of whoever calls now."""
        return None if self.metrics.observer is None else self.metrics.tell(self.metrics.observer.caller)

    def queued(self, waited_s: Sequence[float]) -> None:
        """Calls leave in a shared request, each after it has waited so long."""
        self.tally.calls_queued += len(waited_s)
        self.tally.queue_s += sum(waited_s)
        self.tally.queue_max_s = max(self.tally.queue_max_s, *waited_s)
        if self.metrics.observer is not None:
            for seconds in waited_s:
                self.metrics.tell(self.metrics.observer.queued, self.metrics.model, seconds)


class Watched:
    """One request under watch, from its start to its end."""

    __slots__ = ("_began_at", "_finish", "_metrics", "_now", "_started", "_tally", "reply")

    def __init__(self, metrics: Metrics, tally: Tally, started: RequestStarted) -> None:
        self.reply: Reply | None = None
        self._metrics = metrics
        self._tally = tally
        self._started = started
        self._finish: Callable[[RequestFinished], object] | None = None
        self._now = asyncio.get_running_loop().time

    def __enter__(self) -> Self:
        started, tally, observer = self._started, self._tally, self._metrics.observer
        tally.requests += 1
        tally.retries += started.is_retry
        tally.filled += started.fill
        tally.waited_s += started.waited_s
        tally.held_s += started.held_s
        if observer is not None:
            self._finish = self._metrics.tell(observer.request, started)
        self._began_at = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tally = self._tally
        elapsed_s = self._now() - self._began_at
        tally.request_s += elapsed_s
        if self.reply is not None:
            tally.succeeded += 1
            tally.tokens += self.reply.tokens or 0
        elif isinstance(error, Exception):
            tally.failures[type(error).__name__] = tally.failures.get(type(error).__name__, 0) + 1
        else:
            tally.cancelled += 1
        if self._finish is not None:
            self._metrics.tell(self._finish, self._finished(elapsed_s, error))

    def _finished(self, elapsed_s: float, error: BaseException | None) -> RequestFinished:
        encoding = info_of(self._metrics.provider).encoding_format
        if self.reply is None:
            status: int | None = getattr(error, "status", None)
            return RequestFinished(elapsed_s=elapsed_s, error=type(error).__name__, status=status, encoding=encoding)
        return RequestFinished(
            elapsed_s=elapsed_s,
            tokens=self.reply.tokens,
            model=self.reply.model,
            dimensions=self.reply.vectors.shape[1],
            encoding=encoding,
        )
