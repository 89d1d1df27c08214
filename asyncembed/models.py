"""Facts about each known model, with source and date, and the defaults for all others.

Limits change (OpenAI's request limit was 600,000 tokens before it was 300,000), so every limit is an option of
`Embedder`; the numbers here are its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

# OpenAI API reference, "Create embeddings", `input`, read 2026-08: "any array must be 2048 dimensions or less",
# "must not exceed the max input tokens for the model (8192 tokens for all embedding models)", "all embedding
# models enforce a maximum of 300,000 tokens summed across all inputs in a single request".
MAX_INPUTS = 2_048
MAX_TOKENS_PER_TEXT = 8_192
MAX_TOKENS_PER_REQUEST = 300_000

# The server does not count the tokens of a request but estimates them as UTF-8 bytes x 0.25 (timescale/pgai issue 728,
# PR 730, measured there against the API). A text therefore weighs max(tokens, ceil(bytes / 4)).
BYTES_PER_ESTIMATED_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Model:
    """The facts about one model.

    Attributes:
        name: The provider's name for it.
        dimensions: The size of its vectors without the option `dimensions`; None if unknown.
        shortens: Whether it accepts the option `dimensions`.
        encoding: Its tokenizer's name in tiktoken; None if unknown: then the number of bytes is the upper bound.
        usd_per_million_tokens: List price; None if unknown.
    """

    name: str
    dimensions: int | None = None
    shortens: bool = True
    encoding: str | None = None
    usd_per_million_tokens: float | None = None


# openai.com/api/pricing and the embeddings guide, read 2026-08 (prices of the synchronous API).
_KNOWN = {
    model.name: model
    for model in (
        Model("text-embedding-3-small", 1_536, encoding="cl100k_base", usd_per_million_tokens=0.02),
        Model("text-embedding-3-large", 3_072, encoding="cl100k_base", usd_per_million_tokens=0.13),
        Model("text-embedding-ada-002", 1_536, False, encoding="cl100k_base", usd_per_million_tokens=0.10),
        # wordllama l2_supercat_256, inside the wheel; it runs on this machine, so it costs nothing.
        Model("local", 256, usd_per_million_tokens=0.0),
    )
}


def lookup(name: str) -> Model:
    """Return the facts about a model; for an unknown name a `Model` without any."""
    return _KNOWN.get(name) or Model(name)
