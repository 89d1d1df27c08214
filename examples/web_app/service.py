"""Stores documents section by section and searches them, independent of HTTP."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakValueDictionary

from asyncembed import (
    AsyncEmbedError,
    Embedder,
    Hit,
    IngestReport,
    InputError,
    PostgresSink,
    Record,
    SQLiteSink,
    ingest,
    open_sink,
)
from asyncembed.sources.chunking import Line, Splitter, markdown_chunks, plain_chunks

from .settings import Settings

Store: TypeAlias = SQLiteSink | PostgresSink


@dataclass(frozen=True, slots=True)
class Stored:
    """The result of storing a document: its sections, the report of the run, and the number of old sections deleted."""

    sections: int
    report: IngestReport
    deleted: int


@dataclass(frozen=True, slots=True)
class Health:
    """The state of provider and store: "ok", or the name of an error.

    Attributes:
        provider: "ok" if key, address, model and dimensions are right and vectors arrive.
        store: "ok" if the store answers.
        model: The embedding model.
        latency_s: The response time of the provider in seconds; None if it did not answer.
    """

    provider: str
    store: str
    model: str
    latency_s: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether searches can be answered."""
        return self.provider == self.store == "ok"


class DocumentSearch:
    """Documents in a store, and the embedder that all requests share.

    Args:
        embedder: Not closed by this class.
        store: Not closed by this class.
        settings: Deadlines and sizes.
    """

    def __init__(self, embedder: Embedder, store: Store, settings: Settings) -> None:
        self.embedder = embedder
        self._store = store
        self._settings = settings
        self._splitter = Splitter(settings.section_tokens)
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._checking = asyncio.Lock()
        self._checked: tuple[float, Health] | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> AsyncGenerator[DocumentSearch, None]:
        """Yield the service of this process; at the end, wait for work in flight and close embedder and store."""
        cache = True if settings.embedding_cache == "memory" else settings.embedding_cache or None
        # The embedder is closed first, so that its batches in flight can still be stored.
        async with (
            open_sink(settings.database_url) as store,
            Embedder(settings.embedding_model, cache=cache, max_waiting=settings.max_waiting) as embedder,
        ):
            await store.prepare(embedder.model, embedder.dimensions)
            service = cls(embedder, store, settings)
            await service._warm_up()
            # The objects that exist now live as long as the process. Without this, each full garbage collection visits
            # them and blocks the loop for up to 100 ms (`python -m tests.examples.load`).
            gc.collect()
            gc.freeze()
            try:
                yield service
            finally:
                gc.unfreeze()

    async def _warm_up(self) -> None:
        """Load what the first requests would wait for. If the provider does not answer, `/health` reports it."""
        await self.health()  # the provider's driver
        await self.embedder.plan(["ready"])  # the tokenizer; this sends nothing

    async def search(self, question: str, k: int) -> list[Hit]:
        """Return the k sections nearest to the question, best first.

        Concurrent searches share a request to the provider, and have priority over documents that are being stored.
        """
        model = self.embedder.model
        vector = await self.embedder.embed_one(question, deadline=self._settings.search_deadline_s)
        return await self._store.search(vector, k, model=model)

    async def put(self, name: str, text: str) -> Stored:
        """Store a document, replacing the one with that name; unchanged sections are not embedded again.

        Raises:
            AsyncEmbedError: The embedded sections are stored; the next call does the rest.
        """
        # Two versions of a document at once would delete each other's sections. The lock holds in this process only:
        # with several workers, the later version should be stored again.
        async with self._writing.setdefault(name, asyncio.Lock()):
            sections = await asyncio.to_thread(self._split, name, text)
            report = await ingest(sections, self.embedder, self._store, deadline=self._settings.document_deadline_s)
            kept = {str(one.id if isinstance(one, Record) else one.record_id) for one in sections}
            return Stored(len(sections), report, await self._delete(name, kept))

    def _split(self, name: str, text: str) -> list[Record | InputError]:
        chunks = markdown_chunks if name.endswith((".md", ".markdown")) else plain_chunks
        lines = (Line(number, line) for number, line in enumerate(text.splitlines(keepends=True), start=1))
        return list(chunks(lines, name, self._splitter))

    async def _delete(self, name: str, kept: set[str]) -> int:
        """Delete the document's sections except those that are kept. Ids are `name#…`, and no name contains a `#`."""
        model = self.embedder.model
        # reads all ids, page by page; for many documents, keep the ids of each document in a separate table
        gone = [id async for id in self._store.ids(model) if id.startswith(f"{name}#") and id not in kept]
        return await self._store.delete(gone, model) if gone else 0

    async def health(self) -> Health:
        """Return a state that is at most `check_every_s` seconds old, so that probes cost little."""
        now_s = asyncio.get_running_loop().time
        async with self._checking:  # concurrent probes share one check
            if self._checked is None or now_s() - self._checked[0] > self._settings.check_every_s:
                self._checked = now_s(), await self._check()
            return self._checked[1]

    async def _check(self) -> Health:
        provider, store, latency_s = "ok", "ok", None
        try:
            latency_s = (await self.embedder.check(deadline=self._settings.search_deadline_s)).latency_s
        except AsyncEmbedError as error:
            provider = type(error).__name__
        try:
            await self._store.existing(self.embedder.model, {"health": ""})  # reads at most one row
        except AsyncEmbedError as error:
            store = type(error).__name__
        return Health(provider, store, self.embedder.model, latency_s)
