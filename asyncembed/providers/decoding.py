"""Reply bytes to float32[n, d], trusting nothing. Pure; a reply is decoded while it is still being read.

A reply is megabytes of vectors in a few kilobytes of JSON. `Decoder` takes the vectors out as they go by, each into a
row of its own, and leaves their names in their places; what remains is parsed at the end, and tells which vector is
whose. So neither the reply's text nor a Python object for each number is ever in memory, and no step takes longer than
its piece is long: one of 128 kB takes 0.1 ms in base64 and 0.5 ms in numbers.
"""

from __future__ import annotations

import binascii
import mmap
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import jiter
import numpy as np
import pybase64

from ..errors import ProtocolError
from ..types import Reply, Vectors, check_finite

# A quote inside a JSON string is escaped, so this matches keys only. A vector with more blanks before it than
# these, or with its key in escapes, is not taken out but parsed with the rest.
_VECTOR = re.compile(rb'"embedding"\s{0,16}:\s{0,16}(["\[])')
_LONGEST_KEY = len('"embedding":"') + 2 * 16
_QUOTE = ord('"')
# So many more vectors than texts are taken out, in case some stand where none is looked for; a flood of them is not.
_STRAY = 16
# All that numbers are spelled with, NaN and Infinity included, which are then refused by their own name; no null,
# true or string can be written with these.
_NUMBERS = b"0123456789+-.eE, \t\r\n[]NaInfity"

# How much is read and decoded in one go. Eight connections take 2 ms of a turn of the loop. Measured with bulk jobs,
# 2026-11: with 64 kB they take 6 % more CPU, with 256 kB no less, and the turns are twice as long.
PIECE_BYTES = 128 * 1024

# What a number may need as JSON text: sign, 17 digits, point, exponent and comma. Four bytes need 16/3 in base64.
BYTES_PER_NUMBER = 26
# Keys, index and object of one item, and usage, model and spaces around all of them, generously.
BYTES_PER_ITEM = 512
BYTES_PER_REPLY = 64 * 1024
# No request of 2,048 texts bills more; what is beyond is nonsense, and would make nonsense of the sum.
MOST_TOKENS = 10**9
# The largest vectors seen in the field have 8,192 numbers; the cap while a model's dimensions are not known.
MAX_DIMENSIONS = 16_384

# Above this, vectors get memory that goes back to the system when they are let go; making that takes some microseconds.
_LARGE_BYTES = 1024 * 1024


def most_bytes(count: int, dimensions: int | None) -> int:
    """Return how long a reply to `count` texts can be at most; what is longer is not read to its end."""
    return BYTES_PER_REPLY + count * (BYTES_PER_ITEM + (dimensions or MAX_DIMENSIONS) * BYTES_PER_NUMBER)


def decode(body: bytes, count: int, dimensions: int | None) -> Reply:
    """Return what a `Decoder` makes of a whole reply."""
    decoder = Decoder(count, dimensions)
    for start in range(0, len(body), PIECE_BYTES):
        decoder.feed(body[start : start + PIECE_BYTES])
    return decoder.finish()


class Decoder:
    """Takes a reply piece by piece; at its end gives the vectors in the order of the texts that were sent.

    Takes base64 and numbers, whichever was asked for, in any order of `index`; without any `index`, in the order
    they stand in.

    Args:
        count: How many texts were sent.
        dimensions: The size each vector must have; None if the first one may tell.
    """

    def __init__(self, count: int, dimensions: int | None) -> None:
        self.size = 0
        """Bytes taken so far."""
        self.most_bytes = most_bytes(count, dimensions)
        self._count = count
        self._dimensions = dimensions
        self._unread = bytearray()
        self._searched = 0
        """So much of `unread` does not hold the end of the vector which it begins with."""
        self._rest = bytearray()
        """The document, with a name in the place of every vector."""
        self._found = 0
        self._vectors: Vectors | None = None
        """Row i is the i-th vector that was found, but for those aside."""
        self._aside: dict[int, Vectors | str] = {}
        """Those that have no row, or what is wrong with them."""

    def feed(self, piece: bytes | memoryview) -> None:
        """Take the next bytes of the reply; what is wrong with them is said at the end."""
        self.size += len(piece)
        self._unread += piece
        with memoryview(self._unread) as unread:  # of which parts are no copies
            done, begun = self._take_out(unread)
            kept = max(done, len(unread) - _LONGEST_KEY) if begun is None else begun
            self._rest += unread[done:kept]
        del self._unread[:kept]
        self._searched = 0 if begun is None else len(self._unread)

    def _take_out(self, unread: memoryview) -> tuple[int, int | None]:
        """Take the vectors out of what is unread; return where the last one ends, and where one begins that does not.

        As far as that the rest is told.
        """
        texts: list[memoryview] = []
        done, begun = 0, None
        while self._found + len(texts) < self._count + _STRAY and (key := _VECTOR.search(self._unread, done)):
            start = key.end()
            in_base64 = unread[start - 1] == _QUOTE
            stop = self._unread.find(b'"' if in_base64 else b"]", max(start, self._searched))
            if stop < 0:
                begun = key.start()
                break
            self._rest += unread[done : start - 1]
            self._rest += b'"vector %d"' % (self._found + len(texts))  # a blank is no base64: no vector is spelled so
            if in_base64:
                texts.append(unread[start:stop])
            else:
                self._take_texts(texts)
                texts = []
                self._take(_from_numbers, b"[" + unread[start:stop] + b"]")
            done = stop + 1
            self._searched = 0
        self._take_texts(texts)
        return done, begun

    def _take_texts(self, texts: Sequence[memoryview]) -> None:
        """Decode the next vectors, together if that is the same: it takes half the time."""
        end = self._found + len(texts)
        if len(texts) > 1 and end <= self._count and self._vectors is not None:
            rows = _from_equal_texts(texts)
            if rows is not None and rows.shape[1] == self._vectors.shape[1]:
                self._vectors[self._found : end] = rows
                self._found = end
                return
        for text in texts:
            self._take(_from_base64, bytes(text))

    def _take(self, read: Callable[[bytes], Vectors], text: bytes) -> None:
        number = self._found
        self._found += 1
        try:
            vector = read(text)
        except ProtocolError as error:
            self._aside[number] = str(error)
            return
        if self._vectors is None:
            if self._dimensions is None and not 0 < len(vector) <= MAX_DIMENSIONS:
                self._aside[number] = f"expected 1 to {MAX_DIMENSIONS:,} dimensions, got {len(vector):,}"
                return
            self._vectors = _room_for(self._count, self._dimensions or len(vector))
        if number < self._count and len(vector) == self._vectors.shape[1]:
            self._vectors[number] = vector
        else:
            self._aside[number] = vector

    def finish(self) -> Reply:
        """Return the reply, of which all has been fed.

        Raises:
            ProtocolError: Count, index, dimension or numbers are not what was asked for. The message names expected
                and got, and never what the reply says.
        """
        document = _parse(bytes(self._rest + self._unread), self.size)
        try:
            return self._reply(document)
        except ProtocolError as error:
            error.tokens = (_tokens(document) if isinstance(document, dict) else None) or 0
            raise

    def _reply(self, document: Any) -> Reply:
        data = document.get("data") if isinstance(document, dict) else None
        if not isinstance(data, list):
            raise ProtocolError(f"expected an object with a list `data`, got {_kind(document)}{_error_in(document)}")
        if len(data) != self._count:
            raise ProtocolError(f"expected {self._count} embeddings, got {len(data)}")
        rows = _order(data)
        vectors = self._in_order(self._numbers(data, rows), rows)
        _check_numbers(vectors, guessed=self._dimensions is None)
        model = document.get("model")
        return Reply(vectors, _tokens(document), model=model if isinstance(model, str) else None)

    def _numbers(self, data: list[Any], rows: list[int]) -> list[int]:
        """Return which of the vectors that were found is each item's."""
        names = {f"vector {number}": number for number in range(self._found)}
        numbers = []
        for item, row in zip(data, rows, strict=True):
            value = item.get("embedding")
            if not isinstance(value, str):
                raise ProtocolError(f"expected an embedding, got {_kind(value)} for text {row}")
            number = names.pop(value, None)  # once each: no two items have the same
            if number is None:
                number = self._found
                self._take(_from_base64, value.encode(errors="replace"))
            numbers.append(number)
        return numbers

    def _in_order(self, numbers: list[int], rows: list[int]) -> Vectors:
        if not numbers:
            raise ProtocolError("expected embeddings, got none")
        if self._vectors is not None and not self._aside and numbers == rows == list(range(len(rows))):
            return self._vectors
        vectors: Vectors | None = None
        for number, row in zip(numbers, rows, strict=True):
            vector = self._aside[number] if number in self._aside or self._vectors is None else self._vectors[number]
            if isinstance(vector, str):
                raise ProtocolError(f"{vector} for text {row}")
            if vectors is None:
                vectors = _room_for(self._count, self._dimensions or len(vector))
            if len(vector) != vectors.shape[1]:
                raise ProtocolError(f"expected {vectors.shape[1]} dimensions, got {len(vector)} for text {row}")
            vectors[row] = vector
        assert vectors is not None
        return vectors


def _parse(text: bytes, size: int) -> Any:
    try:
        # two values for one key: whichever is taken may be the wrong one
        return jiter.from_json(text, cache_mode="keys", catch_duplicate_keys=True)
    except (ValueError, RecursionError) as error:
        # from None: the message may quote the reply
        raise ProtocolError(f"expected JSON, got {size:,} bytes that are not ({type(error).__name__})") from None


def _order(data: list[Any]) -> list[int]:
    for position, item in enumerate(data):
        if not isinstance(item, dict):
            raise ProtocolError(f"expected objects in `data`, got {_kind(item)} at position {position}")
    indices = [item.get("index") for item in data]
    if all(index is None for index in indices):
        return list(range(len(data)))
    if any(type(index) is not int for index in indices) or sorted(indices) != list(range(len(data))):
        raise ProtocolError(f"expected each `index` from 0 to {len(data) - 1} once, got something else")
    return indices


def _from_numbers(array: bytes) -> Vectors:
    if array.translate(None, delete=_NUMBERS):
        raise ProtocolError("expected numbers, got something else among them")
    try:
        with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused
            vector = np.array(_parse(array, len(array)), np.float64).astype(np.float32)
    except (OverflowError, ValueError):
        raise ProtocolError("expected numbers, got one of hundreds of digits, or lists of them") from None
    if vector.ndim != 1:
        raise ProtocolError("expected numbers, got lists of them")
    return vector


def _from_base64(text: bytes) -> Vectors:
    try:
        raw = pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        if b"\\" in text:  # "/" may be written as "\/"
            return _from_base64(_unescaped(text))
        raise ProtocolError("expected base64, got something else") from None
    if not raw or len(raw) % 4:
        raise ProtocolError(f"expected whole float32 numbers, got {len(raw)} bytes")
    return np.frombuffer(raw, "<f4")


def _from_equal_texts(texts: Sequence[memoryview]) -> Vectors | None:
    """Return the vectors, float32[n, d], if all texts are as long and end where numbers do, without padding."""
    width, *others = {len(text) for text in texts}
    if others or not width or width % 16:
        return None
    try:
        raw = pybase64.b64decode(b"".join(texts), validate=True)
        return np.frombuffer(raw, "<f4").reshape(len(texts), -1)
    except (binascii.Error, ValueError):
        return None  # one by one it will be said which of them


def _unescaped(text: bytes) -> bytes:
    value = _parse(b'"%b"' % text, len(text))
    return str(value).replace("\\", "?").encode(errors="replace")


def _check_numbers(vectors: Vectors, *, guessed: bool) -> None:
    check_finite(vectors)
    if guessed and _are_doubles(vectors):
        raise ProtocolError("expected float32 in base64, got float64")


def _are_doubles(vectors: Vectors) -> bool:
    # vLLM 0.5.3 sent float64 (vllm issue 5734): twice the numbers, and half of them nonsense. It had widened them
    # from float32, so the low half of each is empty but for its three highest bits. As a float32 that is 0, 2, 1e-19
    # or 4e19, of either sign: no embedding has that in every other place.
    low_halves = vectors[0, ::2].view(np.uint32)
    return bool(np.count_nonzero(low_halves) >= 8 and not np.any(low_halves & 0x1FFF_FFFF))


def _tokens(document: dict[str, Any]) -> int | None:
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return None
    for key in ("total_tokens", "prompt_tokens"):
        tokens = usage.get(key)
        if type(tokens) is int and 0 <= tokens < MOST_TOKENS:
            return tokens
    return None


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "an object without it"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)


def _error_in(document: Any) -> str:
    return " but `error`" if isinstance(document, dict) and "error" in document else ""


def _room_for(count: int, dimensions: int) -> Vectors:
    """Return float32[count, dimensions], of any values; if that is much, its memory goes back to the system with it.

    malloc would keep it: once a block of megabytes was let go, it takes the next ones from a heap that other things
    then keep from shrinking. A stream of 500,000 texts grew by 228 MB in place of 145.
    """
    size = 4 * count * dimensions
    if size < _LARGE_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return np.empty((count, dimensions), np.float32)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(count, dimensions)
