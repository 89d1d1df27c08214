"""Measures one client in this process and prints the result as one line of JSON.

    python -m bench.client '{"client": "openai", "base_url": …}'     (see `job.Job`)

The process has one event loop. A warm-up with other texts opens connections and triggers lazy imports. Then the
server's counts are reset and the call is measured.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import urllib.request
from importlib.metadata import version
from typing import Any

from bench.clients import CLIENTS
from bench.gauges import measure_call
from bench.importing import load
from bench.job import Job, Measured

# No text here is measured, so that no cache helps a client. They are enough for every client to load its tokenizer.
WARM_UP = [f"Text {number} to warm up with, of a few words, " * 15 for number in range(256)]


def stats(base_url: str, method: str = "GET") -> dict[str, int]:
    """Read the server's counts; with DELETE, reset them."""
    request = urllib.request.Request(base_url.removesuffix("/v1") + "/stats", method=method)
    with urllib.request.urlopen(request) as answer:
        found: dict[str, int] = json.load(answer)
    return found


def check(rows: Any, count: int, dimensions: int | None) -> None:
    """Check the number of rows, and some of the rows unless `dimensions` is None.

    Raises:
        ValueError: Rows are missing, or a row is not a vector of this size and of length 1.
    """
    if len(rows) != count:
        raise ValueError(f"{count} texts have {len(rows)} rows")
    for index in range(0, count if dimensions else 0, max(1, count // 97)):
        row = [float(number) for number in rows[index]]
        if len(row) != dimensions or abs(sum(number * number for number in row) - 1) > 1e-3:
            raise ValueError(f"row {index} is not a unit vector of {dimensions} numbers")


async def measure(job: Job, import_s: float) -> Measured:
    client = CLIENTS[job.client]
    texts = job.texts_to_embed()
    async with client.load()(job) as embed:
        await embed(WARM_UP)
        given = texts if client.is_lazy else list(texts)
        if job.base_url:
            await asyncio.to_thread(stats, job.base_url, "DELETE")
        reading = await measure_call(lambda: embed(given))
    check(reading.result, job.count, job.expected_dimensions if client.gives_vectors else None)
    counted = await asyncio.to_thread(stats, job.base_url) if job.base_url else {}
    return Measured(
        job.client,
        version(client.distribution) if client.distribution else "",
        job.count,
        reading.seconds,
        reading.cpu_s,
        import_s,
        reading.start_mb,
        reading.peak_mb,
        reading.stall_ms,
        counted.get("requests"),
        counted.get("refusals"),
        counted.get("tokens"),
    )


def main() -> None:
    job = Job.from_json(sys.argv[1])
    logging.basicConfig(level=logging.ERROR)
    import_s = load(CLIENTS[job.client].imports)
    print(asyncio.run(measure(job, import_s)).to_json())


if __name__ == "__main__":
    main()
