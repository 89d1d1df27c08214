"""Per-event-loop values, work in threads, and helpers that cancel a task or let it finish despite cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class PerLoop(Generic[T]):
    """One value for each event loop, made when it is first asked for, and forgotten after its loop is closed.

    A weak mapping would not do: asyncio's locks know their loop, so a value that holds one would keep its own key.
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
        """Return the running loop's value, if there is one and a loop is running."""
        try:
            return self._values.get(asyncio.get_running_loop())
        except RuntimeError:
            return None

    def items(self) -> list[tuple[asyncio.AbstractEventLoop, T]]:
        """Return all loops and their values; any thread may ask."""
        return list(self._values.items())

    def pop(self) -> T | None:
        """Forget the running loop's value and return it, if there was one."""
        return self._values.pop(asyncio.get_running_loop(), None)


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An `asyncio.TaskGroup` that raises the first error itself, not a group of errors."""
    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        error = errors.exceptions[0]  # what came first counts, the others follow from it
    if error is not None:
        raise error


def noted(cancelled: asyncio.CancelledError, outcome: Any) -> asyncio.CancelledError:
    """Note on the error of a cancelled call that its work was done all the same, and with what outcome."""
    cancelled.outcome = outcome  # type: ignore[attr-defined]  # a subclass would not do: asyncio.timeout knows this one
    return cancelled


def outcome_of(cancelled: asyncio.CancelledError) -> Any:
    """Return the outcome of what was done although its caller was cancelled; None if it was not, or nobody knows."""
    return getattr(cancelled, "outcome", None)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait for their end, even if the caller is cancelled meanwhile; drop what they raise."""
    for task in tasks:
        task.cancel()
    try:
        await _all_done(tasks)
    finally:
        for task in tasks:
            task.cancelled() or task.exception()  # seen, or asyncio would log it as lost


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Do the work to its end, even if the caller is cancelled meanwhile; that is then cancelled afterwards."""
    task = asyncio.create_task(work)
    try:
        await _all_done([task])
    finally:
        task.cancelled() or task.exception()  # seen, should the caller be cancelled
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


async def in_thread_if(worth_it: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what the work returns; done in a thread if it is worth that, about 0.1 ms.

    One such piece of work at a time: it is Python code, so several would gain nothing, and each of them may keep the
    interpreter from the loop for its 5 ms turn (measured: 120 ms with six at once). Work that
    lets go of the interpreter, as tokenizers do, goes to `asyncio.to_thread` directly.
    """
    if not worth_it:
        return work(*args, **kwargs)
    async with _lanes.get():
        return await asyncio.to_thread(work, *args, **kwargs)
