"""Reply bytes to float32[n, d], trusting nothing. Pure and blocking; large replies are decoded in a thread."""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from time import perf_counter, sleep
from typing import Any

import jiter
import numpy as np
import pybase64

from .errors import ProtocolError
from .types import Reply, Vectors

# Parsing 2,048 vectors of numbers in one go holds the interpreter for 150 ms and makes three million Python floats
# (bench/decode.py). So arrays are taken out of the document and parsed one by one; other threads get their turn in
# between. A quote inside a JSON string is escaped, so this matches keys only.
_ARRAY = re.compile(rb'"embedding"\s*:\s*\[')
# All that numbers are spelled with, NaN and Infinity included, which are then refused by their own name; no null,
# true or string can be written with these.
_NUMBERS = b"0123456789+-.eE, \t\r\n[]NaInfity"

# numpy lets go of the interpreter for some microseconds at every vector, which is too short for a waiting event loop
# to wake up in, and makes it start its wait again: it stalled for up to 250 ms (bench/decode.py). So work two
# milliseconds, then stand aside for as long as waking up takes.
TURN_S = 0.002
PAUSE_S = 0.000_05

# What a number may need as JSON text: sign, 17 digits, point, exponent and comma. Four bytes need 16/3 in base64.
BYTES_PER_NUMBER = 26
# Keys, index and object of one item, and usage, model and spaces around all of them, generously.
BYTES_PER_ITEM = 512
BYTES_PER_REPLY = 64 * 1024
# No request of 2,048 texts bills more; what is beyond is nonsense, and would make nonsense of the sum.
MOST_TOKENS = 10**9
# The largest vectors seen in the field have 8,192 numbers; the cap while a model's dimensions are not known.
MAX_DIMENSIONS = 16_384


def most_bytes(count: int, dimensions: int | None) -> int:
    """Return how long a reply to `count` texts can be at most; what is longer is not read to its end."""
    return BYTES_PER_REPLY + count * (BYTES_PER_ITEM + (dimensions or MAX_DIMENSIONS) * BYTES_PER_NUMBER)


def decode(body: bytes, count: int, dimensions: int | None) -> Reply:
    """Return the vectors of a reply in the order of the texts that were sent.

    Takes base64 and numbers, whichever was asked for, in any order of `index`; without any `index`, in the order
    they stand in.

    Args:
        body: The whole reply.
        count: How many texts were sent.
        dimensions: The size each vector must have; None if the first one may tell.

    Raises:
        ProtocolError: Count, index, dimension or numbers are not what was asked for. The message names expected
            and got, and never what the reply says.
    """
    turn_ends_s = perf_counter() + TURN_S
    rest, arrays = _take_out_arrays(body)
    document = _parse(rest)
    data = document.get("data") if isinstance(document, Mapping) else None
    if not isinstance(data, list):
        raise ProtocolError(f"expected an object with a list `data`, got {_kind(document)}{_error_in(document)}")
    if len(data) != count:
        raise ProtocolError(f"expected {count} embeddings, got {len(data)}")
    vectors: Vectors | None = None
    for item, row in zip(data, _order(data), strict=True):
        value = item.get("embedding")
        if not isinstance(value, str):
            raise ProtocolError(f"expected an embedding, got {_kind(value)} for text {row}")
        array = arrays.pop(value, None) if arrays else None
        vector = _from_base64(value, row) if array is None else _from_numbers(body[array], row)
        if vectors is None:
            vectors = np.empty((count, dimensions or len(vector)), np.float32)
        if len(vector) != vectors.shape[1]:
            raise ProtocolError(f"expected {vectors.shape[1]} dimensions, got {len(vector)} for text {row}")
        vectors[row] = vector
        if perf_counter() > turn_ends_s:
            sleep(PAUSE_S)
            turn_ends_s = perf_counter() + TURN_S
    if vectors is None:
        raise ProtocolError("expected embeddings, got none")
    _check_numbers(vectors, guessed=dimensions is None)
    model = document.get("model")
    return Reply(vectors, _tokens(document), model=model if isinstance(model, str) else None)


def _take_out_arrays(body: bytes) -> tuple[bytes, dict[str, slice]]:
    """Put a name in the place of every array of numbers; return the rest, and where in the body each name's is."""
    arrays: dict[str, slice] = {}
    end = max(body.find(b'"embedding"'), 0)
    if body.find(b"[", end) < 0:
        return body, arrays  # base64 alone: no need to search megabytes of it for keys
    pieces = [body[:end]]
    while key := _ARRAY.search(body, end):
        start = key.end() - 1
        stop = body.find(b"]", start) + 1 or len(body)
        name = f"array {len(arrays)}"  # a blank is no base64, so no vector is spelled like this
        arrays[name] = slice(start, stop)
        pieces += body[end:start], b'"%s"' % name.encode()
        end = stop
    pieces.append(body[end:])
    return b"".join(pieces), arrays


def _parse(body: bytes) -> Any:
    try:
        # two values for one key: whichever is taken may be the wrong one
        return jiter.from_json(body, cache_mode="keys", catch_duplicate_keys=True)
    except (ValueError, RecursionError) as error:
        # from None: the message may quote the reply
        raise ProtocolError(f"expected JSON, got {len(body):,} bytes that are not ({type(error).__name__})") from None


def _order(data: list[Any]) -> list[int]:
    for position, item in enumerate(data):
        if not isinstance(item, Mapping):
            raise ProtocolError(f"expected objects in `data`, got {_kind(item)} at position {position}")
    indices = [item.get("index") for item in data]
    if all(index is None for index in indices):
        return list(range(len(data)))
    if any(type(index) is not int for index in indices) or sorted(indices) != list(range(len(data))):
        raise ProtocolError(f"expected each `index` from 0 to {len(data) - 1} once, got something else")
    return indices


def _from_numbers(array: bytes, row: int) -> Vectors:
    if array.translate(None, delete=_NUMBERS):
        raise ProtocolError(f"expected numbers, got something else among them for text {row}")
    try:
        with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused
            return np.array(_parse(array), np.float64).astype(np.float32)
    except OverflowError:
        raise ProtocolError(f"expected numbers, got one of hundreds of digits for text {row}") from None


def _from_base64(value: str, row: int) -> Vectors:
    try:
        raw = pybase64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ProtocolError(f"expected base64, got something else for text {row}") from None
    if not raw or len(raw) % 4:
        raise ProtocolError(f"expected whole float32 numbers, got {len(raw)} bytes for text {row}")
    return np.frombuffer(raw, "<f4")


def _check_numbers(vectors: Vectors, *, guessed: bool) -> None:
    finite = np.isfinite(vectors)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=1)))
        raise ProtocolError(f"expected finite numbers, got NaN or infinity for text {row}")
    if guessed and _are_doubles(vectors):
        raise ProtocolError("expected float32 in base64, got float64")


def _are_doubles(vectors: Vectors) -> bool:
    # vLLM 0.5.3 sent float64 (vllm issue 5734): twice the numbers, and half of them nonsense. It had widened them
    # from float32, so the low half of each is empty but for its three highest bits. As a float32 that is 0, 2, 1e-19
    # or 4e19, of either sign: no embedding has that in every other place.
    low_halves = vectors[0, ::2].view(np.uint32)
    return bool(np.count_nonzero(low_halves) >= 8 and not np.any(low_halves & 0x1FFF_FFFF))


def _tokens(document: Mapping[str, Any]) -> int | None:
    usage = document.get("usage")
    if not isinstance(usage, Mapping):
        return None
    for key in ("total_tokens", "prompt_tokens"):
        tokens = usage.get(key)
        if type(tokens) is int and 0 <= tokens < MOST_TOKENS:
            return tokens
    return None


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object without it"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)


def _error_in(document: Any) -> str:
    return " but `error`" if isinstance(document, Mapping) and "error" in document else ""
