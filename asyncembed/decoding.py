"""Reply bytes to float32[n, d], trusting nothing. Pure and blocking; large replies are decoded in a thread."""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from typing import Any

import jiter
import numpy as np
import pybase64

from .errors import ProtocolError
from .types import Reply, Vectors

# Vectors spelled as numbers: parsing 2,048 of them in one go holds the interpreter for 150 ms and makes three
# million Python floats (bench/decode.py). They are taken out of the document and parsed one by one, so that other
# threads get their turn in between. A quote inside a JSON string is escaped, so this matches keys only.
_NUMBERS = re.compile(rb'"embedding"\s*:\s*(\[[-+.0-9eE,\sNaInfity]*\])')

# What a number may need as JSON text: sign, 17 digits, point, exponent and comma. Four bytes need 16/3 in base64.
BYTES_PER_NUMBER = 26
# Keys, index and object of one item, and usage, model and spaces around all of them, generously.
BYTES_PER_ITEM = 512
BYTES_PER_REPLY = 64 * 1024
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
    skeleton, spans = _take_out_numbers(body)
    document = _parse(skeleton)
    data = document.get("data") if isinstance(document, Mapping) else None
    if not isinstance(data, list):
        raise ProtocolError(f"expected an object with a list `data`, got {_kind(document)}{_error_in(document)}")
    if len(data) != count:
        raise ProtocolError(f"expected {count} embeddings, got {len(data)}")
    order = _order(data)
    vectors: Vectors | None = None
    for item, row in zip(data, order, strict=True):
        vector = _vector(item.get("embedding"), spans, row)
        if vectors is None:
            size = dimensions or len(vector)
            vectors = np.empty((count, size), np.float32)
        if len(vector) != vectors.shape[1]:
            raise ProtocolError(f"expected {vectors.shape[1]} dimensions, got {len(vector)} for text {row}")
        vectors[row] = vector
    assert vectors is not None
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise ProtocolError(f"expected finite numbers, got NaN or infinity for text {row}")
    return Reply(vectors, _tokens(document))


def _take_out_numbers(body: bytes) -> tuple[bytes, list[bytes | None]]:
    """Replace every array of numbers by its place in the list of arrays that is returned beside."""
    spans: list[bytes | None] = []
    if not _NUMBERS.match(body, max(body.find(b'"embedding"'), 0)):
        return body, spans  # base64: no need to search megabytes of it

    def replace(match: re.Match[bytes]) -> bytes:
        spans.append(match[1])
        return b'"embedding":%d' % (len(spans) - 1)

    return _NUMBERS.sub(replace, body), spans


def _parse(body: bytes) -> Any:
    try:
        return jiter.from_json(body, cache_mode="keys")
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


def _vector(value: Any, spans: list[bytes | None], row: int) -> Vectors:
    if isinstance(value, str):
        return _from_base64(value, row)
    if type(value) is int and 0 <= value < len(spans):
        span, spans[value] = (
            spans[value],
            None,
        )  # each once: a number that was in the reply itself takes no other's
        value = None if span is None else _parse(span)
    elif isinstance(value, list) and not all(type(number) in (float, int) for number in value):
        raise ProtocolError(f"expected numbers, got something else among them for text {row}")
    if not isinstance(value, list) or not value:
        raise ProtocolError(f"expected an embedding, got {_kind(value)} for text {row}")
    try:
        with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused
            return np.array(value, np.float64).astype(np.float32)
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


def _tokens(document: Mapping[str, Any]) -> int | None:
    usage = document.get("usage")
    if not isinstance(usage, Mapping):
        return None
    for key in ("total_tokens", "prompt_tokens"):
        tokens = usage.get(key)
        if type(tokens) is int and tokens >= 0:
            return tokens
    return None


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object without it"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), type(value).__name__)


def _error_in(document: Any) -> str:
    return " but `error`" if isinstance(document, Mapping) and "error" in document else ""
