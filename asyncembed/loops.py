"""What belongs to one event loop, and the end of a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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

    def pop(self) -> T | None:
        """Forget the running loop's value and return it, if there was one."""
        return self._values.pop(asyncio.get_running_loop(), None)


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel the task and wait for its end, even if the caller is cancelled meanwhile. What it raised is dropped."""
    cancelled: asyncio.CancelledError | None = None
    task.cancel()
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    task.cancelled() or task.exception()  # seen, or asyncio would log it as lost
    if cancelled is not None:
        raise cancelled
