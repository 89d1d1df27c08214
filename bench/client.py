"""One library, one measurement, one line of JSON; in a process of its own.

    python -m bench.client '{"client": "openai", "base_url": …}'     (see `job.Job`)

The process has one event loop, on which one warm-up request with other texts opens connections and loads what is loaded
late. Then the server's count is set to zero and the call is measured.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bench.clients import CLIENTS
from bench.gauges import read_off
from bench.job import Job, Measured

# Not a text of any corpus, so that no cache of a client helps it afterwards.
WARM_UP = [f"A text to warm up with, number {number}." for number in range(16)]


def stats(base_url: str, method: str = "GET") -> dict[str, int]:
    """Read the server's count; with DELETE, set it to zero."""
    request = urllib.request.Request(base_url.removesuffix("/v1") + "/stats", method=method)
    with urllib.request.urlopen(request) as answer:
        found: dict[str, int] = json.load(answer)
    return found


def check(vectors: Any, count: int, dimensions: int) -> None:
    """Look at some of the rows.

    Raises:
        ValueError: Rows are missing, or one is no vector of this size and of length 1.
    """
    if len(vectors) != count:
        raise ValueError(f"{count} texts have {len(vectors)} vectors")
    for index in range(0, count, max(1, count // 97)):
        row = [float(number) for number in vectors[index]]
        if len(row) != dimensions or abs(sum(number * number for number in row) - 1) > 1e-3:
            raise ValueError(f"row {index} is no vector of {dimensions} numbers")


async def measure(job: Job, texts: Sequence[str], import_s: float) -> Measured:
    async with CLIENTS[job.client].load()(job) as embed:
        await embed(WARM_UP)
        await asyncio.to_thread(stats, job.base_url, "DELETE")
        reading = await read_off(lambda: embed(texts))
    if job.client != "floor":
        check(reading.result, len(texts), job.expected_dimensions)
    counted = await asyncio.to_thread(stats, job.base_url)
    return Measured(
        job.client,
        len(texts),
        reading.seconds,
        reading.cpu_s,
        import_s,
        reading.start_mb,
        reading.peak_mb,
        reading.stall_ms,
        counted["requests"],
        counted["refusals"],
        counted["tokens"],
    )


def main() -> None:
    job = Job.from_json(sys.argv[1])
    logging.basicConfig(level=logging.ERROR)
    began = time.perf_counter()
    import_module(CLIENTS[job.client].imports)
    import_s = time.perf_counter() - began
    print(asyncio.run(measure(job, job.read_texts(), import_s)).to_json())


if __name__ == "__main__":
    main()
