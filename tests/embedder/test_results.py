"""Where vectors are put: each in the row of its text, copied or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.batching.batch import Batch, Outcome, outcome_of_reply
from asyncembed.batching.texts import Text, unique
from asyncembed.embedder.results import Results
from asyncembed.errors import AsyncEmbedError
from asyncembed.sending.context import CallContext
from asyncembed.testing import EmbeddingServer, WrongDimensions
from asyncembed.types import Reply, Vectors


def results_of(count: int) -> Results:
    return Results(count, CallContext(), None)


def vectors_of(texts: Sequence[Text], dimensions: int = 3) -> Vectors:
    """Every number is the position of the text."""
    return np.repeat(np.array([[text.indices[0]] for text in texts], np.float32), dimensions, axis=1)


def rows(result: Any) -> list[float]:
    np.testing.assert_array_equal(result.embeddings, np.repeat(result.embeddings[:, :1], 3, axis=1))
    return [float(row[0]) for row in result.embeddings]


async def answer(results: Results, texts: list[Text]) -> None:
    await results.deliver(outcome_of_reply(Batch(list(texts)), Reply(vectors_of(texts), 1)))


async def test_every_vector_comes_into_its_row() -> None:
    results = results_of(10)
    texts = unique(enumerate("abcdefghij"))
    await answer(results, texts[4:])
    await answer(results, texts[:4])
    assert rows(results.finish(None, None, None)) == list(range(10))


async def test_equal_texts_have_equal_rows() -> None:
    results = results_of(6)
    texts = unique(enumerate("abaacb"))
    assert [list(text.indices) for text in texts] == [[0, 2, 3], [1, 5], [4]]
    await answer(results, texts[:2])
    await answer(results, texts[2:])
    assert rows(results.finish(None, None, None)) == [0, 1, 0, 0, 4, 1]


async def test_rows_that_are_not_side_by_side_are_filled() -> None:
    results = results_of(6)
    texts = unique(enumerate("abcdef"))
    for some in (texts[::2], texts[5::-2]):
        await answer(results, some)
    assert rows(results.finish(None, None, None)) == list(range(6))


@pytest.mark.parametrize("row", [0, 3, None])
async def test_after_a_first_reply_of_another_size_the_next_one_is_right(row: int | None) -> None:
    damage = WrongDimensions(7) if row is None else WrongDimensions(7, row=row)
    # of these the first is refused, unless all its rows agree and nobody knows better
    async with (
        EmbeddingServer(dimensions=8, faults=[damage]) as server,
        Embedder("fake", base_url=server.base_url, api_key="none") as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(300)])
    assert not result.failures
    assert result.embeddings.shape == (300, 7 if row is None else 8)
    assert np.isfinite(result.embeddings).all()


async def test_a_row_that_never_came_is_a_failed_row() -> None:
    results = results_of(4)
    texts = unique(enumerate("abcd"))
    await results.deliver(Outcome(failed=[(texts[1], AsyncEmbedError("no"))]))
    await answer(results, texts[2:])
    result = results.finish(None, None, None)
    assert result.failed_indices == [0, 1]
    assert np.isnan(result.embeddings[:2]).all()
    assert rows(result)[2:] == [2, 3]
