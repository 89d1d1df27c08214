"""Where vectors are put: each in the row of its text, copied or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.batching.batch import Batch, Outcome, settled
from asyncembed.batching.texts import Mean, Piece, Text, unique
from asyncembed.embedder.results import Results
from asyncembed.errors import AsyncEmbedError
from asyncembed.sending.run import Run
from asyncembed.testing import EmbeddingServer, WrongDimensions
from asyncembed.types import Reply, Vectors


def results_of(count: int) -> tuple[Run, Results]:
    run = Run()
    return run, Results(count, run, None)


def vectors_of(texts: Sequence[Text], dimensions: int = 3) -> Vectors:
    """Every number is the position of the text."""
    return np.repeat(np.array([[text.indices[0]] for text in texts], np.float32), dimensions, axis=1)


def rows(result: Any) -> list[float]:
    np.testing.assert_array_equal(result.embeddings, np.repeat(result.embeddings[:, :1], 3, axis=1))
    return [float(row[0]) for row in result.embeddings]


async def answer(run: Run, results: Results, texts: list[Text], *, in_place: bool) -> None:
    place = run.place_for(texts)
    vectors = vectors_of(texts)
    if in_place:
        assert place is not None
        there = place(3)
        assert there is not None
        there[:] = vectors
        vectors = there
    await results.deliver(settled(Batch(list(texts)), Reply(vectors, 1)))


@pytest.mark.parametrize("in_place", [True, False])
async def test_every_vector_comes_into_its_row(in_place: bool) -> None:
    run, results = results_of(10)
    texts = unique(enumerate("abcdefghij"))
    await answer(run, results, texts[4:], in_place=in_place)
    await answer(run, results, texts[:4], in_place=in_place)
    assert rows(results.finish(None, None, None)) == list(range(10))


@pytest.mark.parametrize("in_place", [True, False])
async def test_equal_texts_have_equal_rows(in_place: bool) -> None:
    run, results = results_of(6)
    texts = unique(enumerate("abaacb"))
    assert [list(text.indices) for text in texts] == [[0, 2, 3], [1, 5], [4]]
    await answer(run, results, texts[:2], in_place=in_place)
    await answer(run, results, texts[2:], in_place=in_place)
    assert rows(results.finish(None, None, None)) == [0, 1, 0, 0, 4, 1]


async def test_rows_that_are_not_side_by_side_are_copied_to() -> None:
    run, results = results_of(6)
    texts = unique(enumerate("abcdef"))
    for some in (texts[::2], texts[5::-2]):
        assert run.place_for(some) is None
        await answer(run, results, some, in_place=False)
    assert rows(results.finish(None, None, None)) == list(range(6))


async def test_what_is_no_whole_text_of_the_call_has_no_place() -> None:
    run, _ = results_of(6)
    long = Text("a", [0], mean=Mean(missing=2))
    assert run.place_for([Piece(long, "a", 1, 1), Piece(long, "b", 1, 1)]) is None
    assert run.place_for([long]) is None
    assert run.place_for([Text("of nobody", [])]) is None


async def test_the_size_of_a_reply_that_was_refused_is_forgotten() -> None:
    run, results = results_of(4)
    texts = unique(enumerate("abcd"))
    for dimensions in (5, 3, 7):
        place = run.place_for(texts)
        assert place is not None
        there = place(dimensions)
        assert there is not None
        assert there.shape == (4, dimensions)
    await answer(run, results, texts[:2], in_place=False)
    place = run.place_for(texts[2:])
    assert place is not None
    assert place(5) is None
    await answer(run, results, texts[2:], in_place=True)
    assert rows(results.finish(None, None, None)) == [0, 1, 2, 3]


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


async def test_a_place_that_was_written_to_in_vain_is_a_failed_row() -> None:
    run, results = results_of(4)
    texts = unique(enumerate("abcd"))
    place = run.place_for(texts)
    assert place is not None
    there = place(3)
    assert there is not None
    there[:] = 7.0
    await results.deliver(Outcome(failed=[(texts[1], AsyncEmbedError("no"))]))
    await answer(run, results, texts[2:], in_place=False)
    result = results.finish(None, None, None)
    assert result.failed_indices == [0, 1]
    assert np.isnan(result.embeddings[:2]).all()
    assert rows(result)[2:] == [2, 3]
