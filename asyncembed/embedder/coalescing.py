"""Concurrent calls for a few texts each, merged into shared requests.

An idle embedder sends a lone call in the next turn of the loop, so nothing is waited for in vain. While as many shared
requests are under way as may be, what arrives gathers, and leaves together when one of them is done. Equal texts are
one. A caller that is cancelled only leaves; the last one to leave ends the request.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import TypeAlias

import numpy as np

from ..batching.batch import Outcome
from ..batching.texts import Text
from ..concurrency import ended
from ..errors import AsyncEmbedError, OverloadedError, TransportError
from ..sending.recorder import Watch
from ..sending.run import Run
from ..types import Vectors

# Two shared requests overlap, so that one that is slow does not hold up everybody; more of them would each be smaller,
# and the provider counts requests.
REQUESTS_AT_ONCE = 2

# A request that takes so many times as long as they usually do hangs, or waits out a backoff: then another one may
# leave beside it. Less than three would take those for late that only were in a crowd.
LATE = 3.0
LATE_LEAST_S = 0.5
LATE_AT_FIRST_S = 5.0

# How much of what "usually" means comes from the last request.
NEWS = 0.2

CLOSED = "the embedder was closed before the answer came"

Send: TypeAlias = Callable[[list[Text], Run, Callable[[Outcome], Awaitable[None]]], Awaitable[None]]
"""Embeds the texts and delivers every one of them, with its vector or its error."""


@dataclass(slots=True, eq=False)
class Call:
    """One caller's different texts, and what has come of them: vectors float32[d], or errors, by position."""

    contents: Sequence[str] = field(repr=False)
    vectors: dict[int, Vectors] = field(default_factory=dict, repr=False)
    errors: dict[int, Exception] = field(default_factory=dict)
    tokens: int = 0
    """What it is billed: of a shared request its share, of an equal text nothing but for who asked first."""
    runs: set[Run] = field(default_factory=set, repr=False)
    """Those of the shared requests that its texts were in."""
    caller: object = field(default=None, repr=False)
    """Whoever made it, as the observer wants to remember them."""
    came_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future(), repr=False)

    @property
    def missing(self) -> int:
        return len(self.contents) - len(self.vectors) - len(self.errors)

    def bill(self, run: Run) -> None:
        """Add to a caller's run what the call has cost; a request that was shared counts for each who shared it."""
        run.tokens += self.tokens
        run.requests += sum(shared.requests for shared in self.runs)
        run.retries += sum(shared.retries for shared in self.runs)
        run.tokens_known &= all(shared.tokens_known for shared in self.runs)

    def outcome(self, texts: Sequence[Text]) -> Outcome:
        """Return what has come, for the texts that were asked for, which are in the order of the contents."""
        failed = [(texts[index], error) for index, error in self.errors.items() if isinstance(error, AsyncEmbedError)]
        if not self.vectors:
            return Outcome(failed=failed)
        return Outcome([texts[index] for index in self.vectors], np.stack(list(self.vectors.values())), failed)

    def settle(self) -> None:
        if not self.missing and not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True, eq=False)
class _Wanted:
    """One text, the calls that wait for it with its position in each, and the request it is in, if it is in one."""

    content: str = field(repr=False)
    calls: dict[Call, int] = field(default_factory=dict)
    request: _Request | None = None


@dataclass(slots=True, eq=False)
class _Request:
    """A shared request: its texts, and what its run has billed to them so far."""

    wanted: list[_Wanted]
    run: Run
    billed: int = 0
    task: asyncio.Task[None] | None = None
    late: asyncio.TimerHandle | None = None

    def is_wanted(self) -> bool:
        return any(wanted.calls for wanted in self.wanted)

    def bills(self, texts: Sequence[Text]) -> Iterator[int]:
        """Yield each text's part of the tokens billed since the last time, by length; together that is all of them."""
        if not texts:  # only pieces of a long one came: they are billed with the last of them
            return iter(())
        tokens = self.run.tokens - self.billed
        self.billed = self.run.tokens
        lengths = list(accumulate((len(text.content) for text in texts), initial=0))
        return (tokens * end // lengths[-1] - tokens * start // lengths[-1] for start, end in pairwise(lengths))


class Coalescer:
    """Merges the calls of one event loop.

    Args:
        send: Embeds some texts; see `Send`.
        watch: Counts how long calls gather.
        most: Texts that leave together.
        most_requests: Shared requests that may be under way when some of them are late.
        most_waiting: Texts that may wait, over all calls.
    """

    def __init__(self, send: Send, watch: Watch, *, most: int, most_requests: int, most_waiting: int) -> None:
        self._send = send
        self._watch = watch
        self._most = most
        self._most_requests = max(most_requests, REQUESTS_AT_ONCE)
        self._most_waiting = most_waiting
        self._waiting = 0
        self._all: dict[str, _Wanted] = {}
        self._gathering: dict[str, _Wanted] = {}
        self._requests: set[_Request] = set()
        self._late: set[_Request] = set()
        self._usual_s: float | None = None
        self._is_due = False
        self._is_closed = False

    @property
    def gathering(self) -> int:
        """Texts that wait for the next shared request."""
        return len(self._gathering)

    async def get(self, call: Call) -> None:
        """Wait until each of the call's texts has its vector or its error. A cancelled one keeps what had come.

        Raises:
            OverloadedError: Too many wait already. Nothing was asked for.
            TransportError: This was closed.
        """
        if self._is_closed:
            raise TransportError(CLOSED)
        count = len(call.contents)
        if self._waiting + count > self._most_waiting:
            self._watch.tally.overloads += 1
            raise self._overloaded()
        asked = [self._wanted(content) for content in call.contents]
        for index, wanted in enumerate(asked):
            wanted.calls[call] = index
        call.caller = self._watch.caller()
        self._soon()
        self._waiting += count
        try:
            await call.done
        finally:
            self._waiting -= count
            if call.missing:
                await self._left(call, asked)

    async def aclose(self) -> None:
        """End what is under way and take nothing more: who still waits gets an error."""
        self._is_closed = True
        self._gathering.clear()
        for wanted in list(self._all.values()):
            self._fail(wanted, TransportError(CLOSED))
        await ended(*self._tasks())

    def _overloaded(self) -> OverloadedError:
        usual_s = self._usual_s or LATE_LEAST_S
        seconds = usual_s * math.ceil((1 + len(self._gathering)) / self._most / REQUESTS_AT_ONCE)
        return OverloadedError(
            f"{self._waiting:,} texts wait already, and max_waiting={self._most_waiting:,}; "
            f"come back in about {seconds:.1f} s",
            retry_after_s=seconds,
        )

    def _wanted(self, content: str) -> _Wanted:
        wanted = self._all.get(content)
        if wanted is None:
            wanted = self._all[content] = self._gathering[content] = _Wanted(content)
        return wanted

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [request.task for request in self._requests if request.task is not None]

    def _may_leave(self) -> bool:
        under_way, late = len(self._requests), len(self._late)
        return bool(self._gathering) and under_way < self._most_requests and under_way - late < REQUESTS_AT_ONCE

    def _soon(self) -> None:
        # not at once: whoever else asks in this turn of the loop travels along
        if not self._is_due and self._may_leave():
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._leave)

    def _leave(self) -> None:
        self._is_due = False
        while self._may_leave():
            contents = list(islice(self._gathering, self._most))
            request = _Request([self._gathering.pop(content) for content in contents], Run(urgent=True))
            for wanted in request.wanted:
                wanted.request = request
            self._tell(request)
            self._requests.add(request)
            request.task = asyncio.create_task(self._run(request))
            request.task.add_done_callback(partial(self._done, request))
            patience_s = LATE_AT_FIRST_S if self._usual_s is None else max(LATE_LEAST_S, LATE * self._usual_s)
            request.late = asyncio.get_running_loop().call_later(patience_s, self._is_late, request)

    def _tell(self, request: _Request) -> None:
        """Tell how long each of its calls has waited, and whose request it is."""
        now = asyncio.get_running_loop().time()
        calls = dict.fromkeys(call for wanted in request.wanted for call in wanted.calls)
        request.run.callers = [call.caller for call in calls]
        self._watch.queued([now - call.came_at for call in calls])

    def _is_late(self, request: _Request) -> None:
        self._late.add(request)
        self._leave()

    async def _run(self, request: _Request) -> None:
        texts = [Text(wanted.content, [index]) for index, wanted in enumerate(request.wanted)]

        async def deliver(outcome: Outcome) -> None:
            bills = request.bills(outcome.texts)
            for text, vector, tokens in zip(outcome.texts, outcome.vectors, bills, strict=True):
                self._give(request.wanted[text.indices[0]], vector, tokens)
            for text, failure in outcome.failed:
                self._fail(request.wanted[text.indices[0]], failure)

        await self._send(texts, request.run, deliver)

    def _done(self, request: _Request, task: asyncio.Task[None]) -> None:
        # a callback, since of a task that is cancelled before its first step nothing runs, no `finally` either
        self._requests.discard(request)
        self._late.discard(request)
        if request.late is not None:
            request.late.cancel()
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            last_s = request.run.elapsed_s
            self._usual_s = last_s if self._usual_s is None else self._usual_s + NEWS * (last_s - self._usual_s)
        for wanted in request.wanted:  # those that were not delivered
            if self._all.get(wanted.content) is wanted:
                self._fail(wanted, error if isinstance(error, Exception) else TransportError("the call was ended"))
        self._leave()

    async def _left(self, call: Call, asked: Iterable[_Wanted]) -> None:
        """Somebody was cancelled; end what nobody waits for any more. The last one to leave waits for that end."""
        unwanted: set[_Request] = set()
        for wanted in asked:
            wanted.calls.pop(call, None)
            if wanted.calls or self._all.get(wanted.content) is not wanted:
                continue  # others wait for it, or it is done
            if wanted.request is None:
                del self._gathering[wanted.content]
                self._forget(wanted)
            elif not wanted.request.is_wanted():
                unwanted.add(wanted.request)
        for request in unwanted:
            for wanted in request.wanted:  # who asks for them from now on needs a request that is not ending
                self._forget(wanted)
        await ended(*(request.task for request in unwanted if request.task is not None))

    def _give(self, wanted: _Wanted, vector: Vectors, tokens: int) -> None:
        for call, index in self._finish(wanted):
            call.vectors[index] = vector.copy()
            call.tokens += tokens
            call.settle()
            tokens = 0

    def _fail(self, wanted: _Wanted, error: Exception) -> None:
        for call, index in self._finish(wanted):
            # each its own: a traceback and notes are added to an exception wherever it is caught
            call.errors[index] = _copied(error)
            call.settle()

    def _finish(self, wanted: _Wanted) -> Iterable[tuple[Call, int]]:
        """Take a text off the list; return the calls that waited for it, its position in each."""
        self._forget(wanted)
        calls, wanted.calls = wanted.calls, {}
        if wanted.request is not None:
            for call in calls:
                call.runs.add(wanted.request.run)
        return calls.items()

    def _forget(self, wanted: _Wanted) -> None:
        if self._all.get(wanted.content) is wanted:
            del self._all[wanted.content]


def _copied(error: Exception) -> Exception:
    try:
        return copy.copy(error)
    except Exception:  # of a provider of the user's: there are exceptions that cannot be copied
        return error
