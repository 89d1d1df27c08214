"""The web app with a monitor of its event loop. At shutdown it prints for how long the loop was blocked at most."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from examples.web_app import app as web_app


@dataclass(slots=True)
class Longest:
    """The longest time for which no other task could run: by wall clock, and in CPU time of the loop's thread.

    The wall clock includes the time when other processes had the CPU or other threads had the GIL.
    """

    stall_s: float = 0.0
    busy_s: float = 0.0

    async def watch(self) -> None:
        last_s, last_cpu_s = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now_s, cpu_s = time.monotonic(), time.thread_time()
            self.stall_s = max(self.stall_s, now_s - last_s - 0.001)
            self.busy_s = max(self.busy_s, cpu_s - last_cpu_s)
            last_s, last_cpu_s = now_s, cpu_s


def make_app() -> FastAPI:
    """Return the app with a lifespan that also monitors the loop."""
    app = web_app.make_app()
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any] | None]:
        longest = Longest()
        async with inner(app) as state:
            watching = asyncio.create_task(longest.watch())
            yield state
            watching.cancel()
        sys.stderr.write(f"longest turn {longest.stall_s * 1000:.1f} ms, busy {longest.busy_s * 1000:.1f} ms\n")

    app.router.lifespan_context = lifespan
    return app
