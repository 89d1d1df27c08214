"""The longest stall of the event loop while texts are embedded, with a server that answers in base64 and in numbers.

    python -m bench.stalls [--texts 20000]

The server is a process of its own on the same two cores, so a stall here may also be the machine's: the first row is
the loop with nothing to do but wait for the same server's work.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time

from asyncembed import Embedder
from asyncembed.testing import watch_loop
from bench.corpus import sections
from bench.headline import MODEL, server


async def measure(texts: list[str], base_url: str) -> tuple[float, float]:
    async with Embedder(MODEL, base_url=base_url, api_key="none") as embedder:
        await embedder.embed(sections(300, characters=2_000, seed=2))  # imports, vocabulary, connections
        async with watch_loop() as stalls:
            began = time.perf_counter()
            await embedder.embed(texts)
            return time.perf_counter() - began, stalls.longest_s


async def _watch(seconds: float) -> float:
    async with watch_loop() as stalls:
        await asyncio.sleep(seconds)
    return stalls.longest_s


def idle(seconds: float) -> float:
    code = f"import time; end = time.time() + {seconds}\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]):
        return asyncio.run(_watch(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    options = parser.parse_args()
    texts = sections(options.texts)
    print("| server answers with | seconds | longest stall of the loop, ms |\n|---|---:|---:|")
    print(f"| nothing, a busy process beside | 3.00 | {idle(3.0) * 1000:.1f} |")
    for name, dialect in (("base64", "openai"), ("numbers", "lm-studio")):
        with server(0.0, "--dialect", dialect, "--dimensions", "1536") as base_url:
            seconds, stall = asyncio.run(measure(texts, base_url))
        print(f"| {name} | {seconds:.2f} | {stall * 1000:.1f} |")


if __name__ == "__main__":
    main()
