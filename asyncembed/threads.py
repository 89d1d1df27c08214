"""Work that must not block the event loop, and is not always worth a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread_if(worth_it: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what the work returns; done in a thread if it is worth that, about 0.1 ms."""
    if worth_it:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)
