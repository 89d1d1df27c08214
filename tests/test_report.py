"""`report`: results, reports, progress and plans as values and as text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from asyncembed.errors import AllFailedError, AsyncEmbedError, InvalidTextError, SomeFailedError
from asyncembed.report import EmbeddingResult, IngestReport, Plan, Progress, failed
from asyncembed.types import Failure


def result(rows: int = 4, bad: tuple[int, ...] = ()) -> EmbeddingResult:
    embeddings = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    embeddings[list(bad)] = np.nan
    failures = tuple(Failure(index, InvalidTextError(f"error {index}")) for index in bad)
    return EmbeddingResult(embeddings, failures, 40, 2, 1, 0.5, 0.01)


def test_a_result_is_indexed_by_text() -> None:
    some = result(bad=(1, 3))
    assert len(some) == 4
    assert some.failed_indices == [1, 3]
    assert [None if row is None else row.tolist() for row in (some[0], some[1], some[2], some[3])] == [
        [0.0, 1.0, 2.0],
        None,
        [6.0, 7.0, 8.0],
        None,
    ]


def test_a_result_is_indexed_from_the_end_too() -> None:
    some = result(bad=(1,))
    assert some[-3] is None
    assert np.array_equal(some[-1], some.embeddings[3])


@pytest.mark.parametrize("index", [4, -5, 10**9])
def test_an_index_beyond_the_texts_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError):
        result()[index]


def test_a_result_can_be_iterated() -> None:
    assert [row is None for row in result(bad=(2,))] == [False, False, True, False]


def test_a_vector_that_begins_with_zero_is_no_failure() -> None:
    assert result(1)[0] is not None


def test_a_text_has_no_vector_if_no_text_was_embedded() -> None:
    # no reply came, so the size of a vector is unknown
    nothing = EmbeddingResult(np.empty((2, 0), np.float32), (), 0, 0, 0, 0.0, None)
    assert (nothing[0], nothing[1], len(nothing)) == (None, None, 2)


def test_raise_for_failures_does_nothing_without_failures() -> None:
    result().raise_for_failures()


def test_raise_for_failures_raises_an_error_with_the_result_and_the_first_failure() -> None:
    some = result(bad=(1, 3))
    with pytest.raises(SomeFailedError) as caught:
        some.raise_for_failures()
    assert not isinstance(caught.value, AllFailedError)
    assert str(caught.value) == ("2 of 4 texts were not embedded; the first of them, text 1: InvalidTextError: error 1")
    assert caught.value.result is some
    assert caught.value.__cause__ is some.failures[0].error


def test_a_result_of_nothing_but_failures_is_an_all_failed_error() -> None:
    error = failed(result(2, bad=(0, 1)))
    assert isinstance(error, AllFailedError)
    assert isinstance(error, RuntimeError)


def test_results_are_immutable_and_do_not_print_their_vectors() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().requests = 5  # type: ignore[misc]
    assert "embeddings" not in repr(result())


def test_an_ingest_report_adds_up() -> None:
    report = IngestReport(success_count=5, skipped_count=3)
    report.failures += [Failure(2, InvalidTextError("is empty"), "b"), Failure(7, InvalidTextError("is empty"))]
    assert (report.failed_count, report.failed_ids, report.seen) == (2, ["b", None], 10)


def test_a_new_ingest_report_is_all_zeros() -> None:
    report = IngestReport()
    assert (report.seen, report.failed_ids, report.failures, report.cost_usd) == (0, [], [], None)
    assert IngestReport().failures is not report.failures


@pytest.mark.parametrize(
    ("cost_usd", "words"),
    [
        (None, "1,000 stored, 3 skipped, 0 failed; 50,000 tokens in 12 requests, 1.2 s"),
        (0.0, "1,000 stored, 3 skipped, 0 failed; 50,000 tokens in 12 requests, 1.2 s"),
        (0.001, "1,000 stored, 3 skipped, 0 failed; 50,000 tokens in 12 requests, $0.0010, 1.2 s"),
    ],
)
def test_an_ingest_report_is_printed_as_one_line(cost_usd: float | None, words: str) -> None:
    assert str(IngestReport(1_000, 3, [], 50_000, 12, 0, 1.23, cost_usd)) == words


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (
            Progress(5, 10, 1, 2, 3_000, 4, 1, 2.0),
            "5 of 10 done (2 skipped, 1 failed), 3,000 tokens in 4 requests, 2/s",
        ),
        (Progress(0, None, 0, 0, 0, 0, 0, 0.0), "0 done (0 skipped, 0 failed), 0 tokens in 0 requests, 0/s"),
    ],
)
def test_progress_is_printed_as_one_line(progress: Progress, words: str) -> None:
    assert str(progress) == words


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(10, (), 2, 5_000, True, None, 0.0001), "10 texts, 5,000 tokens, 2 requests, $0.0001"),
        (
            Plan(10, (), 2, 5_000, False, 90.0, 0.0001),
            "10 texts, at most 5,000 tokens, 2 requests, at most $0.0001, 90 s at your limits",
        ),
        (Plan(10, (), 2, 5_000, False, None, None), "10 texts, at most 5,000 tokens, 2 requests, price unknown"),
    ],
)
def test_a_plan_is_printed_as_one_line(plan: Plan, words: str) -> None:
    assert str(plan) == words


def test_a_failure_can_be_unpacked_and_results_are_compared_by_identity() -> None:
    error = AsyncEmbedError("no")
    [(index, why)] = [Failure(3, error, "an id")]
    assert (index, why) == (3, error)
    first, second = (EmbeddingResult(np.zeros((1, 2), np.float32), (), 1, 1, 0, 0.1, None) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2
