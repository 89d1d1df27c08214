"""OpenAI's SDK, used as its README says, and with the fastest of its public methods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from operator import itemgetter
from typing import Any

from bench.clients.chunks import float32_rows, in_chunks
from bench.job import Embed, Job

# The default of two gives up at the third refusal of a request, so users raise it when rate limits bind.
MAX_RETRIES = 1_000


def arguments(job: Job) -> dict[str, Any]:
    return {"model": job.model} | ({"dimensions": job.dimensions} if job.dimensions else {})


@asynccontextmanager
async def documented(job: Job) -> AsyncIterator[Embed]:
    """`embeddings.create`, and the lists of floats in its reply."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=job.base_url, api_key="none", max_retries=MAX_RETRIES) as client:

        async def send(texts: Sequence[str]) -> list[list[float]]:
            answer = await client.embeddings.create(input=list(texts), **arguments(job))
            return [item.embedding for item in answer.data]

        yield lambda texts: in_chunks(texts, job, send)


@asynccontextmanager
async def raw(job: Job) -> AsyncIterator[Embed]:
    """`with_raw_response`, then jiter and pybase64 into float32."""
    import jiter
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=job.base_url, api_key="none", max_retries=MAX_RETRIES) as client:

        async def send(texts: Sequence[str]) -> Any:
            answer = await client.embeddings.with_raw_response.create(
                input=list(texts), encoding_format="base64", **arguments(job)
            )
            items = jiter.from_json(answer.content, cache_mode="keys")["data"]
            items.sort(key=itemgetter("index"))
            return float32_rows((item["embedding"] for item in items), len(texts), job.expected_dimensions)

        yield lambda texts: in_chunks(texts, job, send)
