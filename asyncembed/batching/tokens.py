"""Counts tokens: with the fast exact counter if it is installed, else with tiktoken, else by a proven upper bound.

This module owns `tiktoken` and `toktok`. Counters block and are called in threads: both release the GIL while they
count. tiktoken may have to download its vocabulary, so it is loaded once, in its own thread, and waited for no longer
than LOAD_TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, Final, Protocol

logger = logging.getLogger(__name__)

# The tokens of cl100k_base and o200k_base have 1 to 128 bytes (counted over both vocabularies, 2026-08). So for very
# long and for short texts the number of bytes is enough.
MAX_BYTES_PER_TOKEN: Final = 128

# If the download of 1.7 MB takes longer than this, `ByteBound` is used instead.
LOAD_TIMEOUT_S: Final = 10.0


class TokenCounter(Protocol):
    """Counts tokens, and cuts texts by tokens; blocking. Special tokens such as `<|endoftext|>` are ordinary text."""

    exact: bool
    """False if `count` returns an upper bound."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, in order."""
        ...

    def cut(self, text: str, max_tokens: int) -> str:
        """Return a beginning of the text of at most `max_tokens` tokens, but at least one character."""
        ...


class ByteBound:
    """Counts bytes: no byte-level BPE vocabulary needs more than one token per byte. It loads no vocabulary."""

    exact = False

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.encode()) for text in texts]

    def cut(self, text: str, max_tokens: int) -> str:
        return _whole_characters(text, text.encode()[:max_tokens])


class ToktokCounter:
    """The exact counter of the extra `fast`; its wheel contains the vocabularies."""

    exact = True

    def __init__(self, encoding: str) -> None:
        import toktok

        self._toktok = toktok
        self._encoding = encoding
        toktok.batch_count([""], encoding)  # loads the vocabulary now, not in the first request

    def count(self, texts: Sequence[str]) -> list[int]:
        counts: list[int] = self._toktok.batch_count(texts, self._encoding, threads=1)
        return counts

    def cut(self, text: str, max_tokens: int) -> str:
        return _cut(self, text, max_tokens, lambda n: self._toktok.truncate(text, n, self._encoding)[0])


class TiktokenCounter:
    """OpenAI's own tokenizer."""

    exact = True

    def __init__(self, encoding: str) -> None:
        import tiktoken

        self._encoding: Any = tiktoken.get_encoding(encoding)

    def count(self, texts: Sequence[str]) -> list[int]:
        return [self._count(text) for text in texts]

    def _count(self, text: str) -> int:
        try:
            return len(self._ids(text))
        except ValueError:  # its regex has a "stack overflow" on a run of a million spaces
            middle = len(text) // 2
            return self._count(text[:middle]) + self._count(text[middle:])

    def cut(self, text: str, max_tokens: int) -> str:
        try:
            ids = self._ids(text)
        except ValueError:  # as above; a beginning of the first half is a beginning of the text, too
            return self.cut(text[: len(text) // 2], max_tokens)
        return _cut(self, text, max_tokens, lambda n: _whole_characters(text, self._encoding.decode_bytes(ids[:n])))

    def _ids(self, text: str) -> list[int]:
        # not encode_ordinary, which raises a BaseException on a run of a million spaces (tiktoken 0.14)
        ids: list[int] = self._encoding.encode(text, disallowed_special=())
        return ids


def _whole_characters(text: str, beginning: bytes) -> str:
    return beginning.decode(errors="ignore") or text[:1]


def _cut(counter: TokenCounter, text: str, max_tokens: int, first_tokens: Callable[[int], str]) -> str:
    # A beginning of n tokens may encode to more than n by itself, since its end is split differently.
    for n in range(max_tokens, 0, -1):
        beginning = first_tokens(n)
        if counter.count([beginning])[0] <= max_tokens:
            return beginning or text[:1]
    return text[:1]


def _load(encoding: str) -> TokenCounter:
    try:
        return ToktokCounter(encoding)
    except (ImportError, KeyError):  # not installed, or it lacks the vocabulary
        return TiktokenCounter(encoding)


@lru_cache(maxsize=8)
def _loading(encoding: str) -> tuple[Future[TokenCounter], float]:
    """Start to load a vocabulary, once per process; return its future and the monotonic time to wait until."""
    future: Future[TokenCounter] = Future()
    future.set_running_or_notify_cancel()  # so that a cancelled waiter does not cancel it for others

    def load() -> None:
        try:
            future.set_result(_load(encoding))
        except Exception as error:  # OSError, ValueError or an error of `requests`: there is no vocabulary
            logger.debug("loading %s failed: %s", encoding, type(error).__name__)
            future.set_result(_no_vocabulary(encoding))

    # A daemon thread: unlike a pool's thread, it does not keep the process from ending if the download hangs.
    threading.Thread(target=load, name=f"asyncembed-load-{encoding}", daemon=True).start()
    return future, time.monotonic() + LOAD_TIMEOUT_S


@lru_cache(maxsize=8)
def _no_vocabulary(encoding: str) -> TokenCounter:
    logger.warning(  # once, because of lru_cache
        "no vocabulary for %s: batches are packed by an upper bound of their tokens, so there may be four times "
        'as many requests. Install "asyncembed[fast]", whose wheel contains the vocabulary, or let tiktoken download '
        "it once (TIKTOKEN_CACHE_DIR sets the folder in which it is kept).",
        encoding,
    )
    return ByteBound()


async def load_counter(encoding: str | None) -> TokenCounter:
    """Return the best available counter for an encoding of tiktoken. Never blocks the event loop, never fails."""
    if encoding is None:  # the model's tokenizer is unknown
        return ByteBound()
    future, until = _loading(encoding)
    if future.done():
        return future.result()
    try:
        # all callers wait until the same time, so that a later one does not wait for a hanging download again
        return await asyncio.wait_for(asyncio.wrap_future(future), until - time.monotonic())
    except TimeoutError:
        return _no_vocabulary(encoding)
