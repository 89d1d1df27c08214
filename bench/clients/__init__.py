"""The libraries that are measured, each used as its documents say and tuned to its best."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from bench.job import Open


@dataclass(frozen=True, slots=True)
class Client:
    """One library, or one way to use it.

    Attributes:
        title: Its name in tables.
        opener: `module:function` in this package; the function is a `job.Open`.
        imports: What its user imports.
        environment: The file in `bench/peers` with its requirements, whose environment it runs in; "" for this one.
        most_texts: It is given no more texts than this, because it would take minutes.
    """

    title: str
    opener: str
    imports: str
    environment: str = ""
    most_texts: int | None = None

    def load(self) -> Open:
        module, _, name = self.opener.partition(":")
        opener: Open = getattr(import_module(f"bench.clients.{module}"), name)
        return opener


CLIENTS = {
    "floor": Client("the bytes off the socket", "floor:floor", "socket"),
    "asyncembed": Client("**asyncembed**", "ours:with_fast", "asyncembed"),
    "asyncembed-tiktoken": Client("asyncembed without `fast`: tiktoken", "ours:with_tiktoken", "asyncembed"),
    "asyncembed-bytes": Client("asyncembed without any vocabulary", "ours:without_vocabulary", "asyncembed"),
    "openai": Client("AsyncOpenAI as documented", "sdk:documented", "openai"),
    "openai-raw": Client("AsyncOpenAI, raw responses", "sdk:raw", "openai"),
    "baseten": Client("Baseten's client (Rust), base64", "peers:baseten", "baseten_performance_client", "baseten"),
    "baseten-arrays": Client(
        "Baseten's client (Rust), as documented", "peers:baseten_arrays", "baseten_performance_client", "baseten"
    ),
    "openaivec": Client("openaivec", "peers:openaivec", "openaivec", "openaivec"),
    "llama-index": Client("LlamaIndex", "peers:llama_index", "llama_index.embeddings.openai", "llama-index"),
    "langchain": Client("LangChain", "peers:langchain", "langchain_openai", "langchain"),
    "langchain-unchecked": Client(
        "LangChain, lengths unchecked", "peers:langchain_unchecked", "langchain_openai", "langchain"
    ),
    "haystack": Client("Haystack", "peers:haystack", "haystack.components.embedders", "haystack", 4_096),
    "litellm": Client("LiteLLM", "peers:litellm", "litellm", "litellm", 4_096),
}
