"""Helpers for asyncio: values per event loop, task groups, tasks that end or finish despite cancellation, threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class PerLoop(Generic[T]):
    """One value for each event loop, created at first use and dropped after its loop is closed.

    A weak mapping does not work: asyncio's locks refer to their loop, so a value with a lock would keep its key alive.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """Return the running loop's value."""
        here = asyncio.get_running_loop()
        if here not in self._values:
            for loop in list(self._values):
                if loop.is_closed():
                    self._values.pop(loop, None)
            self._values[here] = self._make()
        return self._values[here]

    def peek(self) -> T | None:
        """Return the running loop's value; None if no loop is running or it has no value yet."""
        try:
            return self._values.get(asyncio.get_running_loop())
        except RuntimeError:
            return None

    def items(self) -> list[tuple[asyncio.AbstractEventLoop, T]]:
        """Return all loops and their values. Safe to call from any thread."""
        return list(self._values.items())

    def pop(self) -> T | None:
        """Remove the running loop's value and return it; None if it had none."""
        return self._values.pop(asyncio.get_running_loop(), None)


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An `asyncio.TaskGroup` that raises the first error itself, not a group of errors."""
    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        error = errors.exceptions[0]  # the first one; later ones may follow from it
    if error is not None:
        raise error


def with_outcome(cancelled: asyncio.CancelledError, outcome: Any) -> asyncio.CancelledError:
    """Attach the outcome of work that was done although its caller was cancelled to the CancelledError."""
    cancelled.outcome = outcome  # type: ignore[attr-defined]  # not a subclass: asyncio.timeout compares types
    return cancelled


def outcome_of(cancelled: asyncio.CancelledError) -> Any:
    """Return the outcome that `with_outcome` has attached; None if there is none."""
    return getattr(cancelled, "outcome", None)


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until they have ended, even if the caller is cancelled. Their errors are dropped."""
    for task in tasks:
        task.cancel()
    try:
        await _all_done(tasks)
    finally:
        for task in tasks:
            task.cancelled() or task.exception()  # retrieved, or asyncio would log it


async def finish_despite_cancel(work: Coroutine[Any, Any, T]) -> T:
    """Finish the work even if the caller is cancelled meanwhile; the CancelledError is then raised afterwards."""
    task = asyncio.create_task(work)
    try:
        await _all_done([task])
    finally:
        task.cancelled() or task.exception()  # retrieved, in case the caller is cancelled
    return task.result()


async def _all_done(tasks: Sequence[asyncio.Task[Any]]) -> None:
    cancelled: asyncio.CancelledError | None = None
    while running := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


_lanes = PerLoop(asyncio.Lock)


async def run_in_thread_if(worth_it: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of the work; run it in a thread if it is worth the 0.1 ms that a thread costs.

    Only one runs at a time: it is Python code, so several would not be faster, and each thread may keep the GIL from
    the event loop for 5 ms (measured: 120 ms with six at once). Work that releases the GIL, as tokenizers do, is
    passed to `asyncio.to_thread` directly.
    """
    if not worth_it:
        return work(*args, **kwargs)
    async with _lanes.get():
        return await asyncio.to_thread(work, *args, **kwargs)
