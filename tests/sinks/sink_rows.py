"""Rows to store, and a few that are hard to store."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from asyncembed.types import RecordId, Row, Vectors

MODEL = "model-a"


def vec(*numbers: float) -> Vectors:
    return np.array(numbers, dtype=np.float32)


def row(id: RecordId, vector: Vectors | None = None, text: str | None = None, metadata: str | None = None) -> Row:
    text = f"text of {id}" if text is None else text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Row(id, text, vec(1, 2, 3) if vector is None else vector, digest, metadata)


def rows(count: int, dimensions: int = 8, seed: int = 0) -> list[Row]:
    matrix = np.random.default_rng(seed).standard_normal((count, dimensions)).astype(np.float32)
    return [row(f"id-{number:05d}", matrix[number]) for number in range(count)]


def hashes(stored: Sequence[Row]) -> dict[RecordId, str]:
    return {one.id: one.content_hash for one in stored}


def nearest(stored: Sequence[Row], query: Vectors, k: int) -> list[str]:
    """The ids that a search must return, by the definition of the cosine."""
    wide = query.astype(np.float64)
    scores = {
        str(one.id): float(
            one.vector.astype(np.float64) @ wide / np.linalg.norm(one.vector.astype(np.float64)) / np.linalg.norm(wide)
        )
        for one in stored
    }
    return sorted(scores, key=lambda id: (-round(scores[id], 12), id))[:k]


class HeldRow:
    """A row that blocks the reader of its text until `go_on` is set: to interrupt a transaction in the middle."""

    def __init__(self, id: str) -> None:
        self._row = row(id)
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._row, name)

    @property
    def text(self) -> str:
        self.reached.set()
        assert self.go_on.wait(30)
        return self._row.text
