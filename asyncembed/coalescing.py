"""Concurrent calls for one text each, merged into shared requests.

An idle embedder sends a lone call in the next turn of the loop, so nothing is waited for in vain. While as many shared
requests are under way as may be, what arrives gathers, and leaves together when one of them is done. Equal texts are
one. A caller that is cancelled only leaves; the last one to leave ends the request.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeAlias

from .batches import Outcome
from .errors import AsyncEmbedError, TransportError
from .loops import ended
from .run import Run
from .types import Vectors
from .weighing import Text

# Two shared requests overlap, so that one that is slow does not hold up everybody; more of them would each be smaller,
# and the provider counts requests.
REQUESTS_AT_ONCE = 2

Send: TypeAlias = Callable[[list[Text], Run, Callable[[Outcome], Awaitable[None]]], Awaitable[None]]
"""Embeds the texts and delivers every one of them, with its vector or its error."""


@dataclass(slots=True, eq=False)
class _Wanted:
    """One text, all who wait for it, and the request it is in, if it is in one."""

    content: str = field(repr=False)
    waiting: set[asyncio.Future[Vectors]] = field(default_factory=set)
    request: _Request | None = None


@dataclass(slots=True, eq=False)
class _Request:
    """A shared request: its texts that somebody still waits for."""

    wanted: list[_Wanted]
    task: asyncio.Task[None] | None = None

    def is_wanted(self) -> bool:
        return any(wanted.waiting for wanted in self.wanted)


class Coalescer:
    """Merges the calls of one event loop.

    Args:
        send: Embeds some texts; see `Send`.
        most: Texts that leave together.
    """

    def __init__(self, send: Send, most: int) -> None:
        self._send = send
        self._most = most
        self._all: dict[str, _Wanted] = {}
        self._gathering: dict[str, _Wanted] = {}
        self._requests: set[_Request] = set()
        self._is_due = False

    async def get(self, content: str) -> Vectors:
        """Return the vector float32[d] of one text.

        Raises:
            AsyncEmbedError: Why it failed; an object of the caller's own.
        """
        loop = asyncio.get_running_loop()
        wanted = self._all.get(content)
        if wanted is None:
            wanted = self._all[content] = self._gathering[content] = _Wanted(content)
            self._soon(loop)
        future: asyncio.Future[Vectors] = loop.create_future()
        wanted.waiting.add(future)
        try:
            return await future
        finally:
            wanted.waiting.discard(future)
            if not future.done() or future.cancelled():
                await self._left(wanted)

    async def aclose(self) -> None:
        """End what is under way; whoever still waits gets an error."""
        self._gathering.clear()
        for wanted in list(self._all.values()):
            self._fail(wanted, TransportError("the embedder was closed before the answer came"))
        await ended(*(request.task for request in self._requests if request.task is not None))

    def _soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # not at once: whoever else asks in this turn of the loop travels along
        if not self._is_due and len(self._requests) < REQUESTS_AT_ONCE:
            self._is_due = True
            loop.call_soon(self._leave)

    def _leave(self) -> None:
        self._is_due = False
        while self._gathering and len(self._requests) < REQUESTS_AT_ONCE:
            contents = list(islice(self._gathering, self._most))
            request = _Request([self._gathering.pop(content) for content in contents])
            for wanted in request.wanted:
                wanted.request = request
            self._requests.add(request)
            request.task = asyncio.create_task(self._run(request))
            request.task.add_done_callback(partial(self._done, request))

    async def _run(self, request: _Request) -> None:
        texts = [Text(wanted.content, [index]) for index, wanted in enumerate(request.wanted)]

        async def deliver(outcome: Outcome) -> None:
            for text, vector in zip(outcome.texts, outcome.vectors, strict=True):
                self._give(request.wanted[text.indices[0]], vector)
            for text, failure in outcome.failed:
                self._fail(request.wanted[text.indices[0]], failure)

        await self._send(texts, Run(), deliver)

    def _done(self, request: _Request, task: asyncio.Task[None]) -> None:
        # a callback, since of a task that is cancelled before its first step nothing runs, no `finally` either
        self._requests.discard(request)
        error = None if task.cancelled() else task.exception()
        for wanted in request.wanted:  # those that were not delivered
            if self._all.get(wanted.content) is wanted:
                self._fail(wanted, error if isinstance(error, Exception) else TransportError("the call was ended"))
        self._leave()

    async def _left(self, wanted: _Wanted) -> None:
        """Somebody was cancelled; end what nobody waits for any more. The last one to leave waits for that end."""
        if wanted.waiting:
            return
        request = wanted.request
        if request is None:
            self._gathering.pop(wanted.content, None)
            self._forget(wanted)
        elif not request.is_wanted() and request.task is not None:
            for unwanted in request.wanted:  # who asks for them from now on needs a request that is not ending
                self._forget(unwanted)
            await ended(request.task)

    def _give(self, wanted: _Wanted, vector: Vectors) -> None:
        self._forget(wanted)
        for future in wanted.waiting:
            if not future.done():
                future.set_result(vector.copy())

    def _fail(self, wanted: _Wanted, error: Exception) -> None:
        self._forget(wanted)
        for future in wanted.waiting:
            if not future.done():
                # each its own: a traceback and notes are added to an exception wherever it is caught
                future.set_exception(copy.copy(error) if isinstance(error, AsyncEmbedError) else error)

    def _forget(self, wanted: _Wanted) -> None:
        if self._all.get(wanted.content) is wanted:
            del self._all[wanted.content]
