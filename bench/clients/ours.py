"""asyncembed: `Embedder` with its defaults, token counting included."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.job import Embed, Job


@asynccontextmanager
async def with_fast(job: Job) -> AsyncIterator[Embed]:
    async with embedder(job) as client:
        yield client.embed


def with_tiktoken(job: Job) -> AbstractAsyncContextManager[Embed]:
    """Without the extra `fast`. TIKTOKEN_CACHE_DIR contains the vocabulary."""
    hide("toktok")
    return with_fast(job)


def without_vocabulary(job: Job) -> AbstractAsyncContextManager[Embed]:
    """Without the extra `fast` and without a network: packed by an upper bound of the tokens."""
    hide("toktok", "tiktoken")
    return with_fast(job)


def hide(*modules: str) -> None:
    for module in modules:
        sys.modules[module] = None  # type: ignore[assignment]  # importing it raises ImportError


def embedder(job: Job) -> Any:
    from asyncembed import Embedder

    options: dict[str, Any] = {"max_batch_size": job.batch} if job.batch else {}
    return Embedder(
        job.model,
        base_url=job.base_url,
        api_key="none",
        dimensions=job.dimensions,
        concurrency=job.concurrency,
        **options,
    )


@asynccontextmanager
async def streamed(job: Job) -> AsyncIterator[Embed]:
    """Drops each vector after reading it, like a user who writes them elsewhere."""
    async with embedder(job) as client:

        async def embed(texts: Sequence[str]) -> Sequence[Any]:
            done = 0
            async with aclosing(client.stream(texts)) as items:
                async for item in items:
                    done += item.vector is not None
            return range(done)

        yield embed


@asynccontextmanager
async def into_sqlite(job: Job) -> AsyncIterator[Embed]:
    from asyncembed import SQLiteSink

    with TemporaryDirectory() as folder:
        async with embedder(job) as client, SQLiteSink(Path(folder) / "vectors.db") as sink:
            yield ingesting(client, sink)


@asynccontextmanager
async def into_postgres(job: Job) -> AsyncIterator[Embed]:
    """Stores in a table of this process, which is dropped afterwards; `job.target` is a DSN."""
    import asyncpg

    from asyncembed import PostgresSink

    table = f"bench_{os.getpid()}"
    async with embedder(job) as client, PostgresSink(job.target, table=table) as sink:
        yield ingesting(client, sink)
    connection = await asyncpg.connect(job.target)
    await connection.execute(f"DROP TABLE {table}")
    await connection.close()


def ingesting(client: Any, sink: Any) -> Embed:
    async def embed(texts: Sequence[str]) -> Sequence[Any]:
        from asyncembed import ingest

        report = await ingest(((f"{len(texts)}-{n}", text) for n, text in enumerate(texts)), client, sink)
        return range(report.success_count)

    return embed
