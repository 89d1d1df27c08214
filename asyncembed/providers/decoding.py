"""Decodes a reply to float32[n, d] while it is read, and validates it completely. Pure.

A reply is megabytes of vectors in a few kilobytes of JSON. `Decoder` moves each vector to a row and puts a placeholder
into the JSON instead. The JSON is parsed at the end, and maps placeholders to texts. So memory never holds the whole
reply or one Python object per number, and no step is long: a piece of 64 kB takes 0.05 ms in base64, 0.2 ms in numbers.
"""

from __future__ import annotations

import binascii
import mmap
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import jiter
import numpy as np
import pybase64

from ..errors import ProtocolError
from ..types import Reply, Vectors, check_finite

# A quote inside a JSON string is escaped, so this matches keys only. A vector after more blanks, or whose key is
# spelled with escapes, is not moved but parsed with the JSON.
_VECTOR = re.compile(rb'"embedding"\s{0,16}:\s{0,16}(["\[])')
_LONGEST_KEY = len('"embedding":"') + 2 * 16
_QUOTE = ord('"')

RawVector: TypeAlias = bytes | memoryview  # a vector as it is spelled in the reply

# Up to this many surplus vectors are moved, too, in case some are in unexpected places. Others are left in the JSON.
_STRAY = 16
# The characters of numbers. NaN and Infinity are included, to be refused with their own error; null, true and strings
# need other characters.
_NUMBERS = b"0123456789+-.eE, \t\r\n[]NaInfity"

# The most that is decoded in one step; then other tasks may run. Longest stall of a bulk job with eight connections:
# 8 ms with 64 kB, 11 ms with 128 kB, 12 ms with 256 kB, which asyncio reads at once; CPU: 0.51, 0.48 and 0.50 s
# (12 rounds by turns, medians, 2026-11).
PIECE_BYTES = 64 * 1024

BYTES_PER_NUMBER = 26  # in JSON: sign, 17 digits, point, exponent and comma; in base64 a number has 16/3 bytes
# Generous bounds for keys, index and object of one item, and for usage, model and spaces around all items.
BYTES_PER_ITEM = 512
BYTES_PER_REPLY = 64 * 1024
MOST_TOKENS = 10**9  # no request of 2,048 texts bills more; a larger number is nonsense, and would spoil the sum
MAX_DIMENSIONS = 16_384  # while a model's are unknown; the largest vectors seen in the field have 8,192 numbers
_LARGE_BYTES = 1024 * 1024  # larger arrays get memory that returns to the system; allocating it takes microseconds


def most_bytes(count: int, dimensions: int | None) -> int:
    """Return the most bytes that a valid reply to `count` texts can have. A longer one is not read to its end."""
    return BYTES_PER_REPLY + count * (BYTES_PER_ITEM + (dimensions or MAX_DIMENSIONS) * BYTES_PER_NUMBER)


def decode(body: bytes, count: int, dimensions: int | None) -> Reply:
    """Decode a whole reply."""
    decoder = Decoder(count, dimensions)
    for start in range(0, len(body), PIECE_BYTES):
        decoder.feed(body[start : start + PIECE_BYTES])
    return decoder.finish()


class Decoder:
    """Decodes the reply to `count` texts piece by piece, and returns its vectors in the order of the texts.

    Accepts base64 and numbers, in any order of `index`. Without any `index` the order of the items counts. If
    `dimensions` is None the first vector sets the size of all.
    """

    def __init__(self, count: int, dimensions: int | None) -> None:
        self.size = 0  # bytes fed so far
        self.most_bytes = most_bytes(count, dimensions)
        self._count = count
        self._dimensions = dimensions
        self._unread = bytearray()
        self._searched = 0  # the bytes of `unread` known not to hold the end of the vector at its beginning
        self._rest = bytearray()  # the JSON, with a placeholder for every vector
        self._found = 0
        self._vectors: Vectors | None = None  # row i is the i-th vector that was found, unless it is in `aside`
        self._aside: dict[int, Vectors | str] = {}  # by number, a vector without a row, or why one is malformed

    def feed(self, piece: bytes | memoryview) -> None:
        """Decode the next bytes of the reply. Errors are reported by `finish`."""
        self.size += len(piece)
        self._unread += piece
        unread = memoryview(self._unread)  # slices of it are not copies
        done, begun = self._move_vectors(unread)
        kept = max(done, len(unread) - _LONGEST_KEY) if begun is None else begun
        self._rest += unread[done:kept]
        # a new object: a profiler that keeps our frames keeps views of this one, which then cannot be resized
        self._unread = self._unread[kept:]
        self._searched = 0 if begun is None else len(self._unread)

    def _move_vectors(self, unread: memoryview) -> tuple[int, int | None]:
        """Move whole vectors out of `unread`; return where the last one ends, and where an incomplete one begins."""
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
            # cannot be taken for a vector: base64 has no blanks
            self._rest += b'"vector %d"' % (self._found + len(texts))
            if in_base64:
                texts.append(unread[start:stop])
            else:
                self._take_texts(texts)
                texts = []
                self._take(_from_numbers, unread[start:stop])
            done = stop + 1
            self._searched = 0
        self._take_texts(texts)
        return done, begun

    def _take_texts(self, texts: Sequence[memoryview]) -> None:
        """Decode the next vectors in base64, at once if their lengths are equal, which takes a quarter less time."""
        end = self._found + len(texts)
        if len(texts) > 1 and end <= self._count and self._vectors is not None:
            rows = _from_equal_texts(texts)
            if rows is not None and rows.shape[1] == self._vectors.shape[1]:
                self._vectors[self._found : end] = rows
                self._found = end
                return
        for text in texts:
            self._take(_from_base64, text)

    def _take(self, read: Callable[[RawVector], Vectors], text: RawVector) -> None:
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
        """Return the reply, after all of its bytes were fed.

        Raises:
            ProtocolError: Count, index, dimensions or numbers are wrong. The message names what was expected and what
                was received, and quotes nothing. `tokens` is the number of tokens billed.
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
            but_error = " but `error`" if isinstance(document, dict) and "error" in document else ""
            raise ProtocolError(f"expected an object with a list `data`, got {_kind(document)}{but_error}")
        if len(data) != self._count:
            raise ProtocolError(f"expected {self._count} embeddings, got {len(data)}")
        rows = _order(data)
        vectors = self._in_order(self._numbers(data, rows), rows)
        check_finite(vectors)
        if self._dimensions is None and _are_doubles(vectors):
            raise ProtocolError("expected float32 in base64, got float64")
        model = document.get("model")
        return Reply(vectors, _tokens(document), model=model if isinstance(model, str) else None)

    def _numbers(self, data: list[Any], rows: list[int]) -> list[int]:
        """Return the number of each item's vector, in the order in which vectors were found."""
        names = {f"vector {number}": number for number in range(self._found)}
        numbers = []
        for item, row in zip(data, rows, strict=True):
            value = item.get("embedding")
            if not isinstance(value, str):
                raise ProtocolError(f"expected an embedding, got {_kind(value)} for text {row}")
            number = names.pop(value, None)  # each once, so that no two items share one
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
        # of two values for one key, either may be the wrong one
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


def _from_numbers(text: RawVector) -> Vectors:
    array = b"[" + text + b"]"
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


def _from_base64(text: RawVector) -> Vectors:
    try:
        raw = pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        if b"\\" in bytes(text):  # "/" may be written as "\/"
            value = str(_parse(b'"%b"' % bytes(text), len(text)))
            return _from_base64(value.replace("\\", "?").encode(errors="replace"))
        raise ProtocolError("expected base64, got something else") from None
    if not raw or len(raw) % 4:
        raise ProtocolError(f"expected whole float32 numbers, got {len(raw)} bytes")
    return np.frombuffer(raw, "<f4")


def _from_equal_texts(texts: Sequence[memoryview]) -> Vectors | None:
    """Return float32[n, d], or None unless all texts have one length, whole numbers, no padding, and only base64."""
    width, *others = {len(text) for text in texts}
    if others or not width or width % 16:
        return None
    try:
        raw = pybase64.b64decode(b"".join(texts), validate=True)
        return np.frombuffer(raw, "<f4").reshape(len(texts), -1)
    except (binascii.Error, ValueError):
        return None  # decoding them one by one reports which is wrong


def _are_doubles(vectors: Vectors) -> bool:
    # vLLM 0.5.3 sent float64 (vllm issue 5734): twice the numbers, half of them nonsense. They were widened from
    # float32, so all but the three highest bits of each low half are zero. As a float32 that is 0, 2, 1e-19 or 4e19,
    # of either sign, which no embedding has in every other place.
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


def _room_for(count: int, dimensions: int) -> Vectors:
    """Return float32[count, dimensions] with any values. Large arrays return their memory when they are freed.

    malloc would keep it: after the first free of some megabytes it takes such blocks from its heap, which small
    objects then keep from shrinking. A stream of 500,000 texts grew by 228 MB instead of 145.
    """
    size = 4 * count * dimensions
    if size < _LARGE_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return np.empty((count, dimensions), np.float32)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(count, dimensions)
