"""SQLite while another thread computes, as in a web app whose handlers are at work: our sink beside bare `sqlite3`.

    python -m bench.busy [--rows 2000] [--dimensions 1536] [--json]

Python's sqlite3 releases the GIL at every step of a statement, and gets it back when the other thread has had it for
5 ms (`sys.getswitchinterval`). Bare takes a step for every row: `executemany` to write, `fetchall` to read. The
benchmark needs a core for each of the two threads: on one core, the thread that releases the GIL often gets it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from asyncembed import Row, SQLiteSink
from bench.sinks import bare_sqlite_file, bare_sqlite_write, make_rows

MODEL = "m"
Measured = Mapping[str, float]
"""Seconds for each job."""


@contextmanager
def another_thread_computing() -> Iterator[None]:
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def timed(jobs: Mapping[str, Callable[[], Awaitable[object]]]) -> Measured:
    seconds = {}
    for name, job in jobs.items():
        start = time.perf_counter()
        await job()
        seconds[name] = time.perf_counter() - start
    return seconds


async def bare(rows: Sequence[Row], folder: Path) -> Measured:
    with closing(bare_sqlite_file(folder / "bare.db")) as connection:
        return await timed(
            {
                "write": lambda: asyncio.to_thread(bare_sqlite_write, connection, rows),
                "existing": lambda: asyncio.to_thread(bare_existing, connection, rows),
                "search": lambda: asyncio.to_thread(bare_search, connection, rows[0]),
            }
        )


def bare_existing(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    sql = "SELECT id, content_hash FROM t WHERE model = ? AND id IN (SELECT value FROM json_each(?))"
    assert len(connection.execute(sql, (MODEL, json.dumps([row.id for row in rows]))).fetchall()) == len(rows)


def bare_search(connection: sqlite3.Connection, query: Row) -> None:
    ids, blobs = zip(*connection.execute("SELECT id, embedding FROM t").fetchall(), strict=True)
    vectors = np.frombuffer(b"".join(blobs), "<f4").reshape(len(ids), -1)
    assert ids[np.argmax((vectors @ query.vector) / np.linalg.norm(vectors, axis=1))] == query.id


async def ours(rows: Sequence[Row], folder: Path) -> Measured:
    hashes = {row.id: row.content_hash for row in rows}
    async with SQLiteSink(folder / "ours.db") as sink:
        await sink.prepare(MODEL, len(rows[0].vector))
        return await timed(
            {
                "write": lambda: sink.write(MODEL, rows),
                "existing": lambda: sink.existing(MODEL, hashes),
                "search": lambda: sink.search(rows[0].vector, 5),
            }
        )


def measure(store: Callable[[Sequence[Row], Path], Awaitable[Measured]], rows: Sequence[Row]) -> Measured:
    async def run() -> Measured:
        with tempfile.TemporaryDirectory() as folder:
            return await store(rows, Path(folder))

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--dimensions", type=int, default=1_536)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = make_rows(options.rows, options.dimensions)
    idle = {"bare": measure(bare, rows), "ours": measure(ours, rows)}
    with another_thread_computing():
        busy = {"bare": measure(bare, rows), "ours": measure(ours, rows)}
    print("| job | bare, idle ms | ours, idle ms | bare, busy ms | ours, busy ms | busy: bare / ours |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in idle["ours"]:
        milliseconds = [f"{1_000 * load[store][name]:,.0f}" for load in (idle, busy) for store in ("bare", "ours")]
        print(f"| {name} | {' | '.join(milliseconds)} | {busy['bare'][name] / busy['ours'][name]:.0f} |")
    if options.json:
        print(json.dumps({"rows": len(rows), "idle_s": idle, "busy_s": busy}))


if __name__ == "__main__":
    main()
