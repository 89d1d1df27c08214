"""The headline of the README: one call per text against `Embedder`, with the same server and latency.

    python -m bench.headline                     everything, about 18 minutes
    python -m bench.headline --sections 1000     a minute
    python -m bench.headline --picture docs/headline.png

Every figure is measured, none is extrapolated. The server is `asyncembed.testing` in a separate process. All ways use
the same SDK and the same texts. Prints a table in Markdown, and one line of JSON with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from bench.corpus import sections
from bench.serving import serving

MODEL = "text-embedding-3-small"


@dataclass(frozen=True)
class Row:
    """The measurement of one way to embed all sections."""

    way: str
    sections: int
    requests: int
    seconds: float
    ratio: float


async def one_by_one(texts: list[str], base_url: str) -> int:
    """One call after the other, as in the first example of most documentation."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key="none") as client:
        for text in texts:
            await client.embeddings.create(model=MODEL, input=text)
    return len(texts)


async def eight_at_once(texts: list[str], base_url: str) -> int:
    """One call per text, eight at once."""
    from openai import AsyncOpenAI

    slots = asyncio.Semaphore(8)
    async with AsyncOpenAI(base_url=base_url, api_key="none") as client:

        async def call(text: str) -> None:
            async with slots:
                await client.embeddings.create(model=MODEL, input=text)

        async with asyncio.TaskGroup() as group:
            for text in texts:
                group.create_task(call(text))
    return len(texts)


async def embedder(texts: list[str], base_url: str) -> int:
    """`Embedder` with its defaults, token counting included."""
    from asyncembed import Embedder

    async with Embedder(MODEL, base_url=base_url, api_key="none") as client:
        result = await client.embed(texts)
    assert not result.failures
    return result.requests


WAYS: dict[str, Callable[[list[str], str], Awaitable[int]]] = {
    "one call per text": one_by_one,
    "one call per text, 8 at once": eight_at_once,
    "`Embedder`": embedder,
}


def measure(count: int, base_url: str) -> list[Row]:
    texts = sections(count)
    rows: list[Row] = []
    for way, run in WAYS.items():
        asyncio.run(run(sections(16, seed=2), base_url))  # warm-up: imports, connections, vocabulary
        began = time.perf_counter()
        requests = asyncio.run(run(texts, base_url))
        seconds = time.perf_counter() - began
        rows.append(Row(way, count, requests, seconds, (rows[0].seconds if rows else seconds) / seconds))
        print(f"{way}: {count:,} sections in {seconds:.2f} s", file=sys.stderr)
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| sections | how | requests | seconds | times faster |", "|---:|---|---:|---:|---:|"]
    lines += [
        f"| {row.sections:,} | {row.way} | {row.requests:,} | {row.seconds:,.2f} | {row.ratio:,.0f} |" for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Row], latency_s: float, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    most = max(row.sections for row in rows)
    shown = [row for row in rows if row.sections == most]
    figure, axes = plt.subplots(figsize=(8, 2.4))
    bars = axes.barh(
        [row.way.strip("`") for row in shown], [row.seconds for row in shown], color=["#b7bcc4"] * 2 + ["#2a6fdb"]
    )
    axes.set_xscale("log")
    axes.set_xlim(min(row.seconds for row in shown) / 4, max(row.seconds for row in shown) * 30)
    axes.bar_label(bars, [f" {row.seconds:,.1f} s, {row.requests:,} requests" for row in shown])
    axes.set_xlabel(f"seconds (log scale) for {most:,} sections, server latency {latency_s * 1000:g} ms")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, nargs="+", default=[1_000, 19_207])
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the server takes for each request")
    parser.add_argument("--picture", help="the file to draw it into")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with serving("asyncembed.testing", "--latency", options.latency) as base_url:
        rows = [row for count in options.sections for row in measure(count, base_url)]
    print(table(rows))
    if options.json:
        print(json.dumps({"latency_s": options.latency, "cpus": os.cpu_count(), "rows": [asdict(row) for row in rows]}))
    if options.picture:
        draw(rows, options.latency, options.picture)


if __name__ == "__main__":
    main()
