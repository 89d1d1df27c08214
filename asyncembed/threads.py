"""Work that must not block the event loop, and is not always worth a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .loops import PerLoop

P = ParamSpec("P")
T = TypeVar("T")

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
