"""Who is next: a line in which the urgent go first, without starving the others."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Waiter:
    cost: float
    is_ready: Callable[[], bool]
    overtaken: float = 0.0
    """What urgent ones that came later have taken meanwhile."""
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Queue:
    """A line in front of something that is scarce; for one event loop.

    First come, first served, in two classes: the urgent go before the others, until they have taken as much as the
    first of the others asks for; then that one is next. Who is not ready to go stands aside and keeps its place.
    """

    def __init__(self) -> None:
        self._urgent: list[_Waiter] = []
        self._others: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others)

    async def wait(
        self, cost: float, wait_s: Callable[[], float], is_ready: Callable[[], bool], *, urgent: bool = False
    ) -> None:
        """Wait until it is this one's turn and there is enough for it; whoever returns from here takes it at once.

        Args:
            cost: How much of it is asked for.
            wait_s: Seconds until there is enough, 0 if there is; infinite if only `changed` can tell.
            is_ready: Whether it could go at all; if not, others go before it.
            urgent: Which class it is of.
        """
        me = _Waiter(cost, is_ready)
        line = self._urgent if urgent else self._others
        line.append(me)
        try:
            while (seconds := wait_s() if self._first() is me else math.inf) > 0:
                me.news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if seconds == math.inf else seconds):
                        await me.news.wait()
            overtaken = _first_ready(self._others)
            if urgent and overtaken is not None:
                overtaken.overtaken += cost
        finally:
            line.remove(me)
            self.changed()

    def changed(self) -> None:
        """Let who is first look again."""
        first = self._first()
        if first is not None:
            first.news.set()

    def _first(self) -> _Waiter | None:
        urgent, other = _first_ready(self._urgent), _first_ready(self._others)
        if urgent is None or (other is not None and other.overtaken >= other.cost):
            return other
        return urgent


def _first_ready(line: list[_Waiter]) -> _Waiter | None:
    return next((waiter for waiter in line if waiter.is_ready()), None)
