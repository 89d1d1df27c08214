"""Helpers for tests of `ingest`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from asyncembed import Record
from asyncembed.errors import AsyncEmbedError, SinkError
from asyncembed.types import Row
from tests.fakes import FakeProvider, make_embedder, vector_of

make = partial(make_embedder, latency_s=0)


def records(count: int, first: int = 0) -> list[Record]:
    return [Record(f"id {number}", f"text {number}") for number in range(first, first + count)]


def sent_texts(provider: FakeProvider) -> int:
    return sum(map(len, provider.requests))


async def assert_stored(sink: Any, texts: dict[str, str]) -> None:
    """Check that the store holds these ids with the vectors of these texts, and no other."""
    assert await sink.count() == len(texts)
    hits = {hit.id: hit for hit in await sink.search(np.ones(4, np.float32), k=len(texts) + 1)}
    assert {name: hit.text for name, hit in hits.items()} == texts
    ones = np.ones(4) / 2
    for name, hit in hits.items():
        vector = vector_of(texts[name]).astype(np.float64)
        assert hit.score == pytest.approx(float(vector @ ones / np.linalg.norm(vector)), abs=1e-5)


class LimitedSink:
    """A sink that takes a number of batches and then fails."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.rows: list[Row] = []

    async def prepare(self, model: str, dimensions: int | None) -> None: ...

    async def existing(self, model: str, hashes: Any) -> set[Any]:
        return set()

    async def write(self, model: str, rows: Sequence[Row]) -> dict[Any, AsyncEmbedError]:
        await asyncio.sleep(0)
        if self.batches == 0:
            raise SinkError("the disk is full")
        self.batches -= 1
        self.rows.extend(rows)
        return {}
