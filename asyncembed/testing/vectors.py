"""Vectors as a pure function of text, model and size, and their encodings in a reply. Pure.

The bytes of a text seed a generator. So equal texts get equal vectors in every process and on every machine, and
different texts get different ones: a test notices every row in the wrong place.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pybase64

from ..models import lookup
from ..types import Vectors

# The size of text-embedding-3-small and of many open models, used for unknown models.
DEFAULT_DIMENSIONS = 1_536

# The constants of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GAMMA, _MIX_1, _MIX_2 = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)

# Rows of numbers that are formatted at once: 64 x 1,536 x 16 bytes stay in the CPU's cache.
_ROWS_AT_ONCE = 64
_FOUR_DIGITS = np.array([list(b"%04d" % n) for n in range(10_000)], np.uint8)


def embedding_of(text: str, *, dimensions: int | None = None, model: str = "text-embedding-3-small") -> Vectors:
    """Return the vector float32[d] that the server answers for this text.

    Args:
        text: The text as it was sent.
        dimensions: The size of the vector; None for the model's own. A shorter vector is the beginning of the full one,
            rescaled to unit length, as OpenAI does.
        model: The model's name as it was sent.
    """
    vector: Vectors = embeddings_of([text], dimensions or size_of(model), model)[0]
    return vector


def embeddings_of(texts: Sequence[str], dimensions: int, model: str) -> Vectors:
    """Return float32[n, d], each row of unit length, row i for text i. Costs about 3 microseconds a text."""
    prefix = model.encode() + b"\0"
    hashes = [blake2b(prefix + text.encode(), digest_size=8).digest() for text in texts]
    seeds = np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64)
    words = seeds[:, None] + np.arange(1, -(-dimensions // 8) + 1, dtype=np.uint64) * _GAMMA
    words ^= words >> np.uint64(30)
    words *= _MIX_1
    words ^= words >> np.uint64(27)
    words *= _MIX_2
    words ^= words >> np.uint64(31)
    # Odd whole numbers from -255 to 255: the sum of their squares is exact, so every machine computes the same length.
    numbers: Vectors = words.astype("<u8", copy=False).view(np.uint8)[:, :dimensions].astype(np.float32)
    numbers *= np.float32(2)
    numbers -= np.float32(255)
    lengths = np.sqrt(np.einsum("ij,ij->i", numbers, numbers, dtype=np.float64))
    numbers /= lengths.astype(np.float32)[:, None]
    return numbers


def size_of(model: str) -> int:
    """Return the dimensions of the model's vectors; 1,536 for an unknown model."""
    return lookup(model).dimensions or DEFAULT_DIMENSIONS


def as_base64(vectors: Vectors) -> list[bytes]:
    """Return each row as a JSON string: base64 of little-endian float32."""
    rows = vectors.astype("<f4", copy=False)
    return [b'"%b"' % pybase64.b64encode(row.tobytes()) for row in rows]


def as_numbers(vectors: Vectors) -> list[bytes]:
    """Return each row as a JSON array. Exact for unit vectors: parsed and cast, it is the same float32 again.

    Every number gets a sign, a point and twelve decimals, so that numpy can format all of them at once. The smallest
    number of a unit vector here is 1 / (255 sqrt(d)), which is 7e-5 for 3,072 dimensions, where neighbouring float32
    values are 7e-12 apart.
    """
    rows: list[bytes] = []
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        some = vectors[start : start + _ROWS_AT_ONCE].astype(np.float64)
        scaled = np.rint(np.abs(some) * 1e12).astype(np.int64)
        text = np.empty((*some.shape, 16), np.uint8)
        text[..., 0] = np.where(some < 0, ord("-"), ord(" "))
        text[..., 1] = ord("0") + scaled // 10**12
        text[..., 2] = ord(".")
        text[..., 3:7] = _FOUR_DIGITS[scaled // 10**8 % 10_000]
        text[..., 7:11] = _FOUR_DIGITS[scaled // 10**4 % 10_000]
        text[..., 11:15] = _FOUR_DIGITS[scaled % 10_000]
        text[..., 15] = ord(",")
        rows.extend(b"[%b]" % row.tobytes()[:-1] for row in text)
    return rows
