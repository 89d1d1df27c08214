"""Other libraries that batch for their users. Each runs in its own environment, without our dependencies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.clients.chunks import MAX_INPUTS, float32_rows, in_chunks
from bench.clients.sdk import MAX_RETRIES
from bench.job import Embed, Job


@asynccontextmanager
async def langchain(job: Job) -> AsyncIterator[Embed]:
    """The default: counts tokens with tiktoken and sends token ids, one request after the other."""
    yield _langchain(job, check_embedding_ctx_length=True)


@asynccontextmanager
async def langchain_unchecked(job: Job) -> AsyncIterator[Embed]:
    """Sends the texts without checking their lengths."""
    yield _langchain(job, check_embedding_ctx_length=False)


def _langchain(job: Job, *, check_embedding_ctx_length: bool) -> Embed:
    from langchain_openai import OpenAIEmbeddings

    embedder = OpenAIEmbeddings(
        model=job.model,
        dimensions=job.dimensions,
        base_url=job.base_url,
        api_key="none",
        max_retries=MAX_RETRIES,
        chunk_size=job.batch or MAX_INPUTS,
        check_embedding_ctx_length=check_embedding_ctx_length,
    )
    return lambda texts: embedder.aembed_documents(list(texts))


@asynccontextmanager
async def llama_index(job: Job) -> AsyncIterator[Embed]:
    from llama_index.embeddings.openai import OpenAIEmbedding

    embedder = OpenAIEmbedding(
        model=job.model,
        dimensions=job.dimensions,
        api_base=job.base_url,
        api_key="none",
        max_retries=MAX_RETRIES,
        embed_batch_size=job.batch or MAX_INPUTS,
        num_workers=job.concurrency,
    )
    yield lambda texts: embedder.aget_text_embedding_batch(list(texts))


@asynccontextmanager
async def litellm(job: Job) -> AsyncIterator[Embed]:
    """`aembedding` does not batch, so chunks and a semaphore are added as for the SDK."""
    from litellm import aembedding

    async def send(texts: Sequence[str]) -> list[list[float]]:
        answer = await aembedding(
            model=f"openai/{job.model}",
            input=list(texts),
            dimensions=job.dimensions,
            api_base=job.base_url,
            api_key="none",
            max_retries=MAX_RETRIES,
        )
        return [item["embedding"] for item in answer.data]

    yield lambda texts: in_chunks(texts, job, send)


@asynccontextmanager
async def openaivec(job: Job) -> AsyncIterator[Embed]:
    from openai import AsyncOpenAI
    from openaivec import AsyncBatchEmbeddings

    async with AsyncOpenAI(base_url=job.base_url, api_key="none", max_retries=MAX_RETRIES) as client:
        options = {"dimensions": job.dimensions} if job.dimensions else {}
        embedder = AsyncBatchEmbeddings.of(
            client, job.model, batch_size=job.batch or MAX_INPUTS, max_concurrency=job.concurrency, **options
        )
        yield lambda texts: embedder.create(list(texts))


@asynccontextmanager
async def haystack(job: Job) -> AsyncIterator[Embed]:
    """Sends one request after the other, its default."""
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder
    from haystack.utils import Secret

    embedder = OpenAIDocumentEmbedder(
        api_key=Secret.from_token("none"),
        model=job.model,
        dimensions=job.dimensions,
        api_base_url=job.base_url,
        batch_size=job.batch or MAX_INPUTS,
        max_retries=MAX_RETRIES,
        progress_bar=False,
        raise_on_failure=True,
    )

    async def embed(texts: Sequence[str]) -> list[Any]:
        answer = await embedder.run_async([Document(content=text) for text in texts])
        return [document.embedding for document in answer["documents"]]

    yield embed
    await embedder.close_async()


@asynccontextmanager
async def baseten(job: Job) -> AsyncIterator[Embed]:
    """Requests base64 and decodes it here, since the client does not: three times as fast as its arrays."""
    client, preference = _baseten(job)

    async def embed(texts: Sequence[str]) -> Any:
        answer = await client.async_embed(
            list(texts), job.model, encoding_format="base64", dimensions=job.dimensions, preference=preference
        )
        return float32_rows((item.embedding for item in answer.data), len(texts), job.expected_dimensions)

    yield embed


@asynccontextmanager
async def baseten_arrays(job: Job) -> AsyncIterator[Embed]:
    """As documented: `numpy()` of an answer in numbers."""
    client, preference = _baseten(job)

    async def embed(texts: Sequence[str]) -> Any:
        answer = await client.async_embed(list(texts), job.model, dimensions=job.dimensions, preference=preference)
        return answer.numpy()

    yield embed


def _baseten(job: Job) -> tuple[Any, Any]:
    from baseten_performance_client import PerformanceClient, RequestProcessingPreference

    preference = RequestProcessingPreference(
        batch_size=min(job.batch or MAX_INPUTS, 1_024),  # the most it allows
        max_concurrent_requests=job.concurrency,
        max_chars_per_request=1_048_576,  # the most it allows; its default of 8,000 makes 1,400 requests
        max_retries=6,  # the most it allows
    )
    return PerformanceClient(base_url=job.base_url.removesuffix("/v1"), api_key="none"), preference
