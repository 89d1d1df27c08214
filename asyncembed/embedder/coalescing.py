"""Merges concurrent calls for a few texts each into shared requests.

A lone call on an idle embedder is sent on the next iteration of the event loop. While enough shared requests are in
flight, new texts are queued, and are sent together when one of those requests is done. Duplicate texts are one input.
Cancelling a call only removes that caller; a request is cancelled when no caller waits for it any more.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any, TypeAlias

import numpy as np

from ..batching.batch import Outcome, Receiver
from ..batching.texts import Text
from ..concurrency import cancel_and_wait
from ..errors import AsyncEmbedError, OverloadedError, TransportError
from ..report import Usage
from ..sending.context import CallContext
from ..sending.recorder import LoopRecorder
from ..types import Vectors

# Two shared requests overlap, so that a slow one does not delay all callers. More of them would each be smaller, and
# the provider counts requests.
REQUESTS_AT_ONCE = 2

# A shared request that takes longer than this hangs or is in backoff, or the server is slow. It no longer counts, so
# another one may be sent. Hosted APIs answer a few texts in 0.1 to 1 s.
LATE_S = 2.0

CLOSED = "the embedder was closed before the answer came"

Send: TypeAlias = Callable[[Sequence[Text], CallContext, Receiver], Coroutine[Any, Any, None]]
"""Embeds texts, and delivers each once, with its vector or its error."""


@dataclass(slots=True, eq=False)
class SmallCall:
    """The different texts of one caller, and their vectors float32[d] or errors so far, by position."""

    contents: Sequence[str] = field(repr=False)
    vectors: dict[int, Vectors] = field(default_factory=dict, repr=False)
    errors: dict[int, Exception] = field(default_factory=dict)
    tokens: int = 0
    """Its share of the tokens billed for its requests. A duplicate is billed to the first of its callers."""
    requests: set[CallContext] = field(default_factory=set, repr=False)
    """The shared requests that its texts were in."""
    caller: object = field(default=None, repr=False)
    """The observer's value for this call."""
    came_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future(), repr=False)

    @property
    def missing(self) -> int:
        """How many texts have neither vector nor error."""
        return len(self.contents) - len(self.vectors) - len(self.errors)

    def bill(self, usage: Usage) -> None:
        """Add what the call has cost; a shared request counts for each caller who shared it."""
        usage.tokens += self.tokens
        for request in self.requests:
            usage.requests += request.usage.requests
            usage.retries += request.usage.retries
            usage.tokens_known &= request.usage.tokens_known

    def outcome(self, texts: Sequence[Text]) -> Outcome:
        """Return the vectors and errors so far; `texts` are in the order of `contents`."""
        failed = [(texts[index], error) for index, error in self.errors.items() if isinstance(error, AsyncEmbedError)]
        if not self.vectors:
            return Outcome(failed=failed)
        return Outcome([texts[index] for index in self.vectors], np.stack(list(self.vectors.values())), failed)


@dataclass(slots=True, eq=False)
class _Entry:
    """One text, the calls that wait for it with its position in each, and its request once that was sent."""

    content: str = field(repr=False)
    calls: dict[SmallCall, int] = field(default_factory=dict)
    request: _SharedRequest | None = None


_Waiting: TypeAlias = Iterable[tuple[SmallCall, int]]


class _SharedRequest:
    """A shared request: it hands each text's vector or error to the calls that wait for it.

    `finish` removes a finished text, and returns the calls that wait for it.
    """

    def __init__(self, entries: Sequence[_Entry], call: CallContext, finish: Callable[[_Entry], _Waiting]) -> None:
        self.entries = entries
        self.call = call
        self.is_late = False
        self.task: asyncio.Task[None] | None = None
        self._finish = finish
        self._billed = 0

    async def deliver(self, outcome: Outcome) -> None:
        """Hand vectors and errors to the calls."""
        for text, vector, tokens in zip(outcome.texts, outcome.vectors, self._bills(outcome.texts), strict=True):
            _give(self._finish(self.entries[text.indices[0]]), vector, tokens)
        for text, error in outcome.failed:
            _fail(self._finish(self.entries[text.indices[0]]), error)

    def _bills(self, texts: Sequence[Text]) -> Sequence[int]:
        """Divide the tokens billed since the last outcome among the texts by length, without a remainder."""
        if not texts:  # only pieces of a long text are done: they are billed with its last piece
            return ()
        tokens = self.call.usage.tokens - self._billed
        self._billed = self.call.usage.tokens
        if len(texts) == 1:
            return (tokens,)
        ends = list(accumulate([len(text.content) for text in texts], initial=0))
        return [tokens * end // ends[-1] - tokens * start // ends[-1] for start, end in pairwise(ends)]


class Coalescer:
    """Merges the small calls of one event loop.

    At most `max_requests` shared requests are in flight, late ones included. At most `max_waiting` texts wait for their
    vectors, queued or in flight, over all calls.
    """

    def __init__(
        self, send: Send, recorder: LoopRecorder, *, max_inputs: int, max_requests: int, max_waiting: int
    ) -> None:
        self._send = send
        self._recorder = recorder
        self._max_inputs = max_inputs
        self._max_requests = max(max_requests, REQUESTS_AT_ONCE)
        self._max_waiting = max_waiting
        self._waiting = 0
        self._entries: dict[str, _Entry] = {}
        self._queue: dict[str, _Entry] = {}
        self._requests: set[_SharedRequest] = set()
        self._last_s = LATE_S / 4
        """Seconds that the last shared request took; a guess before there was one."""
        self._late = 0
        """How many of the requests are late."""
        self._is_scheduled = False
        self._is_closed = False

    @property
    def queued(self) -> int:
        """Texts that wait for the next shared request."""
        return len(self._queue)

    async def embed(self, call: SmallCall) -> None:
        """Wait until each text of the call has its vector or its error. A cancelled call keeps its results so far.

        Raises:
            OverloadedError: Too many texts are waiting. Nothing was sent.
            TransportError: The embedder was closed.
        """
        if self._is_closed:
            raise TransportError(CLOSED)
        count = len(call.contents)
        if self._waiting + count > self._max_waiting:
            self._recorder.overloaded()
            raise self._overloaded()
        entries = []
        for index, content in enumerate(call.contents):
            entry = self._entries.get(content)
            if entry is None:
                entry = self._entries[content] = self._queue[content] = _Entry(content)
            entry.calls[call] = index
            entries.append(entry)
        call.caller = self._recorder.caller()
        if not self._is_scheduled and self._may_leave():
            # not at once: other calls in this iteration of the event loop join the request
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._leave)
        self._waiting += count
        try:
            await call.done
        finally:
            self._waiting -= count
            if call.missing:
                await self._abandon(call, entries)

    async def aclose(self) -> None:
        """Cancel the requests in flight, and accept no more calls. Calls that still wait get an error."""
        self._is_closed = True
        self._queue.clear()
        for entry in list(self._entries.values()):
            _fail(self._finish(entry), TransportError(CLOSED))
        await cancel_and_wait(*[request.task for request in self._requests if request.task is not None])

    def _overloaded(self) -> OverloadedError:
        seconds = self._last_s * math.ceil((1 + len(self._queue)) / self._max_inputs / REQUESTS_AT_ONCE)
        return OverloadedError(
            f"{self._waiting:,} texts are waiting already (max_waiting={self._max_waiting:,}); "
            f"try again in about {seconds:.1f} s",
            retry_after_s=seconds,
        )

    def _may_leave(self) -> bool:
        in_flight = len(self._requests)
        return bool(self._queue) and in_flight < self._max_requests and in_flight - self._late < REQUESTS_AT_ONCE

    def _leave(self) -> None:
        """Send the queued texts in shared requests, up to the limit of requests in flight."""
        self._is_scheduled = False
        loop = asyncio.get_running_loop()
        while self._may_leave():
            entries: list[_Entry] = []
            calls: dict[SmallCall, None] = {}
            for content in list(islice(self._queue, self._max_inputs)):
                entries.append(self._queue.pop(content))
                calls.update(dict.fromkeys(entries[-1].calls))
            self._recorder.queued([loop.time() - call.came_at for call in calls])
            request = _SharedRequest(
                entries, CallContext(urgent=True, callers=[call.caller for call in calls]), self._finish
            )
            texts: list[Text] = []
            for index, entry in enumerate(entries):
                entry.request = request
                texts.append(Text(entry.content, (index,)))
            self._requests.add(request)
            request.task = loop.create_task(self._send(texts, request.call, request))
            late = loop.call_later(LATE_S, self._is_late, request)
            request.task.add_done_callback(partial(self._done, request, late))

    def _is_late(self, request: _SharedRequest) -> None:
        request.is_late = True
        self._late += 1
        self._leave()

    def _done(self, request: _SharedRequest, late: asyncio.TimerHandle, task: asyncio.Task[None]) -> None:
        # a callback, since a task that is cancelled before its first step runs nothing, not even `finally`
        late.cancel()
        self._requests.discard(request)
        self._late -= request.is_late
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            self._last_s = request.call.elapsed_s
        for entry in request.entries:
            if self._entries.get(entry.content) is entry:  # it was not delivered
                reason = error if isinstance(error, Exception) else TransportError("the call was ended")
                _fail(self._finish(entry), reason)
        self._leave()

    async def _abandon(self, call: SmallCall, entries: Iterable[_Entry]) -> None:
        """Remove a cancelled call; cancel the requests that no other call waits for, and wait until they have ended."""
        unwanted: set[_SharedRequest] = set()
        for entry in entries:
            entry.calls.pop(call, None)
            if entry.calls or self._entries.get(entry.content) is not entry:
                continue  # other calls wait for it, or it is done
            if entry.request is None:
                del self._queue[entry.content]
                self._forget(entry)
            elif not any(other.calls for other in entry.request.entries):
                unwanted.add(entry.request)
        for request in unwanted:
            for entry in request.entries:  # a later call for this text needs a request that is not ending
                self._forget(entry)
        await cancel_and_wait(*[request.task for request in unwanted if request.task is not None])

    def _finish(self, entry: _Entry) -> _Waiting:
        """Remove a finished text; return the calls that wait for it, with its position in each."""
        self._forget(entry)
        calls, entry.calls = entry.calls, {}
        if entry.request is not None:
            for call in calls:
                call.requests.add(entry.request.call)
        return calls.items()

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.content) is entry:
            del self._entries[entry.content]


def _give(waiting: _Waiting, vector: Vectors, tokens: int) -> None:
    for call, index in waiting:
        call.vectors[index] = vector.copy()
        call.tokens += tokens
        tokens = 0
        _settle(call)


def _fail(waiting: _Waiting, error: Exception) -> None:
    for call, index in waiting:
        # a copy for each, since traceback and notes are added to an exception where it is caught
        call.errors[index] = _copied(error)
        _settle(call)


def _settle(call: SmallCall) -> None:
    if not call.missing and not call.done.done():
        call.done.set_result(None)


def _copied(error: Exception) -> Exception:
    try:
        return copy.copy(error)
    except Exception:  # an exception of a user's own provider may not be copyable
        return error
