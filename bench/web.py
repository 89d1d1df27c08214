"""The load of a web app: thousands of single calls at once, and one at a time; `embed_one` against `AsyncOpenAI`.

    python -m bench.web                 about a minute
    python -m bench.web --quick

Both clients run in this process, in turn, with the same texts. The server has a latency of 20 ms and its own process.
Prints two tables in Markdown, and one line of JSON with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

from bench.serving import serving

MODEL = "text-embedding-3-small"
LATENCY_S = 0.02

Ask = Callable[[str], Awaitable[object]]


@dataclass
class Way:
    """The measurements of one client: calls per second in each round, and seconds of each call."""

    name: str
    rates: list[float] = field(default_factory=list)
    crowded_s: list[float] = field(default_factory=list)
    lone_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def p99_ms(self) -> float:
        return statistics.quantiles(self.crowded_s, n=100)[98] * 1_000

    @property
    def lone_ms(self) -> float:
        return statistics.median(self.lone_s) * 1_000


async def crowd(way: Way, ask: Ask, texts: list[str]) -> None:
    """Make all calls at once, as the handlers of a web app do."""

    async def call(text: str) -> None:
        began = time.perf_counter()
        await ask(text)
        way.crowded_s.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for text in texts:
            group.create_task(call(text))
    way.rates.append(len(texts) / (time.perf_counter() - began))


async def lone(way: Way, ask: Ask, text: str) -> None:
    began = time.perf_counter()
    await ask(text)
    way.lone_s.append(time.perf_counter() - began)


async def measure(base_url: str, calls: int, rounds: int, lone_calls: int) -> tuple[Way, Way]:
    from openai import AsyncOpenAI

    from asyncembed import Embedder

    theirs, ours = Way("`AsyncOpenAI.embeddings.create`"), Way("`Embedder.embed_one`")
    async with (
        AsyncOpenAI(base_url=base_url, api_key="none") as client,
        Embedder(MODEL, base_url=base_url, api_key="none") as embedder,
    ):

        async def create(text: str) -> object:
            return (await client.embeddings.create(model=MODEL, input=text)).data[0].embedding

        sides: tuple[tuple[Way, Ask], ...] = ((theirs, create), (ours, embedder.embed_one))
        for _, ask in sides:
            await crowd(Way("warm-up"), ask, [f"warm up {number}" for number in range(100)])
        for number in range(lone_calls):
            for way, ask in sides:
                await lone(way, ask, f"A query by itself, number {number}")
        for number in range(rounds):
            for way, ask in sides:
                await crowd(way, ask, [f"Query {index} of the crowd {number}" for index in range(calls)])
    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 500 calls")
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = (500, 1, 20) if options.quick else (options.calls, options.rounds, 200)
    with serving("bench.server", "--dimensions", 1_536, "--latency", LATENCY_S) as base_url:
        theirs, ours = asyncio.run(measure(base_url, *size))
    print(f"| {size[0]:,} calls at once | calls/s | times | p50 ms | p99 ms |\n|---|---:|---:|---:|---:|")
    for way in (theirs, ours):
        middle_ms = statistics.median(way.crowded_s) * 1_000
        print(f"| {way.name} | {way.rate:,.0f} | {way.rate / theirs.rate:.1f} | {middle_ms:,.0f} | {way.p99_ms:,.0f} |")
    print("\n| one call by itself | ms | more |\n|---|---:|---:|")
    for way in (theirs, ours):
        print(f"| {way.name} | {way.lone_ms:.2f} | {way.lone_ms - theirs.lone_ms:+.2f} |")
    if options.json:
        print(json.dumps([asdict(theirs), asdict(ours)]))


if __name__ == "__main__":
    main()
