"""Peak memory of `ingest` into SQLite for more and more records, each number in a process of its own.

    python -m bench.memory [--records 20000 200000]

The records come from a generator and are embedded with the model "local".
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from asyncembed import Embedder, Record, SQLiteSink, ingest


def records(count: int) -> Iterator[Record]:
    for number in range(count):
        yield Record(number, f"Record {number} tells of token, vector and request number {number * 7919}. " * 4)


async def run(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with Embedder("local") as embedder, SQLiteSink(Path(folder) / "vectors.db") as sink:
            began = time.perf_counter()
            report = await ingest(records(count), embedder, sink)
            seconds = time.perf_counter() - began
    assert report.success_count == count
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {count:,} | {seconds:.1f} | {count / seconds:,.0f} | {peak_mb:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        asyncio.run(run(options.one))
        return
    print("| records | seconds | records/s | peak MB |\n|---:|---:|---:|---:|", flush=True)
    for count in options.records:
        subprocess.run([sys.executable, "-m", "bench.memory", "--one", str(count)], check=True)


if __name__ == "__main__":
    main()
