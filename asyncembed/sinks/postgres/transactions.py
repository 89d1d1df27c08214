"""One transaction at a time on a pool of connections: bounded, cut off if it hangs, repeated if that may help.

Knows asyncpg's manners but does not import it: pool and connections are handed in.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from ...concurrency import noted
from ...databases.postgres_errors import NEW_CONNECTION, Verdict, is_our_fault, reason_of, sqlstate_of, verdict_on
from ...errors import AsyncEmbedError, SinkBusyError, SinkConfigError, SinkError

T = TypeVar("T")
Work: TypeAlias = Callable[[Any], Coroutine[Any, Any, T]]
"""What is done with a connection, inside a transaction. It may run more than once, each time in a new one."""

# Seconds between attempts: 0.05, 0.1, 0.2, … 2, 2, 2, each shortened by up to half at random, so that those who
# failed together do not come back together.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0

# Seconds that a caller who was cancelled waits for the answer to COMMIT.
COMMIT_S = 0.5

# Seconds for a connection to be given back, and so for a reset that asks the server.
RELEASE_S = 5.0

# PostgreSQL's limits of time are ints.
MOST_MS = 2**31 - 1

# What would end a statement that takes long.
_LIMITS = ("statement_timeout", "lock_timeout")

# Seconds for an index: longer than any takes, since a pool that was handed in may have a limit for statements.
INDEX_S = 7 * 86_400.0


class Transactions:
    """Runs work in transactions.

    Args:
        open_pool: Returns the pool for the running loop.
        foreign: What the driver raises.
        name: Table and database, for messages.
        timeout: Seconds for a connection to become free, and again for one attempt.
        retry_for: Seconds after which no further attempt begins.
        reached: Whether the server is known to be there, so that it is waited for when it is not.
    """

    def __init__(
        self,
        open_pool: Callable[[], Awaitable[Any]],
        foreign: tuple[type[Exception], ...],
        *,
        name: str,
        timeout: float,
        retry_for: float,
        reached: bool,
    ) -> None:
        self._open_pool = open_pool
        self._foreign = foreign
        self._name = name
        self._timeout = timeout
        self._retry_for = retry_for
        self._reached = reached

    async def run(self, work: Work[T], *, again: Container[str | None] = ()) -> T:
        """Return what the work returns, once its transaction is committed.

        Args:
            work: What is done, perhaps more than once.
            again: SQLSTATEs after which it is done again, whatever they mean elsewhere.

        Raises:
            SinkError: Nothing of it is known to be stored.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._retry_for
        for pause in pauses():
            try:
                return await self._attempt(work)
            except AsyncEmbedError:
                raise
            except self._foreign as error:
                verdict = "again" if sqlstate_of(error) in again else verdict_on(error, reached=self._reached)
                failure = error
            if verdict not in ("again", "busy") or clock() + pause > deadline:
                raise self._explained(failure, verdict)  # out here it has no context: see `_explained`
            await asyncio.sleep(pause)
        raise AssertionError("there is no last pause")

    async def _attempt(self, work: Work[T]) -> T:
        pool = await self._open_pool()
        connection = await pool.acquire(timeout=self._timeout)
        self._reached = True
        committing = asyncio.Event()
        conversation = self._transaction(connection, work, committing)
        results: list[T] = []
        try:
            results.append(await in_time(connection, conversation, self._timeout, almost_done=committing))
        finally:
            try:
                with suppress(*self._foreign):  # it is thrown away then; what was done is done
                    await pool.release(connection, timeout=RELEASE_S)
            except asyncio.CancelledError as cancelled:
                for result in results:
                    noted(cancelled, result)
                raise
        return results[0]

    async def _transaction(self, connection: Any, work: Work[T], committing: asyncio.Event) -> T:
        # bounded on the server, too: were this machine to vanish, its locks would vanish soon after; and no constraint
        # is put off until COMMIT, where it could not be told any more which row it is about
        limit_ms = max(1, min(MOST_MS, int(min(self._timeout, MOST_MS) * 1_000)))  # 0 would be no limit
        # what was committed meanwhile is seen by each statement, whatever the role's default
        await connection.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET CONSTRAINTS ALL IMMEDIATE; "
            f"SET LOCAL statement_timeout = {limit_ms}; SET LOCAL idle_in_transaction_session_timeout = {limit_ms}"
        )
        try:
            result = await work(connection)
            committing.set()
            await connection.execute("COMMIT")
        except Exception as error:
            with suppress(*self._foreign):
                if sqlstate_of(error) in NEW_CONNECTION:
                    connection.terminate()
                else:
                    await connection.execute("ROLLBACK")
            raise
        except BaseException:
            with suppress(*self._foreign):  # `in_time` has done so, unless the whole loop is being torn down
                connection.terminate()
            raise
        return result

    async def alone(self, statements: Callable[[], Awaitable[Sequence[str]]]) -> None:
        """Run statements outside of any transaction, each for as long as it takes.

        Args:
            statements: Which ones: asked again after a failure that may pass, for at most so long as others are.
        """
        clock = asyncio.get_running_loop().time
        deadline: float | None = None
        for pause in pauses():
            try:
                for statement in await statements():
                    await self._run_alone(statement)
            except AsyncEmbedError:
                raise
            except self._foreign as error:
                verdict, failure = verdict_on(error, reached=True), error
            else:
                return
            deadline = deadline or clock() + self._retry_for
            if verdict not in ("again", "busy") or clock() + pause > deadline:
                raise self._explained(failure, verdict)
            await asyncio.sleep(pause)

    async def _run_alone(self, statement: str) -> None:
        pool = await self._open_pool()
        async with pool.acquire(timeout=self._timeout) as connection:
            limits = [
                name for name in _LIMITS if await connection.fetchval("SELECT current_setting($1)", name) != "0"
            ]  # of the user's or the role's, for what usually takes a moment
            for name in limits:
                await connection.execute(f"SET {name} = 0")
            try:
                await connection.execute(statement, timeout=INDEX_S)
            finally:
                for name in limits:
                    with suppress(*self._foreign):
                        await connection.execute(f"RESET {name}")

    def _explained(self, error: Exception, verdict: Verdict) -> SinkError:
        ours = explained(error, verdict, self._name, tried_s=self._retry_for, waited_s=self._timeout)
        # rows are quoted in the server's errors, and addresses with their passwords in asyncpg's
        is_secret = verdict == "row" or is_our_fault(error) or getattr(error, "context", None)
        ours.__cause__ = None if is_secret else error
        return ours


def pauses() -> Iterator[float]:
    """Yield how long to wait after each failed attempt, in seconds, for ever."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)


async def in_time(
    connection: Any, conversation: Coroutine[Any, Any, T], timeout: float, *, almost_done: asyncio.Event
) -> T:
    """Await the conversation; if it is late, or the caller is cancelled, end it by ending its connection.

    Cancelled when it is almost done, it is given a moment, so that it is known what has become of it: if it is done,
    the error says so, see `loops.outcome_of`.

    asyncpg waits for the server's answer even when it is cancelled, for ever if none comes (`return await waiter`
    in its `bind_execute_many`). Without a connection nothing in it waits any more.
    """
    task = asyncio.ensure_future(conversation)
    late = False
    try:
        await asyncio.wait([task], timeout=timeout)
        late = not task.done()
    except asyncio.CancelledError as cancelled:
        if almost_done.is_set():
            await asyncio.wait([task], timeout=COMMIT_S)
        if task.done() and not task.cancelled() and task.exception() is None:
            noted(cancelled, task.result())
        raise
    finally:
        while not task.done():
            connection.terminate()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        failed = None if task.cancelled() else task.exception()
    if late or task.cancelled():
        raise TimeoutError from failed
    return task.result()


def explained(error: Exception, verdict: Verdict, name: str, *, tried_s: float, waited_s: float) -> SinkError:
    """Return the error for our caller.

    Args:
        error, verdict, waited_s: As for `reason_of`.
        name: Table and database.
        tried_s: Seconds in which it was tried again, if the verdict allows it.
    """
    text = f"{reason_of(error, verdict, waited_s=waited_s)}{_hint_for(sqlstate_of(error))}"
    if verdict in ("again", "busy"):
        text += f"; given up after trying for {tried_s:g} s"
    return {"busy": SinkBusyError, "config": SinkConfigError}.get(verdict, SinkError)(f"{name}: {text}")


def _hint_for(sqlstate: str | None) -> str:
    if sqlstate in ("26000", "42P05"):
        return ": a pooler stands between; make the pool with statement_cache_size=0"
    if sqlstate == "42501":
        return ": this user may not do that; see docs/sinks.md for the rights that are needed"
    if sqlstate in ("42P01", "42703"):
        return ": the table was changed while it was in use, or where= is not right"
    if sqlstate == "53100":
        return ": its disk is full"
    return ""
