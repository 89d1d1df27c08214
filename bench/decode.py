"""Vectors a second, and the longest stall of an event loop beside, for a reply in base64 and one in numbers.

    python bench/decode.py [--quick]

A task that sleeps 1 ms at a time ticks while a thread decodes; its longest gap is the stall. `busy` is a thread of
plain Python, which shows what the interpreter's own switching costs. Prints medians, then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from asyncembed.decoding import decode
from asyncembed.types import Vectors


def body_of(vectors: Vectors, *, numbers: bool) -> bytes:
    """Return a reply with these vectors, float32[n, d]."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": list(map(float, row)) if numbers else base64.b64encode(row.astype("<f4").tobytes()).decode(),
        }
        for index, row in enumerate(vectors)
    ]
    return json.dumps({"object": "list", "data": data, "usage": {"total_tokens": 1}}).encode()


def busy() -> None:
    ends = time.perf_counter() + 0.2
    while time.perf_counter() < ends:
        pass


async def stall_ms(work: Callable[[], object]) -> float:
    """Return the longest gap between two ticks while a thread does the work."""
    worst = 0.0
    thread = asyncio.create_task(asyncio.to_thread(work))
    last = time.perf_counter()
    while not thread.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
    await thread
    return worst * 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 vectors and 3 rounds in place of 2,048 and 15")
    quick = parser.parse_args().quick
    count, rounds = (256, 3) if quick else (2_048, 15)
    vectors = np.random.default_rng(0).standard_normal((count, 1_536)).astype(np.float32)
    works: dict[str, Callable[[], object]] = {"busy": busy}
    for name, numbers in (("base64", False), ("numbers", True)):
        body = body_of(vectors, numbers=numbers)
        works[name] = lambda body=body: decode(body, count, 1_536)  # type: ignore[misc]
    taken_s: dict[str, list[float]] = {name: [] for name in works}
    stalls_ms: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):  # interleaved, so that whatever else the machine does hits all of them
        for name, work in works.items():
            started = time.perf_counter()
            work()
            taken_s[name].append(time.perf_counter() - started)
            stalls_ms[name].append(asyncio.run(stall_ms(work)))
    rows = [
        {
            "reply": name,
            "ms": round(statistics.median(taken_s[name]) * 1_000, 1),
            "vectors_per_s": 0 if name == "busy" else round(count / statistics.median(taken_s[name])),
            "stall_ms": round(statistics.median(stalls_ms[name]), 1),
            "worst_stall_ms": round(max(stalls_ms[name]), 1),
        }
        for name in works
    ]
    print(f"{count:,} vectors of 1,536\n{'reply':10}{'ms':>8}{'vectors/s':>12}{'stall ms':>10}{'worst':>8}")
    for row in rows:
        print("{reply:10}{ms:8}{vectors_per_s:12,}{stall_ms:10}{worst_stall_ms:8}".format(**row))
    print(json.dumps({"bench": "decode", "vectors": count, "dimensions": 1_536, "rows": rows}))


if __name__ == "__main__":
    main()
