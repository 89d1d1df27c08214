"""How long the event loop was kept from its other work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

# Ticks this far apart cost the loop nothing, and a stall is known to within one of them.
_TICK_S = 0.001


@dataclass(slots=True)
class Stalls:
    """What a ticking task saw.

    Attributes:
        longest_s: The longest time, in seconds, for which nothing else could run.
    """

    longest_s: float = 0.0


@asynccontextmanager
async def watch_loop() -> AsyncIterator[Stalls]:
    """Watch the running loop: `async with watch_loop() as stalls:`, then look at `stalls.longest_s`."""
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
