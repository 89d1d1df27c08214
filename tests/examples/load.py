"""A load test of the web app: many searches, clients that disconnect, concurrent documents, a faulty provider.

    python -m tests.examples.load --seconds 60

Every stored section has a unique text and is searched for by that text. The best hit must be that section, or a caller
got a wrong vector. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx

from tests.examples.server import WebApp, provider, web_app

SECTIONS = 200
BULK_SECTIONS = 300
DIMENSIONS = 64
# Without a cache, so that every search needs a request.
ENVIRONMENT = {"EMBEDDING_MODEL": "text-embedding-3-small", "EMBEDDING_CACHE": "", "OPENAI_API_KEY": "any"}


@dataclass(slots=True)
class LoadResults:
    """The results of a load test.

    Attributes:
        searches: Searches with status 200.
        wrong: Searches whose best hit was another section than the right one.
        disconnected: Searches whose client disconnected.
        documents: Documents stored at the same time.
        refused: All other responses, by status.
        latencies_s: Seconds of each search with status 200.
        rss_mb: The app's memory, measured every five seconds.
        stall_ms, busy_ms: The longest time for which the loop ran no other task, by wall clock and by its own CPU time.
        exit_code: The exit code after SIGTERM.
    """

    searches: int = 0
    wrong: int = 0
    disconnected: int = 0
    documents: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    stall_ms: float = 0.0
    busy_ms: float = 0.0
    exit_code: int | None = None
    log: str = ""

    def summary(self) -> dict[str, object]:
        """Return the results in a few numbers."""
        values = dataclasses.asdict(self)
        del values["log"], values["latencies_s"]
        cuts = statistics.quantiles(self.latencies_s, n=100)
        return values | {"p50_ms": round(cuts[49] * 1000, 1), "p99_ms": round(cuts[98] * 1000, 1)}


def document(name: str, sections: int, version: int = 0) -> str:
    """Return a text in Markdown with that number of sections, all different."""
    return "".join(f"# {number}\n\n{name} {version} says {number}\n\n" for number in range(sections))


def question(number: int) -> str:
    return f"# {number}\n\nfixed 0 says {number}"


class Client:
    """One connection that searches again and again. It writes HTTP itself, so that the client is not the bottleneck."""

    def __init__(self, app: WebApp, results: LoadResults, dice: random.Random, disconnects: float) -> None:
        self._host = httpx.URL(app.url)
        self._results = results
        self._dice = dice
        self._disconnects = disconnects
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Search until the test is over."""
        try:
            while not is_over():
                number = self._dice.randrange(SECTIONS)
                if self._dice.random() < self._disconnects:
                    await self._leave_early(number)
                else:
                    await self._search(number)
        finally:
            await self._close()

    async def _ask(self, number: int) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host.host, self._host.port)
        reader, writer = self._streams
        writer.write(f"GET /search?k=1&q={quote(question(number))} HTTP/1.1\r\nhost: app\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(None, 1)[0])
        return int(head.split(None, 2)[1]), await reader.readexactly(length)

    async def _search(self, number: int) -> None:
        begun = time.perf_counter()
        status, body = await self._ask(number)
        if status != 200:
            self._results.refused[status] += 1
            return
        self._results.latencies_s.append(time.perf_counter() - begun)
        self._results.searches += 1
        [best] = json.loads(body)["hits"]
        self._results.wrong += best["id"] != f"fixed.md#{number}-1"

    async def _leave_early(self, number: int) -> None:
        asking = asyncio.ensure_future(self._ask(number))
        await asyncio.wait([asking], timeout=self._dice.random() * 0.05)
        if not asking.done():
            self._results.disconnected += 1
        asking.cancel()
        await asyncio.wait([asking])
        await self._close()

    async def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def store_documents(app: WebApp, results: LoadResults, over: asyncio.Event) -> None:
    """Store new versions of a large document until the test is over."""
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        version = 0
        while not over.is_set():
            version += 1
            response = await client.put("/documents/bulk.md", content=document("bulk", BULK_SECTIONS, version))
            if response.status_code == 200:
                results.documents += 1
            else:
                results.refused[response.status_code] += 1


async def record_memory(app: WebApp, results: LoadResults, over: asyncio.Event) -> None:
    """Record the app's memory every five seconds."""
    while not over.is_set():
        results.rss_mb.append(round(app.rss_bytes() / 1e6, 1))
        try:
            async with asyncio.timeout(5):
                await over.wait()
        except TimeoutError:
            continue


async def run_load(
    app: WebApp, is_enough: Callable[[LoadResults], bool], *, clients: int, disconnects: float, bulk: bool = True
) -> LoadResults:
    """Run the load until `is_enough`, then stop the app with SIGTERM."""
    results, over, dice = LoadResults(), asyncio.Event(), random.Random(0)
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        (await client.put("/documents/fixed.md", content=document("fixed", SECTIONS))).raise_for_status()

    async def search(client: Client) -> None:
        await client.run(lambda: is_enough(results))
        over.set()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(search(Client(app, results, dice, disconnects)))
        if bulk:
            group.create_task(store_documents(app, results, over))
        group.create_task(record_memory(app, results, over))
    app.process.send_signal(signal.SIGTERM)
    results.exit_code = await asyncio.to_thread(app.wait)
    results.log = app.log
    if turn := re.search(r"longest turn (.*) ms, busy (.*) ms", app.log):
        results.stall_ms, results.busy_ms = float(turn[1]), float(turn[2])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--disconnects", type=float, default=0.05)
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--no-bulk", dest="bulk", action="store_false", help="store no documents meanwhile")
    parser.add_argument("--store", help="postgresql://…; default: SQLite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, provider(DIMENSIONS, 0.02, options.faults) as base_url:
        environment = {**ENVIRONMENT, "OPENAI_BASE_URL": base_url}
        if options.store:
            environment["DATABASE_URL"] = options.store
        with web_app(Path(folder), watched=True, **environment) as app:
            end_s = time.monotonic() + options.seconds
            few = {"clients": options.clients, "disconnects": options.disconnects, "bulk": options.bulk}
            results = asyncio.run(run_load(app, lambda _: time.monotonic() > end_s, **few))
    sys.stdout.write(json.dumps(results.summary()) + "\n")


if __name__ == "__main__":
    main()
