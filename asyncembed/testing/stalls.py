"""Measures how long the event loop was blocked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

# Ticks at this interval cost almost nothing; a stall is measured to within one of them.
_TICK_S = 0.001


@dataclass(slots=True)
class Stalls:
    """The measurement of a ticking task.

    Attributes:
        longest_s: The longest time, in seconds, for which no other task could run.
    """

    longest_s: float = 0.0


@asynccontextmanager
async def watch_loop() -> AsyncIterator[Stalls]:
    """Measure the running loop: `async with watch_loop() as stalls:`, then read `stalls.longest_s`."""
    stalls = Stalls()
    ticking = asyncio.create_task(_tick(stalls))
    try:
        yield stalls
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])


async def _tick(stalls: Stalls) -> None:
    loop = asyncio.get_running_loop()
    last = loop.time()
    while True:
        await asyncio.sleep(_TICK_S)
        now = loop.time()
        stalls.longest_s = max(stalls.longest_s, now - last - _TICK_S)
        last = now
