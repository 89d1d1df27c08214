"""One call while it runs: its deadline, whether it was stopped, and its usage."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from ..errors import AsyncEmbedError, ConfigError, DeadlineError
from ..report import Progress, Usage

# How long storing a batch may take after its call was stopped: the batch is already paid for, and may be partly stored.
STORING_S = 10.0


class StoppedError(Exception):
    """The call was stopped while it waited. This error never leaves the embedder."""


class CallContext:
    """One call: its deadline, whether it was stopped, and its usage.

    Its requests go before those of bulk work if it is `urgent`. `callers` are the observer's values for the calls that
    share its requests; None if they are not shared.

    Raises:
        ConfigError: The deadline is not a number.
    """

    def __init__(
        self, deadline_s: float | None = None, *, urgent: bool = False, callers: Sequence[object] | None = None
    ) -> None:
        if deadline_s is not None and math.isnan(deadline_s):
            raise ConfigError("deadline=nan; it must be a number of seconds, or None")
        self.began_at = asyncio.get_running_loop().time()
        self.deadline_at = None if deadline_s is None else self.began_at + deadline_s
        self.urgent = urgent
        self.callers = callers
        self.usage = Usage()
        self.stopped_by: AsyncEmbedError | None = None
        self._deadline_s = deadline_s
        self._scopes: dict[asyncio.Timeout, tuple[float, float]] = {}
        """The waits in progress, each with two grace periods in seconds: after a stop, and after a stop at once."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return asyncio.get_running_loop().time() - self.began_at

    def progress(self, done: int, total: int | None, failed: int, skipped: int = 0) -> Progress:
        """Return the call's progress, with the counts of its caller."""
        usage = self.usage
        return Progress(done, total, failed, skipped, usage.tokens, usage.requests, usage.retries, self.elapsed_s)

    def stop(self, error: AsyncEmbedError, *, at_once: bool = False) -> None:
        """Start nothing new; the first error counts. Waits in progress end after their grace periods."""
        if self.stopped_by is not None and not at_once:
            return
        self.stopped_by = self.stopped_by or error
        now = asyncio.get_running_loop().time()
        for scope, graces_s in self._scopes.items():
            if not scope.expired():  # else it is ending already
                scope.reschedule(now + graces_s[at_once])

    def check_pause(self, until: float) -> None:
        """Stop the call if a pause ends after its deadline; `until` is a time on the loop's clock."""
        if self.deadline_at is not None and until > self.deadline_at:
            self.stop(DeadlineError("the provider asks for a pause that ends after the deadline"))

    @asynccontextmanager
    async def until_deadline(self) -> AsyncIterator[None]:
        """Cancel the body when the deadline passes, and stop the call with a `DeadlineError`.

        Does not raise when the deadline passes; check `stopped_by` afterwards. TimeoutErrors of the body propagate.
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
        """Cancel the body `grace_s` seconds after the call is stopped.

        Raises:
            StoppedError: The call was stopped.
        """
        if self.stopped_by is not None:
            raise StoppedError
        async with self._scope(grace_s, 0.0):
            yield

    @asynccontextmanager
    async def storing(self) -> AsyncIterator[None]:
        """Store something, even if the call was stopped; then for at most STORING_S.

        Raises:
            StoppedError: That time has passed.
        """
        async with self._scope(STORING_S, STORING_S):
            yield

    @asynccontextmanager
    async def _scope(self, *graces_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None if self.stopped_by is None else graces_s[0]) as scope:
                self._scopes[scope] = graces_s[0], graces_s[1]
                try:
                    yield
                finally:
                    del self._scopes[scope]
        except TimeoutError:
            if not scope.expired():
                raise  # the body's own
            raise StoppedError from None


class ActiveCalls:
    """The calls of one embedder that are running on one event loop."""

    def __init__(self) -> None:
        self._calls: dict[CallContext, bool] = {}
        """Whether each call ends by itself."""
        self._none_left = asyncio.Event()

    @contextmanager
    def running(self, call: CallContext, *, ends_by_itself: bool = True) -> Iterator[None]:
        """Register a call while it runs. A stream waits for its reader, so it may never end by itself."""
        self._calls[call] = ends_by_itself
        try:
            yield
        finally:
            del self._calls[call]
            if not self._calls:
                self._none_left.set()

    def stop_open(self, error: AsyncEmbedError) -> None:
        """Stop the calls that may never end by themselves."""
        for call, ends_by_itself in self._calls.items():
            if not ends_by_itself:
                call.stop(copy.copy(error), at_once=True)

    async def ended_by(self, ends_at: float) -> None:
        """Wait until no call is left, at most until this time on the loop's clock."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(ends_at):
                while self._calls:
                    self._none_left.clear()
                    await self._none_left.wait()

    async def stop_all(self, error: AsyncEmbedError) -> None:
        """Stop all calls at once, each with its own copy of the error. Batches that are being stored get STORING_S."""
        for call in self._calls:
            call.stop(copy.copy(error), at_once=True)
        await self.ended_by(asyncio.get_running_loop().time() + STORING_S)
