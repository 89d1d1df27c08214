"""Turns the texts of a call into inputs of requests: counts their tokens, and cuts long texts into pieces.

Pure, but blocking: `prepare_inputs` is called in a thread for one portion of texts at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import AsyncEmbedError, TooLongError
from ..types import Vectors
from .packing import Limits, weigh
from .tokens import MAX_BYTES_PER_TOKEN, TokenCounter

# The texts that are counted at once in a thread: 10 ms of tiktoken, which releases the GIL meanwhile.
PORTION_TEXTS = 512
PORTION_CHARACTERS = 512 * 1024

TooLong: TypeAlias = Literal["error", "truncate", "mean"]


@dataclass(slots=True, eq=False)
class Text:
    """One text of a call, and its positions in the call's input.

    A text that is not cut into pieces is itself the input of a request. A second object for each text would cost time,
    mainly in the garbage collector.
    """

    content: str = field(repr=False)
    indices: Sequence[int]
    pieces: PooledPieces | None = None
    """The pooled vectors of its pieces so far; None if it was not cut."""
    tokens: int = 0
    weight: int = 0

    @property
    def text(self) -> Text:
        """The text that this input belongs to, as in `Piece`: itself."""
        return self


@dataclass(slots=True, eq=False)
class Piece:
    """A part of a long text, as an input of a request."""

    text: Text
    content: str = field(repr=False)
    tokens: int
    weight: int


Input: TypeAlias = Text | Piece
"""One input of a request."""


@dataclass(slots=True, eq=False)
class PooledPieces:
    """Mean pooling of a long text's pieces: the mean of their vectors, weighted by tokens, at unit length.

    The sum is in float64, so the result does not depend on the order of the pieces.
    """

    missing: int
    total: npt.NDArray[np.float64] | None = None
    error: AsyncEmbedError | None = None

    def add(self, vector: Vectors, tokens: int) -> None:
        """Add the vector float32[d] of a piece."""
        weighted = vector.astype(np.float64) * tokens
        self.total = weighted if self.total is None else self.total + weighted
        self.missing -= 1

    def fail(self, error: AsyncEmbedError) -> None:
        """Record that a piece has failed; the first error counts."""
        self.error = self.error or error
        self.missing -= 1

    def vector(self) -> Vectors:
        """Return the mean float32[d]."""
        assert self.total is not None
        norm = np.linalg.norm(self.total) or 1.0  # opposite vectors cancel out
        return (self.total / norm).astype(np.float32)


def portions(texts: Sequence[Text]) -> Iterable[Sequence[Text]]:
    """Cut a sequence into the portions that are counted at once."""
    start = characters = 0
    for end, text in enumerate(texts, start=1):
        characters += len(text.content)
        if end - start >= PORTION_TEXTS or characters >= PORTION_CHARACTERS:
            yield texts[start:end]
            start, characters = end, 0
    if start < len(texts):
        yield texts[start:]


def unique(texts: Iterable[tuple[int, str]], found: dict[str, Text] | None = None) -> list[Text]:
    """Return the different texts, each with all its positions; add them to `found`, which has earlier ones."""
    found = {} if found is None else found
    for index, content in texts:
        text = found.get(content)
        if text is None:
            found[content] = Text(content, (index,))  # a tuple, which the garbage collector does not track
        elif isinstance(text.indices, list):
            text.indices.append(index)
        else:
            text.indices = [*text.indices, index]
    return list(found.values())


def fit_one_request(texts: Sequence[Text], limits: Limits) -> bool:
    """Return whether the texts certainly fit into one request, each within its limit; if so, set their weights.

    A text has at most as many tokens as bytes, and a character at most four bytes: short texts need no tokenizer.
    """
    characters = 0
    for text in texts:
        length = len(text.content)
        characters += length
        if 4 * length > limits.tokens_per_text or 4 * characters > limits.tokens:
            return False
    for text in texts:
        text.tokens = text.weight = _size(text.content)
    return len(texts) <= limits.inputs


def prepare_inputs(
    texts: Sequence[Text], counter: TokenCounter, limits: Limits, too_long: TooLong
) -> tuple[list[Input], list[tuple[Text, AsyncEmbedError]]]:
    """Return the inputs that the texts become, in order, and the texts that are too long, each with its error.

    Tokens are not counted if the number of bytes already shows that a text is too long. If the counter is inexact, a
    text that may be too long is sent unchanged under "error": if the server refuses it, only that text fails. Under
    "truncate" and "mean" it is cut by the upper bound, so its pieces are shorter than they could be.
    """
    inputs: list[Input] = []
    failed: list[tuple[Text, AsyncEmbedError]] = []
    sizes = [_size(text.content) for text in texts]
    most_bytes = limits.tokens_per_text * MAX_BYTES_PER_TOKEN
    countable = [text.content for text, size in zip(texts, sizes, strict=True) if size <= most_bytes]
    counts = iter(counter.count(countable))
    for text, size in zip(texts, sizes, strict=True):
        surely = size > most_bytes
        tokens = -(-size // MAX_BYTES_PER_TOKEN) if surely else next(counts)
        over = tokens > limits.tokens_per_text
        weight = weigh(tokens if counter.exact else min(tokens, limits.tokens_per_text), size)
        least = weight if counter.exact else weigh(0, size)
        if (over or least > limits.tokens) and too_long != "error":
            inputs.extend(_pieces(text, counter, min(limits.tokens_per_text, limits.tokens), too_long))
        elif surely or (over and counter.exact):
            has = f"{'at least ' if surely else ''}{tokens:,} tokens; the model takes"
            failed.append((text, _too_long(has, tokens, limits.tokens_per_text)))
        elif least > limits.tokens:
            failed.append((text, _too_long(f"a weight of {least:,} tokens; a batch takes", least, limits.tokens)))
        else:
            text.tokens, text.weight = tokens, weight
            inputs.append(text)
    return inputs, failed


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _too_long(has: str, tokens: int, limit: int) -> TooLongError:
    advice = 'Split it, or choose too_long="truncate" or "mean"'
    return TooLongError(f"has {has} {limit:,}. {advice}", tokens=tokens, limit=limit)


def _pieces(text: Text, counter: TokenCounter, limit: int, too_long: TooLong) -> Iterator[Piece]:
    pieces, start = list[str](), 0
    while start < len(text.content) and not (pieces and too_long == "truncate"):
        pieces.append(_first_piece(text.content, start, counter, limit))
        start += len(pieces[-1])
    if len(pieces) > 1:
        text.pieces = PooledPieces(missing=len(pieces))
    for piece, tokens in zip(pieces, counter.count(pieces), strict=True):
        yield Piece(text, piece, tokens, weigh(tokens, _size(piece)))


def _first_piece(text: str, start: int, counter: TokenCounter, limit: int) -> str:
    # Tokenizing the whole rest for every piece would take quadratic time, so only a window of it is cut (English has
    # 4 to 5 characters per token). The window is widened if it fits entirely.
    width = limit * 8
    while True:
        window = text[start : start + width]
        piece = counter.cut(window, limit)
        if len(piece) < len(window) or start + width >= len(text):
            return piece
        width *= 2
