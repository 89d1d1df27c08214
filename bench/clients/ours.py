"""asyncembed: `Embedder` with its defaults, token counting included."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from bench.job import Embed, Job


@asynccontextmanager
async def with_fast(job: Job) -> AsyncIterator[Embed]:
    async with embedder(job) as client:
        yield client.embed


def with_tiktoken(job: Job) -> AbstractAsyncContextManager[Embed]:
    """As without the extra `fast`. The environment's TIKTOKEN_CACHE_DIR has the vocabulary."""
    _hide("toktok")
    return with_fast(job)


def without_vocabulary(job: Job) -> AbstractAsyncContextManager[Embed]:
    """As without the extra `fast` on a machine without a network: packed by an upper bound."""
    _hide("toktok", "tiktoken")
    return with_fast(job)


def _hide(*modules: str) -> None:
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
