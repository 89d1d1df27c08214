"""The code that users write around a client that does not batch: chunks, a semaphore, and decoding of base64."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from bench.job import Job

# The API's limit of inputs per request (API reference, embeddings.create).
MAX_INPUTS = 2_048


async def in_chunks(
    texts: Sequence[str], job: Job, send: Callable[[Sequence[str]], Awaitable[Sequence[Any]]]
) -> list[Any]:
    """Send the texts `job.batch` at a time, `job.concurrency` requests at once; return the rows in order."""
    slots = asyncio.Semaphore(job.concurrency)

    async def one(chunk: Sequence[str]) -> Sequence[Any]:
        async with slots:
            return await send(chunk)

    size = job.batch or MAX_INPUTS
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(texts[at : at + size])) for at in range(0, len(texts), size)]
    return [row for task in tasks for row in task.result()]


def float32_rows(vectors: Iterable[str | Sequence[float]], count: int, dimensions: int) -> Any:
    """Return float32[n, d] from vectors in base64, decoded by pybase64, or in numbers."""
    import numpy as np
    import pybase64

    rows = np.empty((count, dimensions), np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        row[:] = np.frombuffer(pybase64.b64decode(vector), "<f4") if isinstance(vector, str) else vector
    return rows
