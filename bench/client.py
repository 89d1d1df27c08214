"""One library, one measurement, one line of JSON; in a process of its own.

    python -m bench.client '{"client": "openai", "base_url": …}'     (see `job.Job`)

The process has one event loop. A warm-up with other texts opens connections and loads what is loaded late; then the
server's count is set to zero and the call is measured.
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
from bench.gauges import read_off
from bench.importing import load
from bench.job import Job, Measured

# None is a text that is measured, so that no cache of a client helps it there; and enough of them that nobody gets
# away without whatever it counts tokens with.
WARM_UP = [f"Text {number} to warm up with, of so many words, " * 15 for number in range(256)]


def stats(base_url: str, method: str = "GET") -> dict[str, int]:
    """Read the server's count; with DELETE, set it to zero."""
    request = urllib.request.Request(base_url.removesuffix("/v1") + "/stats", method=method)
    with urllib.request.urlopen(request) as answer:
        found: dict[str, int] = json.load(answer)
    return found


def check(rows: Any, count: int, dimensions: int | None) -> None:
    """Look at some of the rows; only count them if they are no vectors.

    Raises:
        ValueError: Rows are missing, or one is no vector of this size and of length 1.
    """
    if len(rows) != count:
        raise ValueError(f"{count} texts have {len(rows)} rows")
    for index in range(0, count if dimensions else 0, max(1, count // 97)):
        row = [float(number) for number in rows[index]]
        if len(row) != dimensions or abs(sum(number * number for number in row) - 1) > 1e-3:
            raise ValueError(f"row {index} is no vector of {dimensions} numbers")


async def measure(job: Job, import_s: float) -> Measured:
    client = CLIENTS[job.client]
    texts = job.texts_to_embed()
    async with client.load()(job) as embed:
        await embed(WARM_UP)
        given = texts if client.is_lazy else list(texts)
        if job.base_url:
            await asyncio.to_thread(stats, job.base_url, "DELETE")
        reading = await read_off(lambda: embed(given))
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
