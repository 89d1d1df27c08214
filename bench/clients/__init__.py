"""The clients that are measured, each used as its documentation says, with its best settings."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bench.job import Open


@dataclass(frozen=True, slots=True)
class Client:
    """One library, or one way to use it.

    Attributes:
        title: The name in tables.
        opener: `module:function` in this package; the function is a `job.Open`.
        imports: The imports of a user, `module:name`, separated by commas.
        environment: Its environment, named after its requirements in `bench/peers`; "" for the current one.
        distribution: The distribution whose version is reported; "" for the standard library.
        gives_vectors: Whether rows can be checked; else they are only counted.
        is_lazy: Whether the texts are made while it reads them.
    """

    title: str
    opener: str
    imports: str
    distribution: str = ""
    environment: str = ""
    gives_vectors: bool = True
    is_lazy: bool = False

    @property
    def is_peer(self) -> bool:
        return self.opener.startswith(("sdk:", "peers:"))

    def load(self) -> Open:
        module, _, name = self.opener.partition(":")
        opener: Open = getattr(import_module(f"bench.clients.{module}"), name)
        return opener


def _ours(title: str, opener: str, **options: Any) -> Client:
    return Client(title, opener, "asyncembed:Embedder", "asyncembed", **options)


def _peer(title: str, opener: str, imports: str, distribution: str, **options: Any) -> Client:
    return Client(title, f"peers:{opener}", imports, distribution, **options)


def _part(title: str, opener: str, distribution: str = "asyncembed") -> Client:
    return Client(title, opener, "asyncembed:Embedder", distribution, gives_vectors=False)


CLIENTS = {
    "floor": Client("the bytes off the socket", "floor:floor", "socket", gives_vectors=False),
    "asyncembed": _ours("**asyncembed**", "ours:with_fast"),
    "asyncembed-tiktoken": _ours("asyncembed without `fast`: tiktoken", "ours:with_tiktoken"),
    "asyncembed-bytes": _ours("asyncembed without any vocabulary", "ours:without_vocabulary"),
    "asyncembed-20k": _ours("asyncembed, 20,000 texts only", "ours:with_fast"),
    "stream": _ours("`stream`", "ours:streamed", gives_vectors=False, is_lazy=True),
    "ingest-sqlite": _ours("`ingest` into SQLite", "ours:into_sqlite", gives_vectors=False, is_lazy=True),
    "ingest-postgres": _ours("`ingest` into PostgreSQL", "ours:into_postgres", gives_vectors=False, is_lazy=True),
    "openai": Client("AsyncOpenAI, as documented", "sdk:documented", "openai:AsyncOpenAI", "openai"),
    "openai-raw": Client("AsyncOpenAI, raw responses", "sdk:raw", "openai:AsyncOpenAI", "openai"),
    "baseten": _peer(
        "Baseten's client (Rust), base64",
        "baseten",
        "baseten_performance_client:PerformanceClient",
        "baseten-performance-client",
        environment="baseten",
    ),
    "baseten-arrays": _peer(
        "Baseten's client (Rust), as documented",
        "baseten_arrays",
        "baseten_performance_client:PerformanceClient",
        "baseten-performance-client",
        environment="baseten",
    ),
    "openaivec": _peer(
        "openaivec", "openaivec", "openaivec:AsyncBatchEmbeddings", "openaivec", environment="openaivec"
    ),
    "llama-index": _peer(
        "LlamaIndex",
        "llama_index",
        "llama_index.embeddings.openai:OpenAIEmbedding",
        "llama-index-embeddings-openai",
        environment="llama-index",
    ),
    "langchain": _peer(
        "LangChain", "langchain", "langchain_openai:OpenAIEmbeddings", "langchain-openai", environment="langchain"
    ),
    "langchain-unchecked": _peer(
        "LangChain, lengths unchecked",
        "langchain_unchecked",
        "langchain_openai:OpenAIEmbeddings",
        "langchain-openai",
        environment="langchain",
    ),
    "haystack": _peer(
        "Haystack",
        "haystack",
        "haystack.components.embedders:OpenAIDocumentEmbedder",
        "haystack-ai",
        environment="haystack",
    ),
    "litellm": _peer("LiteLLM", "litellm", "litellm:aembedding", "litellm", environment="litellm"),
    "count-fast": _part("`fast`: toktok", "parts:count_fast", "toktok-rs"),
    "count-tiktoken": _part("tiktoken", "parts:count_tiktoken", "tiktoken"),
    "count-bytes": _part("the bound by bytes", "parts:count_bytes"),
    "pack": _part("**asyncembed**: `Packer`", "parts:packed"),
    "pack-greedy": _part("a loop that starts a new batch when one is full", "parts:packed_greedily", ""),
    "decode": _part("**asyncembed**", "parts:decoded"),
    "decode-jiter": _part("jiter and pybase64, unchecked", "parts:decoded_by_jiter", "jiter"),
    "decode-json": _part("json and base64, unchecked", "parts:decoded_by_json", ""),
    "sqlite": _part("**asyncembed**: SQLiteSink", "parts:our_sqlite"),
    "sqlite-bare": _part("sqlite3, executemany", "parts:bare_sqlite", ""),
    "postgres": _part("**asyncembed**: PostgresSink", "parts:our_postgres"),
    "postgres-bare": _part("asyncpg, executemany, binary", "parts:bare_postgres", "asyncpg"),
    "import-bare": Client("`import asyncembed` alone", "", "asyncembed", "asyncembed"),
    "import-numpy": Client("`import numpy, asyncio`", "", "numpy,asyncio", "numpy"),
}
