"""What is worth doing only while somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")


class ClientLeftError(Exception):
    """The client hung up; what it asked for has been ended."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; end it if the client hangs up, which a server by itself does not do.

    The request's body must have been read, if it has one.

    Raises:
        ClientLeftError: Nobody waits for the answer any more.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.wait([task, watcher])
        task.cancelled() or task.exception()  # seen, or asyncio would log it as lost


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
