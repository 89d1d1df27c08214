"""What belongs to one event loop, and the end of a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

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
