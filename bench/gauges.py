"""Measures CPU time, memory and stalls of the event loop, with the standard library only."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ticks at this interval cost almost nothing; a stall is measured to within one of them.
_TICK_S = 0.001
_STATUS = Path("/proc/self/status")


@dataclass(slots=True)
class Reading:
    """The measurements of one call."""

    result: Any = None
    seconds: float = 0.0
    cpu_s: float = 0.0
    start_mb: float = 0.0
    peak_mb: float = 0.0
    stall_ms: float = 0.0


async def measure_call(work: Callable[[], Awaitable[Any]]) -> Reading:
    """Await the work and measure it."""
    reading = Reading()
    _reset_peak()
    reading.start_mb = memory_mb("VmRSS")
    async with _watch_loop(reading):
        cpu_began, began = time.process_time(), time.perf_counter()
        reading.result = await work()
        reading.seconds, reading.cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    reading.peak_mb = memory_mb("VmHWM")
    return reading


def _reset_peak() -> None:
    """Reset the peak memory to the current value (Linux); elsewhere the peak is that of the whole process."""
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak


def memory_mb(name: str) -> float:
    """Return VmRSS or VmHWM; on other systems than Linux ru_maxrss, which starts at the parent's value."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


@asynccontextmanager
async def _watch_loop(reading: Reading) -> AsyncIterator[None]:
    """Like `asyncembed.testing.watch_loop`, which is not installed in the environments of the other clients."""
    ticking = asyncio.create_task(_tick(reading))
    await asyncio.sleep(_TICK_S)
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])


async def _tick(reading: Reading) -> None:
    last = time.perf_counter()
    try:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.perf_counter()
            reading.stall_ms = max(reading.stall_ms, (now - last - _TICK_S) * 1_000)
            last = now
    finally:  # the work may have ended with a stall
        reading.stall_ms = max(reading.stall_ms, (time.perf_counter() - last - _TICK_S) * 1_000)
