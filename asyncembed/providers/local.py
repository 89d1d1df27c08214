"""Embeds with a model that runs in this process, without key or network. The only module that imports `wordllama`.

The extra `local` installs its 16 MB of weights. A vector is the mean of the vectors of the text's tokens, at unit
length. All work is done in a thread.
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

# The sizes to which vectors of l2_supercat can be cut (wordllama's README, read 2026-11).
DIMENSIONS = (64, 128, 256)

_ROWS_AT_ONCE = 16_384  # added up at once: 16 MB, so that a batch of long texts needs no more memory


class LocalProvider:
    """Embeds on this machine, in a thread. No text is sent anywhere.

    The first use in a process reads the weights. That takes a quarter of a second in a thread, and the tokenizer
    holds the GIL for about 50 ms of it.

    Args:
        dimensions: 64, 128 or 256; None for 256.

    Raises:
        ConfigError: The extra `local` is not installed, or the model has no vectors of this size.
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

        Vectors have unit length, except that a text without tokens gets zeros.
        """
        return await asyncio.to_thread(self._embed, texts)

    def _embed(self, texts: Sequence[str]) -> Reply:
        ids = [np.array(encoding.ids, np.int64) for encoding in _encode(texts)]
        vectors = np.stack([_mean(_model().embedding, row)[: self._dimensions] for row in ids])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, norms, out=vectors, where=norms > 0)
        return Reply(vectors, sum(map(len, ids)))

    async def aclose(self) -> None:
        """Do nothing: nothing is open."""


class LocalCounter:
    """Counts the tokens of the local model, and cuts texts by them."""

    exact = True

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text. Blocks, so call it in a thread."""
        return [len(encoding.ids) for encoding in _encode(texts)]

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the beginning of the text with at most `max_tokens` tokens, but at least one character. Blocks."""
        offsets = _encode([text])[0].offsets
        if len(offsets) <= max_tokens:
            return text
        # a character may have several tokens, and a piece by itself begins with an additional token
        return text[: offsets[max(max_tokens - 1, 0)][0]] or text[:1]


def _mean(embedding: Vectors, ids: Any) -> Vectors:
    total = np.zeros(embedding.shape[1], np.float32)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        total += embedding[ids[start : start + _ROWS_AT_ONCE]].sum(axis=0)
    return total / np.float32(max(1, len(ids)))


def _encode(texts: Sequence[str]) -> Any:
    # `encode`, for one text, would hold the GIL: half a second for a megabyte
    return _model().tokenizer.encode_batch(list(texts), add_special_tokens=False)


_loading = threading.Lock()


def _model() -> Any:
    with _loading:  # two threads at once would read 16 MB twice
        return _load()


@lru_cache(maxsize=1)
def _load() -> Any:
    # wordllama changes the level and the handlers of the root logger when it is imported
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        wordllama = importlib.import_module("wordllama")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    # its loader looks for the tokenizer only in the cache folder; weights and tokenizer are both in the package
    folder = Path(str(wordllama.__file__)).parent
    model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    model.tokenizer.no_padding()  # 64 texts padded to 8,192 tokens would take half a gigabyte
    return model
