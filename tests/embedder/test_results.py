"""`results`: each vector in the row of its text, and progress."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.batching.batch import Batch, Outcome, outcome_of_reply
from asyncembed.batching.texts import Text, unique
from asyncembed.embedder.results import WORTH_A_THREAD_BYTES, Results
from asyncembed.errors import AsyncEmbedError, BadRequestError
from asyncembed.report import Progress
from asyncembed.sending.context import CallContext
from asyncembed.testing import EmbeddingServer, WrongDimensions
from asyncembed.types import Reply, Vectors
from tests.fakes import make_embedder, vector_of


async def test_a_result_lists_failed_texts_and_has_no_vector_for_them() -> None:
    embedder, _ = make_embedder(
        lambda _, texts: BadRequestError("HTTP 400", status=400) if "bad" in texts else None, latency_s=0
    )

    result = await embedder.embed(["a", "bad", "b"])

    assert result.embeddings.dtype == np.float32
    assert result.embeddings.shape == (3, 4)
    assert result.embeddings.flags.c_contiguous
    assert result.failed_indices == [1]
    assert result[1] is None
    np.testing.assert_array_equal(result[2], vector_of("b"))
    assert np.isnan(result.embeddings[1]).all()
    assert result.total_tokens == len("a") + len("b")


async def test_progress_ends_at_the_total() -> None:
    embedder, _ = make_embedder(latency_s=0, max_batch_size=10)
    seen: list[Progress] = []
    await embedder.embed([f"text {n}" for n in range(95)], on_progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].requests) == (95, 95, 10)
    assert "95 of 95" in str(seen[-1])


def results_of(count: int) -> Results:
    return Results(count, CallContext(), None)


def vectors_of(texts: Sequence[Text], dimensions: int = 3) -> Vectors:
    """Return vectors float32[n, dimensions] in which every number is the position of the text."""
    return np.repeat(np.array([[text.indices[0]] for text in texts], np.float32), dimensions, axis=1)


def rows(result: Any) -> list[float]:
    np.testing.assert_array_equal(result.embeddings, np.repeat(result.embeddings[:, :1], 3, axis=1))
    return [float(row[0]) for row in result.embeddings]


async def deliver(results: Results, texts: list[Text]) -> None:
    await results.deliver(outcome_of_reply(Batch(list(texts)), Reply(vectors_of(texts), 1)))


async def test_each_vector_is_put_into_the_row_of_its_text() -> None:
    results = results_of(10)
    texts = unique(enumerate("abcdefghij"))
    await deliver(results, texts[4:])
    await deliver(results, texts[:4])
    assert rows(results.finish(None, None, None)) == list(range(10))


async def test_duplicate_texts_have_equal_rows() -> None:
    results = results_of(6)
    texts = unique(enumerate("abaacb"))
    assert [list(text.indices) for text in texts] == [[0, 2, 3], [1, 5], [4]]
    await deliver(results, texts[:2])
    await deliver(results, texts[2:])
    assert rows(results.finish(None, None, None)) == [0, 1, 0, 0, 4, 1]


async def test_rows_that_are_not_adjacent_are_filled() -> None:
    results = results_of(6)
    texts = unique(enumerate("abcdef"))
    for some in (texts[::2], texts[5::-2]):
        await deliver(results, some)
    assert rows(results.finish(None, None, None)) == list(range(6))


@pytest.mark.parametrize("row", [0, 3, None])
async def test_a_first_reply_with_wrong_dimensions_does_not_spoil_the_result(row: int | None) -> None:
    damage = WrongDimensions(7) if row is None else WrongDimensions(7, row=row)
    # the first reply is refused, unless all its rows have one size and no other size is known
    async with (
        EmbeddingServer(dimensions=8, faults=[damage]) as server,
        Embedder("fake", base_url=server.base_url, api_key="none") as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(300)])
    assert not result.failures
    assert result.embeddings.shape == (300, 7 if row is None else 8)
    assert np.isfinite(result.embeddings).all()


async def test_a_text_without_an_outcome_is_a_failed_row() -> None:
    results = results_of(4)
    texts = unique(enumerate("abcd"))
    await results.deliver(Outcome(failed=[(texts[1], AsyncEmbedError("no"))]))
    await deliver(results, texts[2:])
    result = results.finish(None, None, None)
    assert result.failed_indices == [0, 1]
    assert np.isnan(result.embeddings[:2]).all()
    assert rows(result)[2:] == [2, 3]


async def test_two_outcomes_at_once_fill_one_array() -> None:
    large_has_begun, small_is_done = threading.Event(), threading.Event()
    loop_thread = threading.get_ident()

    class SlowIndices(list[int]):
        """Holds up the thread that copies the vectors of the large outcome."""

        def __getitem__(self, index: Any) -> Any:
            if threading.get_ident() != loop_thread:
                large_has_begun.set()
                assert small_is_done.wait(10)
            return super().__getitem__(index)

    count = WORTH_A_THREAD_BYTES // 16 + 10
    results = results_of(count)
    vectors = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    texts = [Text("", SlowIndices([index]) if index == 1 else [index]) for index in range(count)]

    async with asyncio.TaskGroup() as group:
        group.create_task(results.deliver(Outcome(texts[1:], vectors[1:])))
        await asyncio.to_thread(large_has_begun.wait, 10)
        await results.deliver(Outcome(texts[:1], vectors[:1]))
        small_is_done.set()
    assert large_has_begun.is_set()

    np.testing.assert_array_equal(results.finish(None, None, None).embeddings, vectors)
