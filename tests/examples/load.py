"""The web app on a busy bad day: many searches, clients that hang up, documents stored beside, a faulty provider.

    python -m tests.examples.load --seconds 60

Every stored section has a text of its own, and is searched for by that text: the best hit must be that very section,
or somebody got a wrong vector. Prints one line of JSON.
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
# Without a cache, so that every search travels.
ENVIRONMENT = {"EMBEDDING_MODEL": "text-embedding-3-small", "EMBEDDING_CACHE": "", "OPENAI_API_KEY": "any"}


@dataclass(slots=True)
class Day:
    """What happened.

    Attributes:
        searches: Searches answered well.
        wrong: Of these, those whose best hit was another section than the one that was asked for.
        hung_up: Searches whose client left.
        documents: Documents stored beside.
        refused: Answers that were none of these, by status.
        latencies_s: Of the searches that were answered.
        rss_mb: The app's memory, after a while and at the end.
        stall_ms, busy_ms: The longest turn of its loop, by the clock, and of work of its own.
        exit_code: How it ended after SIGTERM.
    """

    searches: int = 0
    wrong: int = 0
    hung_up: int = 0
    documents: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    stall_ms: float = 0.0
    busy_ms: float = 0.0
    exit_code: int | None = None
    log: str = ""

    def summary(self) -> dict[str, object]:
        """Return it in a few numbers."""
        values = dataclasses.asdict(self)
        del values["log"], values["latencies_s"]
        cuts = statistics.quantiles(self.latencies_s, n=100)
        return values | {"p50_ms": round(cuts[49] * 1000, 1), "p99_ms": round(cuts[98] * 1000, 1)}


def document(name: str, sections: int, version: int = 0) -> str:
    """A text in Markdown with so many sections, each like no other."""
    return "".join(f"# {number}\n\n{name} {version} says {number}\n\n" for number in range(sections))


def question(number: int) -> str:
    return f"# {number}\n\nfixed 0 says {number}"


class Client:
    """One connection that asks one thing after the other; HTTP by hand, since the client must not be the bottleneck."""

    def __init__(self, app: WebApp, day: Day, dice: random.Random, hang_ups: float) -> None:
        self._host = httpx.URL(app.url)
        self._day = day
        self._dice = dice
        self._hang_ups = hang_ups
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Search until it is over."""
        try:
            while not is_over():
                number = self._dice.randrange(SECTIONS)
                if self._dice.random() < self._hang_ups:
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
            self._day.refused[status] += 1
            return
        self._day.latencies_s.append(time.perf_counter() - begun)
        self._day.searches += 1
        [best] = json.loads(body)["hits"]
        self._day.wrong += best["id"] != f"fixed.md#{number}-1"

    async def _leave_early(self, number: int) -> None:
        asking = asyncio.ensure_future(self._ask(number))
        await asyncio.wait([asking], timeout=self._dice.random() * 0.05)
        if not asking.done():
            self._day.hung_up += 1
        asking.cancel()
        await asyncio.wait([asking])
        await self._close()

    async def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def store_beside(app: WebApp, day: Day, over: asyncio.Event) -> None:
    """Store one version of a large document after the other."""
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        version = 0
        while not over.is_set():
            version += 1
            response = await client.put("/documents/bulk.md", content=document("bulk", BULK_SECTIONS, version))
            if response.status_code == 200:
                day.documents += 1
            else:
                day.refused[response.status_code] += 1


async def watch(app: WebApp, day: Day, over: asyncio.Event) -> None:
    """Note the app's memory from time to time."""
    while not over.is_set():
        day.rss_mb.append(round(app.rss_bytes() / 1e6, 1))
        try:
            async with asyncio.timeout(5):
                await over.wait()
        except TimeoutError:
            continue


async def live(
    app: WebApp, is_enough: Callable[[Day], bool], *, clients: int, hang_ups: float, bulk: bool = True
) -> Day:
    """Have a day until it is enough, and end it with SIGTERM."""
    day, over, dice = Day(), asyncio.Event(), random.Random(0)
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
        (await client.put("/documents/fixed.md", content=document("fixed", SECTIONS))).raise_for_status()

    async def search(client: Client) -> None:
        await client.run(lambda: is_enough(day))
        over.set()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(search(Client(app, day, dice, hang_ups)))
        if bulk:
            group.create_task(store_beside(app, day, over))
        group.create_task(watch(app, day, over))
    app.process.send_signal(signal.SIGTERM)
    day.exit_code = await asyncio.to_thread(app.wait)
    day.log = app.log
    if turn := re.search(r"longest turn (.*) ms, busy (.*) ms", app.log):
        day.stall_ms, day.busy_ms = float(turn[1]), float(turn[2])
    return day


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--hang-ups", type=float, default=0.05)
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--no-bulk", dest="bulk", action="store_false", help="store no documents beside")
    parser.add_argument("--store", help="postgresql://…; SQLite by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, provider(DIMENSIONS, 0.02, options.faults) as base_url:
        environment = {**ENVIRONMENT, "OPENAI_BASE_URL": base_url}
        if options.store:
            environment["DATABASE_URL"] = options.store
        with web_app(Path(folder), watched=True, **environment) as app:
            end_s = time.monotonic() + options.seconds
            few = {"clients": options.clients, "hang_ups": options.hang_ups, "bulk": options.bulk}
            day = asyncio.run(live(app, lambda _: time.monotonic() > end_s, **few))
    sys.stdout.write(json.dumps(day.summary()) + "\n")


if __name__ == "__main__":
    main()
