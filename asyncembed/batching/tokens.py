"""Count tokens: the exact fast counter if it is installed, else tiktoken, else a proven upper bound.

This module owns `tiktoken` and `toktok`. Counters are blocking and are called in threads: both let go of the
interpreter while they count. Loading tiktoken's vocabulary may download it, so that happens once, in a thread
of its own, and is waited for no longer than LOAD_TIMEOUT_S.
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

# The longest token of cl100k_base and of o200k_base has 128 bytes, and none has fewer than one (counted over
# both vocabularies, 2026-08). So bytes alone decide for very long and for short texts.
MAX_BYTES_PER_TOKEN: Final = 128

# A download of 1.7 MB that takes longer than this is not coming; the bound by bytes serves in its place.
LOAD_TIMEOUT_S: Final = 10.0


class TokenCounter(Protocol):
    """Counts and cuts by tokens; blocking. `<|endoftext|>` and its like are ordinary text."""

    exact: bool
    """False if `count` gives an upper bound."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, in order."""
        ...

    def cut(self, text: str, max_tokens: int) -> str:
        """Return a beginning of the text, at least one character, of at most `max_tokens` tokens."""
        ...


class ByteBound:
    """At most one token a byte: true of every byte-level BPE vocabulary, needs none of them."""

    exact = False

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.encode()) for text in texts]

    def cut(self, text: str, max_tokens: int) -> str:
        return _whole_characters(text, text.encode()[:max_tokens])


class ToktokCounter:
    """The exact counter of the `fast` extra; its vocabularies are inside its wheel."""

    exact = True

    def __init__(self, encoding: str) -> None:
        import toktok

        self._toktok = toktok
        self._encoding = encoding
        toktok.batch_count([""], encoding)  # loads the vocabulary here, not in the first request

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
        except ValueError:  # "stack overflow" of its regex on a run of a million spaces
            middle = len(text) // 2
            return self._count(text[:middle]) + self._count(text[middle:])

    def cut(self, text: str, max_tokens: int) -> str:
        try:
            ids = self._ids(text)
        except ValueError:  # as above; half of such a text is a beginning too
            return self.cut(text[: len(text) // 2], max_tokens)
        return _cut(self, text, max_tokens, lambda n: _whole_characters(text, self._encoding.decode_bytes(ids[:n])))

    def _ids(self, text: str) -> list[int]:
        # not encode_ordinary: on a run of a million spaces that one raises a BaseException (tiktoken 0.14)
        ids: list[int] = self._encoding.encode(text, disallowed_special=())
        return ids


def _whole_characters(text: str, beginning: bytes) -> str:
    return beginning.decode(errors="ignore") or text[:1]


def _cut(counter: TokenCounter, text: str, max_tokens: int, first_tokens: Callable[[int], str]) -> str:
    # A beginning of n tokens may encode to more than n by itself, since its end now splits differently.
    for n in range(max_tokens, 0, -1):
        beginning = first_tokens(n)
        if counter.count([beginning])[0] <= max_tokens:
            return beginning or text[:1]
    return text[:1]


def _load(encoding: str) -> TokenCounter:
    try:
        return ToktokCounter(encoding)
    except (ImportError, KeyError):  # not installed, or a vocabulary it does not have
        return TiktokenCounter(encoding)


@lru_cache(maxsize=8)
def _loading(encoding: str) -> tuple[Future[TokenCounter], float]:
    """Load one vocabulary, once a process, however many wait for it; and until when (monotonic) they shall."""
    future: Future[TokenCounter] = Future()
    future.set_running_or_notify_cancel()  # so that a cancelled waiter cannot cancel it for the others

    def load() -> None:
        try:
            future.set_result(_load(encoding))
        except Exception as error:  # requests', OSError, ValueError: whatever it is, there is no vocabulary
            logger.debug("loading %s failed: %s", encoding, type(error).__name__)
            future.set_result(_no_vocabulary(encoding))

    # A daemon: a download that hangs must not keep the process from ending, as a pool's thread would.
    threading.Thread(target=load, name=f"asyncembed-load-{encoding}", daemon=True).start()
    return future, time.monotonic() + LOAD_TIMEOUT_S


@lru_cache(maxsize=8)
def _no_vocabulary(encoding: str) -> TokenCounter:
    logger.warning(  # once: the cache above remembers
        "no vocabulary for %s: batches are packed by an upper bound of their tokens, so there may be four times "
        'as many requests. Install "asyncembed[fast]", whose wheel carries the vocabulary, or let tiktoken load '
        "it once with a network (TIKTOKEN_CACHE_DIR tells it where to keep it).",
        encoding,
    )
    return ByteBound()


async def load_counter(encoding: str | None) -> TokenCounter:
    """Return the best counter there is for the encoding; never blocks the loop, never fails.

    Args:
        encoding: tiktoken's name of it; None for a model whose tokenizer is not known.
    """
    if encoding is None:
        return ByteBound()
    future, until = _loading(encoding)
    if future.done():
        return future.result()
    try:
        # all wait until the same time: who comes later does not wait for a hanging download anew
        return await asyncio.wait_for(asyncio.wrap_future(future), until - time.monotonic())
    except TimeoutError:
        return _no_vocabulary(encoding)
