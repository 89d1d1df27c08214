"""The embedded model: real vectors without key or network. The only module that imports `wordllama`.

Its 16 MB of weights come with the extra `local`. A vector is the mean of the vectors of the text's tokens, at unit
length; all work is done in a thread.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..types import ProviderInfo, Reply, Vectors

# The sizes l2_supercat was trained to be cut to (wordllama's README, read 2026-11).
DIMENSIONS = (64, 128, 256)

# Rows gathered at once: 16 MB, so that a batch of long texts needs no more than that.
_ROWS_AT_ONCE = 16_384


class LocalProvider:
    """Embeds on this machine: the loop runs on, and nothing leaves it.

    The first use in a process reads the weights, which takes a quarter of a second in a thread, of which the
    tokenizer keeps the interpreter to itself for about 50 ms.

    Args:
        dimensions: 64, 128 or 256; None for 256.

    Raises:
        ConfigError: The extra `local` is not installed, or the size is none of these.
    """

    def __init__(self, dimensions: int | None = None) -> None:
        if importlib.util.find_spec("wordllama") is None:
            raise ConfigError('the embedded model is not installed: pip install "asyncembed[local]"')
        if dimensions is not None and dimensions not in DIMENSIONS:
            raise ConfigError(f"dimensions={dimensions}; the embedded model has {', '.join(map(str, DIMENSIONS))}")
        self._dimensions = dimensions or DIMENSIONS[-1]

    @property
    def info(self) -> ProviderInfo:
        """The size of the vectors."""
        return ProviderInfo(dimensions=self._dimensions)

    async def embed(self, texts: Sequence[str]) -> Reply:
        """Return the vectors of the texts, float32[n, dimensions], and their number of tokens.

        Each is of unit length; a text without any token would get zeros, which is like nothing at all.
        """
        return await asyncio.to_thread(self._embed, texts)

    def _embed(self, texts: Sequence[str]) -> Reply:
        model = _model()
        ids = [np.array(encoding.ids, np.int64) for encoding in _encode(model, texts)]
        vectors = np.stack([_mean(model.embedding, row)[: self._dimensions] for row in ids])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, norms, out=vectors, where=norms > 0)
        return Reply(vectors, sum(map(len, ids)))

    async def aclose(self) -> None:
        """Nothing is open here."""


class LocalCounter:
    """Counts and cuts by the embedded model's own tokens."""

    exact = True

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text. Blocks: call it in a thread."""
        return [len(encoding.ids) for encoding in _encode(_model(), texts)]

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the beginning of the text that has at most so many tokens; one character at least. Blocks."""
        offsets = _encode(_model(), [text])[0].offsets
        if len(offsets) <= max_tokens:
            return text
        # a character may be several tokens, and a piece by itself begins with one token more
        return text[: offsets[max(max_tokens - 1, 0)][0]] or text[:1]


def _mean(embedding: Vectors, ids: Any) -> Vectors:
    if not len(ids):
        return np.zeros(embedding.shape[1], np.float32)
    total = np.zeros(embedding.shape[1], np.float32)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        total += embedding[ids[start : start + _ROWS_AT_ONCE]].sum(axis=0)
    mean: Vectors = total / np.float32(len(ids))
    return mean


def _encode(model: Any, texts: Sequence[str]) -> Any:
    # `encode`, for one text, would keep the interpreter to itself: half a second for a megabyte
    return model.tokenizer.encode_batch(list(texts), add_special_tokens=False)


_loading = threading.Lock()


def _model() -> Any:
    with _loading:  # two threads that load it at once would read 16 MB twice
        return _load()


@lru_cache(maxsize=1)
def _load() -> Any:
    # On import wordllama sets the root logger's level and handler; whoever runs us has set them as they like.
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        wordllama = importlib.import_module("wordllama")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    # Its loader looks for its own tokenizer in the cache and not beside its weights; both lie in the package.
    folder = Path(str(wordllama.__file__)).parent
    model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    model.tokenizer.no_padding()  # 64 texts padded to one of 8,192 tokens would take half a gigabyte
    return model
