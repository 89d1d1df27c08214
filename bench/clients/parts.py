"""Single steps from text to row, each compared with simple handwritten code."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from bench.clients.chunks import MAX_INPUTS, float32_rows
from bench.clients.ours import hide
from bench.job import Embed, Job

# The API's limit (API reference, embeddings.create).
_MAX_TOKENS = 300_000


def in_thread(work: Callable[[Sequence[str]], Sequence[Any]]) -> Embed:
    return lambda texts: asyncio.to_thread(work, texts)


# ---- counting ----


@asynccontextmanager
async def count_fast(job: Job) -> AsyncIterator[Embed]:
    from asyncembed.batching.tokens import load_counter

    counter = await load_counter("cl100k_base")
    yield in_thread(counter.count)


def count_tiktoken(job: Job) -> AbstractAsyncContextManager[Embed]:
    hide("toktok")
    return count_fast(job)


def count_bytes(job: Job) -> AbstractAsyncContextManager[Embed]:
    hide("toktok", "tiktoken")
    return count_fast(job)


# ---- packing ----


@asynccontextmanager
async def packed(job: Job) -> AsyncIterator[Embed]:
    from asyncembed.batching.packing import Packer

    def pack(texts: Sequence[str]) -> Sequence[Any]:
        packer: Packer[str] = Packer(MAX_INPUTS, _MAX_TOKENS)
        batches = [batch for text in texts if (batch := packer.add(text, len(text) // 4)) is not None]
        return [item for batch in [*batches, *packer.flush()] for item in batch]

    yield in_thread(pack)


@asynccontextmanager
async def packed_greedily(job: Job) -> AsyncIterator[Embed]:
    def pack(texts: Sequence[str]) -> Sequence[Any]:
        batches: list[list[str]] = [[]]
        tokens = 0
        for text in texts:
            weight = len(text) // 4
            if len(batches[-1]) == MAX_INPUTS or tokens + weight > _MAX_TOKENS:
                batches.append([])
                tokens = 0
            batches[-1].append(text)
            tokens += weight
        return [item for batch in batches for item in batch]

    yield in_thread(pack)


# ---- decoding ----


def bodies_of(job: Job) -> Callable[[int], bytes]:
    """Return a function that makes the body of a reply with the given number of vectors."""
    from bench.server import items

    every = list(items(job.expected_dimensions, floats=job.floats))
    whole = {MAX_INPUTS: b'{"data":[%b],"usage":{"total_tokens":1}}' % b"".join(every)}
    return lambda count: whole.get(count) or b'{"data":[%b],"usage":{"total_tokens":1}}' % b"".join(every[:count])


def decoding(job: Job, decode: Callable[[bytes, int], Any]) -> Embed:
    body = bodies_of(job)

    def work(texts: Sequence[str]) -> Sequence[Any]:
        counts = [min(MAX_INPUTS, len(texts) - at) for at in range(0, len(texts), MAX_INPUTS)]
        return [row for count in counts for row in decode(body(count), count)]

    return in_thread(work)


@asynccontextmanager
async def decoded(job: Job) -> AsyncIterator[Embed]:
    from asyncembed.providers.decoding import decode

    yield decoding(job, lambda body, count: decode(body, count, job.expected_dimensions).vectors)


@asynccontextmanager
async def decoded_by_jiter(job: Job) -> AsyncIterator[Embed]:
    import jiter

    def decode(body: bytes, count: int) -> Any:
        items = jiter.from_json(body, cache_mode="keys")["data"]
        return float32_rows((item["embedding"] for item in items), count, job.expected_dimensions)

    yield decoding(job, decode)


@asynccontextmanager
async def decoded_by_json(job: Job) -> AsyncIterator[Embed]:
    import numpy as np

    def vector(found: Any) -> Any:
        return np.frombuffer(base64.b64decode(found), "<f4") if isinstance(found, str) else found

    def decode(body: bytes, count: int) -> Any:
        return np.array([vector(item["embedding"]) for item in json.loads(body)["data"]], np.float32)

    yield decoding(job, decode)


# ---- sinks ----


def sinking(job: Job, write: Callable[[Any, Any], Any], new_place: Callable[[], Any]) -> Embed:
    """Write a row for each text with a function of `bench.sinks`, each time into a new store."""
    from bench.sinks import make_rows

    rows = make_rows(job.count, job.expected_dimensions)

    async def embed(texts: Sequence[str]) -> Sequence[Any]:
        await write(rows[: len(texts)], new_place())
        return texts

    return embed


@asynccontextmanager
async def our_sqlite(job: Job) -> AsyncIterator[Embed]:
    from bench import sinks

    with TemporaryDirectory() as folder:
        yield sinking(job, sinks.our_sqlite, lambda: Path(mkdtemp(dir=folder)))


@asynccontextmanager
async def bare_sqlite(job: Job) -> AsyncIterator[Embed]:
    from bench import sinks

    with TemporaryDirectory() as folder:
        yield sinking(job, sinks.bare_sqlite, lambda: Path(mkdtemp(dir=folder)))


@asynccontextmanager
async def our_postgres(job: Job) -> AsyncIterator[Embed]:
    from bench import sinks

    yield sinking(job, sinks.our_postgres, lambda: job.target)


@asynccontextmanager
async def bare_postgres(job: Job) -> AsyncIterator[Embed]:
    from bench import sinks

    yield sinking(job, sinks.bare_postgres, lambda: job.target)
