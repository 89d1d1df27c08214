"""`Run`: one call, what it has cost so far, and whether it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import AsyncEmbedError
from .report import Progress


class Run:
    """One call: what it has cost so far, and whether it goes on."""

    def __init__(self, deadline_s: float | None = None) -> None:
        self.began_at = asyncio.get_running_loop().time()
        self.deadline_at = None if deadline_s is None else self.began_at + deadline_s
        self.requests = 0
        self.retries = 0
        self.tokens = 0
        self.tokens_known = True
        self.successes = 0
        self.rejections = 0
        self.stopped_by: AsyncEmbedError | None = None
        self._scopes: dict[asyncio.Timeout, float] = {}

    @property
    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self.began_at

    def progress(self, done: int, total: int | None, failed: int, skipped: int = 0) -> Progress:
        """Return where the run is, given what its caller counts."""
        return Progress(done, total, failed, skipped, self.tokens, self.requests, self.retries, self.elapsed_s)

    def stop(self, error: AsyncEmbedError) -> None:
        """Let nothing new start; the first reason counts."""
        if self.stopped_by is None:
            self.stopped_by = error
            now = asyncio.get_running_loop().time()
            for scope, grace_s in self._scopes.items():
                scope.reschedule(now + grace_s)

    @asynccontextmanager
    async def unless_stopped(self, grace_s: float = 0.0) -> AsyncIterator[None]:
        """Wait for something only as long as the run goes on, and `grace_s` seconds beyond.

        Raises:
            TimeoutError: The run was stopped.
        """
        if self.stopped_by is not None:
            raise TimeoutError
        async with asyncio.timeout(None) as scope:
            self._scopes[scope] = grace_s
            try:
                yield
            finally:
                del self._scopes[scope]
