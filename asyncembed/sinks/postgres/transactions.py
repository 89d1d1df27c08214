"""Transactions on the connections of a pool: bounded in time, cut off if they hang, repeated if that may help."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Container, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ...concurrency import cancel_and_wait, with_outcome
from ...databases.postgres import FOREIGN
from ...databases.postgres_errors import Verdict, reason_of, shown_cause, sqlstate_of, verdict_on
from ...errors import AsyncEmbedError, SinkBusyError, SinkConfigError, SinkError
from .pool import LoopPool

T = TypeVar("T")
Work: TypeAlias = Callable[[Any], Coroutine[Any, Any, T]]
"""Uses a connection inside a transaction. It may run several times, each time in a new transaction."""

# Seconds between attempts: 0.05, 0.1, 0.2, … 2, 2, 2, each shortened by up to half at random, so that callers that
# failed together do not retry together.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0

COMMIT_S = 0.5  # seconds that a cancelled caller waits for the answer to COMMIT
RELEASE_S = 5.0  # seconds to release a connection, which includes the queries of a pool's reset
INDEX_S = 7 * 86_400.0  # longer than any index takes, since a pool that was handed in may have a limit for statements
MOST_MS = 2**31 - 1  # PostgreSQL's timeouts are ints

_POOLER = ": a pooler stands between; make the pool with statement_cache_size=0"
_CHANGED = ": the table was changed while it was in use, or where= is not right"
_HINTS = {
    "26000": _POOLER,
    "42P05": _POOLER,
    "42P01": _CHANGED,
    "42703": _CHANGED,
    "42501": ": this user may not do that; see docs/sinks.md for the rights that are needed",
    "53100": ": its disk is full",
}


@dataclass(slots=True)
class Transactions:
    """Runs work in transactions."""

    pool: LoopPool
    timeout: float  # seconds for a connection to become free, and again for one attempt
    retry_for: float  # seconds after which no further attempt begins
    reached: bool = False  # whether the server has ever answered; only then it is waited for

    async def run(self, work: Work[T], *, again: Container[str | None] = ()) -> T:
        """Return the result of the work, once its transaction is committed.

        It is repeated after errors that may pass, and after the SQLSTATEs in `again`, whatever they usually mean. Then
        a SinkError is raised: nothing of it is known to be stored.
        """
        deadline = asyncio.get_running_loop().time() + self.retry_for
        return await self._repeated(partial(self._attempt, work), deadline, again)

    async def run_outside(self, statements: Callable[[], Awaitable[Sequence[str]]]) -> None:
        """Run statements outside of transactions, however long each takes; get them again after a failure."""

        async def attempt() -> None:
            planned = await statements()
            pool = await self.pool.open()
            async with pool.acquire(timeout=self.timeout) as connection:
                # a role's limits are meant for statements that usually take a moment
                await connection.execute("SET statement_timeout = 0; SET lock_timeout = 0")
                try:
                    for statement in planned:
                        await connection.execute(statement, timeout=INDEX_S)
                finally:
                    with suppress(*FOREIGN):
                        await connection.execute("RESET statement_timeout; RESET lock_timeout")

        await self._repeated(attempt, None)

    async def _repeated(
        self, attempt: Callable[[], Awaitable[T]], deadline: float | None, again: Container[str | None] = ()
    ) -> T:
        """Return the result of the first successful attempt; by default, `retry_for` counts from the first failure."""
        clock = asyncio.get_running_loop().time
        longest_pause = FIRST_PAUSE_S
        while True:
            try:
                return await attempt()
            except AsyncEmbedError:
                raise
            except FOREIGN as error:
                reached = self.reached or self.pool.is_given  # a pool that was handed in has connected before
                verdict = "again" if sqlstate_of(error) in again else verdict_on(error, reached=reached)
                failure = error
            deadline = clock() + self.retry_for if deadline is None else deadline
            pause = longest_pause * random.uniform(0.5, 1.0)
            if verdict not in ("again", "busy") or clock() + pause > deadline:
                # outside of `except`, so that it has no context
                raise self._explained(failure, verdict) from shown_cause(failure, verdict)
            await asyncio.sleep(pause)
            longest_pause = min(2 * longest_pause, LONGEST_PAUSE_S)

    async def _attempt(self, work: Work[T]) -> T:
        pool = await self.pool.open()
        connection = await pool.acquire(timeout=self.timeout)
        self.reached = True
        committing = asyncio.Event()
        conversation = self._transaction(connection, work, committing)
        result: T | None = None
        try:
            result = await in_time(connection, conversation, self.timeout, almost_done=committing)
            return result
        finally:
            try:
                with suppress(*FOREIGN):  # the connection is dropped then, and the result stands
                    await pool.release(connection, timeout=RELEASE_S)
            except asyncio.CancelledError as cancelled:
                with_outcome(cancelled, result)
                raise

    async def _transaction(self, connection: Any, work: Work[T], committing: asyncio.Event) -> T:
        # Limited on the server, too: if this machine vanishes, its locks vanish soon after. Constraints are checked at
        # once, since an error at COMMIT does not say which row it is about. READ COMMITTED, whatever the role's
        # default: each statement sees what was committed before it.
        limit_ms = max(1, min(MOST_MS, int(min(self.timeout, MOST_MS) * 1_000)))  # 0 would be no limit
        await connection.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET CONSTRAINTS ALL IMMEDIATE; "
            f"SET LOCAL statement_timeout = {limit_ms}; SET LOCAL idle_in_transaction_session_timeout = {limit_ms}"
        )
        try:
            result = await work(connection)
            committing.set()
            await connection.execute("COMMIT")
        except BaseException as error:
            with suppress(*FOREIGN):
                # after a failover (25006, read-only) only a new connection leads to the new primary
                if isinstance(error, Exception) and sqlstate_of(error) != "25006":
                    await connection.execute("ROLLBACK")
                else:
                    connection.terminate()  # if cancelled, `in_time` has done so, unless the whole loop is shut down
            raise
        return result

    def _explained(self, error: Exception, verdict: Verdict) -> SinkError:
        text = f"{reason_of(error, verdict, waited_s=self.timeout)}{_HINTS.get(sqlstate_of(error) or '', '')}"
        if verdict in ("again", "busy"):
            text += f"; given up after trying for {self.retry_for:g} s"
        kind = {"busy": SinkBusyError, "config": SinkConfigError}.get(verdict, SinkError)
        return kind(f"{self.pool.name}: {text}")


async def in_time(
    connection: Any, conversation: Coroutine[Any, Any, T], timeout: float, *, almost_done: asyncio.Event
) -> T:
    """Await the conversation; if it is late, or the caller is cancelled, end it by ending its connection.

    If the caller is cancelled when it is almost done, it gets a moment to end. If it succeeds, the CancelledError
    carries its result, see `concurrency.outcome_of`.

    asyncpg waits for the server's answer even when it is cancelled, for ever if none comes (`return await waiter`
    in its `bind_execute_many`). Without a connection it waits for nothing.
    """
    task = asyncio.ensure_future(conversation)
    try:
        await asyncio.wait([task], timeout=timeout)
    except asyncio.CancelledError as cancelled:
        if almost_done.is_set():
            await asyncio.wait([task], timeout=COMMIT_S)
        if task.done() and not task.cancelled() and task.exception() is None:
            with_outcome(cancelled, task.result())
        raise
    finally:
        late = not task.done()
        if late:
            connection.terminate()
            await cancel_and_wait(task)
    if late or task.cancelled():
        raise TimeoutError from None if task.cancelled() else task.exception()
    return task.result()
