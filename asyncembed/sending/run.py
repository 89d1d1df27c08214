"""`Run`: one call, what it has cost so far, and whether it goes on."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress

from ..batching.texts import Item
from ..errors import AsyncEmbedError, ConfigError, DeadlineError
from ..report import Progress

# What is being stored when a run is stopped gets this long: it is paid for, and half of it may be there already.
STORING_S = 10.0


class StoppedError(Exception):
    """The run was stopped while something was waited for. Never leaves the engine."""


class Run:
    """One call: what it has cost so far, and whether it goes on.

    Args:
        deadline_s: Seconds the call may take; None for as long as it needs.
        urgent: Whether its requests go before those of bulk work.

    Raises:
        ConfigError: The deadline is not a number.
    """

    def __init__(self, deadline_s: float | None = None, *, urgent: bool = False) -> None:
        if deadline_s is not None and math.isnan(deadline_s):
            raise ConfigError("deadline=nan; it must be a number of seconds, or None")
        self.began_at = asyncio.get_running_loop().time()
        self.urgent = urgent
        self.callers: Sequence[object] | None = None
        """Those who share it, as the observer wants to remember them; None if it is one caller's own."""
        self._deadline_s = deadline_s
        self.deadline_at = None if deadline_s is None else self.began_at + deadline_s
        self.requests = 0
        self.retries = 0
        self.tokens = 0
        self.tokens_known = True
        self.cache_hits = 0
        self.cache_misses = 0
        self.successes = 0
        self.rejections = 0
        self.is_silence_told = False
        """Whether it was said that several requests in a row had no answer."""
        self.canary: Item | None = None
        """A short text that the provider has taken: if it takes it no more, it is down."""
        self.stopped_by: AsyncEmbedError | None = None
        self.aside: Callable[[], AbstractAsyncContextManager[object]] = nullcontext
        """Entered by a batch while it waits out a backoff, so that others are sent meanwhile."""
        self._scopes: dict[asyncio.Timeout, tuple[float, float]] = {}
        """What is waited for, and for how many seconds more when the run is stopped, and when it is stopped at once."""

    @property
    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self.began_at

    def progress(self, done: int, total: int | None, failed: int, skipped: int = 0) -> Progress:
        """Return where the run is, given what its caller counts."""
        return Progress(done, total, failed, skipped, self.tokens, self.requests, self.retries, self.elapsed_s)

    def stop(self, error: AsyncEmbedError, *, at_once: bool = False) -> None:
        """Let nothing new start; the first reason counts. What is under way has its grace, or ends at once."""
        if self.stopped_by is not None and not at_once:
            return
        self.stopped_by = self.stopped_by or error
        now = asyncio.get_running_loop().time()
        for scope, graces_s in self._scopes.items():
            if not scope.expired():  # else it is ending already
                scope.reschedule(now + graces_s[at_once])

    def meet_pause(self, until: float) -> None:
        """Stop if a pause, until that time of the loop's clock, ends after the deadline: nobody need wait for it."""
        if self.deadline_at is not None and until > self.deadline_at:
            self.stop(DeadlineError("the provider asks for a pause that ends after the deadline"))

    @asynccontextmanager
    async def until_deadline(self) -> AsyncIterator[None]:
        """Cancel what is inside when the deadline passes, and stop the run with a `DeadlineError`.

        Raises nothing then: whoever comes after it looks at `stopped_by`. Other TimeoutErrors go their way.
        """
        passed = DeadlineError(f"the deadline of {self._deadline_s or 0:g} s passed")
        if self.deadline_at is not None and self.deadline_at <= asyncio.get_running_loop().time():
            self.stop(passed)  # before anything is sent
        try:
            async with asyncio.timeout_at(self.deadline_at) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            self.stop(passed)

    @asynccontextmanager
    async def unless_stopped(self, grace_s: float = 0.0) -> AsyncIterator[None]:
        """Wait for something only as long as the run goes on, and `grace_s` seconds beyond.

        Raises:
            StoppedError: The run was stopped.
        """
        if self.stopped_by is not None:
            raise StoppedError
        async with self._while_it_goes_on(grace_s, 0.0):
            yield

    @asynccontextmanager
    async def storing(self) -> AsyncIterator[None]:
        """Store something, also after the run was stopped, but then only for STORING_S.

        Raises:
            StoppedError: That has passed.
        """
        async with self._while_it_goes_on(STORING_S, STORING_S):
            yield

    @asynccontextmanager
    async def _while_it_goes_on(self, *graces_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None if self.stopped_by is None else graces_s[0]) as scope:
                self._scopes[scope] = graces_s[0], graces_s[1]
                try:
                    yield
                finally:
                    del self._scopes[scope]
        except TimeoutError:
            if not scope.expired():
                raise  # of what was waited for
            raise StoppedError from None


class Runs:
    """The runs of one embedder that are under way on one event loop."""

    def __init__(self) -> None:
        self._runs: set[Run] = set()
        self._open: set[Run] = set()
        self._none_left = asyncio.Event()

    @contextmanager
    def under_way(self, run: Run, *, ends_by_itself: bool) -> Iterator[None]:
        """Count the run while it lasts; one that waits for its caller to take what it has need not end by itself."""
        self._runs.add(run)
        if not ends_by_itself:
            self._open.add(run)
        try:
            yield
        finally:
            self._runs.discard(run)
            self._open.discard(run)
            if not self._runs:
                self._none_left.set()

    def stop_open(self, error: AsyncEmbedError) -> None:
        """Stop those that need not end by themselves."""
        for run in self._open:
            run.stop(copy.copy(error), at_once=True)

    async def ended_by(self, ends_at: float) -> None:
        """Wait until none is left, but only until that time of the loop's clock."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(ends_at):
                await self._all_ended()

    async def stop_all(self, error: AsyncEmbedError) -> None:
        """Stop them at once, each with an error of its own; what is being stored is waited for, but not for ever."""
        for run in self._runs:
            run.stop(copy.copy(error), at_once=True)
        await self.ended_by(asyncio.get_running_loop().time() + STORING_S)

    async def _all_ended(self) -> None:
        while self._runs:
            self._none_left.clear()
            await self._none_left.wait()
